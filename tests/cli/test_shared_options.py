from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from nnunet_fed.cli.app import app
from nnunet_fed.cli.shared_options import KeyOptions, MachineOptions, SiteOptions, StudyOptions, grouped
from nnunet_fed.study.federation import Federation


@dataclass(frozen=True)
class Group:
    names: Annotated[list[str], typer.Option("--name", help="Of all.")]
    lr: Annotated[float, typer.Option(help="Of the group.")] = 0.5


def run(*arguments: str) -> tuple[Any, dict[str, Any]]:
    got: dict[str, Any] = {}

    @grouped
    def command(
        *,
        before: Annotated[int, typer.Option(help="Its own.")] = 1,
        group: Group,
        after: Annotated[bool, typer.Option("--after", help="Its own, too.")] = False,
    ) -> None:
        """What it does."""
        got.update(before=before, group=group, after=after)

    one = typer.Typer()
    one.command()(command)
    return CliRunner().invoke(one, list(arguments)), got


def test_a_group_stands_for_its_options() -> None:
    result, got = run("--name", "a", "--name", "b", "--after")
    assert result.exit_code == 0, result.output
    assert got == {"before": 1, "group": Group(["a", "b"], 0.5), "after": True}
    assert run("--name", "a", "--lr", "2", "--before", "3")[1] == {
        "before": 3,
        "group": Group(["a"], 2),
        "after": False,
    }


def test_its_options_have_help_bounds_and_defaults() -> None:
    text = run("--help")[0].output
    assert "What it does." in text
    places = [text.index(words) for words in ("Its own.", "Of all.", "Of the group.", "Its own, too.")]
    assert places == sorted(places), "where the group stands among the others"
    result, got = run()
    assert (result.exit_code, got) == (2, {})
    assert "--name" in result.output


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("simulate", (SiteOptions, StudyOptions, MachineOptions)),
        ("compare", (SiteOptions, StudyOptions, MachineOptions)),
        ("coordinator", (KeyOptions,)),
        ("status", (KeyOptions,)),
    ],
)
def test_commands_have_the_shared_options(command: str, groups: tuple[type[Any], ...]) -> None:
    found = [parameter.name for parameter in get_command(app).commands[command].params]  # type: ignore[attr-defined]
    assert len(set(found)) == len(found)
    assert {field.name for group in groups for field in fields(group)} <= set(found)


def test_a_study_is_made_of_its_options() -> None:
    settings = StudyOptions(rounds=3, fold="all").settings()
    study = Federation.model_validate({"name": "s", "sites": ("a",), "method": {"name": "fedavg"}, **settings})
    assert (study.rounds, study.fold, study.planning_deadline_minutes) == (3, "all", study.deadline_minutes)


def test_the_named_trainers_learning_rate_is_its_own_unless_another_is_said() -> None:
    stock = StudyOptions().settings()
    assert (stock["trainer"], stock["initial_lr"], stock["momentum"]) == ("nnUNetTrainer", 0.01, 0.99)
    named = StudyOptions(trainer="nnUNetTrainerAdam", initial_lr=0.5).settings()
    assert (named["trainer"], named["initial_lr"], named.get("momentum")) == ("nnUNetTrainerAdam", 0.5, None)
