"""The documentation for those who run a study: its commands, options and metrics exist; a copied state serves on."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from serving import Served, make_study, together

from nnunet_fed.cli.app import app
from nnunet_fed.coordinator.verdict import Offer
from nnunet_fed.transport.coordinator.http import StatusServer

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
OPERATIONS = DOCS / "operations.md"


def commands(page: Path) -> list[list[str]]:
    """Every ``nnunet_fed ...`` in code, fenced or in a line."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for line in lines:
        match = re.search(r"(?:^|[ /=(])nnunet_fed ([a-z][^)#|&>]*)", line)
        if match and "nnunet_fed.service" not in line:
            found.append(shlex.split(match[1]))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documentation_exists(page: Path) -> None:
    root = typer.main.get_command(app)
    for words in commands(page):
        command, rest = root, list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
        assert command is not root, words
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given <= known, (words, given - known)


def test_the_pages_are_read() -> None:
    found = [words[0] for words in commands(OPERATIONS)]
    assert {"certs", "coordinator", "check", "plan_and_preprocess", "status", "init", "plugin-path"} <= set(found)
    assert len(found) > 20


def test_the_service_file() -> None:
    [unit] = re.findall(r"```ini\n(.*?)```", OPERATIONS.read_text(), re.DOTALL)
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.replace("\\\n", " "))
    assert shlex.split(parser["Service"]["ExecStart"])[:2] == ["/opt/nnunet_fed/bin/nnunet_fed", "coordinator"]


def test_the_metrics(serve: Callable[..., Served]) -> None:
    told = set(re.findall(r"nnunet_fed_[a-z_]+", OPERATIONS.read_text()))
    served = serve(make_study("ab"))
    pages = StatusServer(served.coordinator, "127.0.0.1:0")
    pages.start()
    names = {name for family in pages.registry.collect() for name in (family.name, f"{family.name}_total")}
    pages.stop()
    assert told <= names
    ours = {family.name for family in pages.registry.collect()}
    assert {name.removesuffix("_total") for name in told} == ours, "all of them are told of"


def test_every_case_of_what_happens_when_is_backed_by_a_test() -> None:
    table = OPERATIONS.read_text().partition("## What happens when")[2].partition("\n## ")[0]
    _, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 30
    for row in rows:
        found = re.fullmatch(r"\| (.+?) \| (.+?) \| (.+?) <!-- ([a-z0-9_/]+\.py)::(test_\w+) --> \|", row)
        assert found, row
        tree = ast.parse((Path(__file__).parent / found[4]).read_text(encoding="utf-8"))
        assert found[5] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row


def test_a_copy_of_the_state_serves_on(serve: Callable[..., Served], tmp_path: Path) -> None:
    study = make_study("ab")
    served = serve(study)
    seats = [served.seat(site) for site in "ab"]

    def mean(seats: list, key: str, number: float) -> list:  # type: ignore[type-arg]
        tensors = {"w": np.float32([number])}
        return together(*(lambda seat=seat: seat.mean(key, tensors, 1) for seat in seats))  # type: ignore[misc]

    mean(seats, "round-0000/model", 1)
    served.coordinator.offer(Offer(seats[0].run, "round-0001/x", "a", "gather", 0, "", 0))
    served.stop()
    shutil.copytree(tmp_path / "state", tmp_path / "restored")
    restored = serve(study, tmp_path / "restored")
    seats = [restored.seat(site) for site in "ab"]
    assert seats[0].newest("model") == "round-0000/model"
    assert seats[1].fetch("round-0000/model")["w"] == 1
    assert [waits["missing"] for waits in restored.coordinator.status()["open"]] == [["b"]]
    assert mean(seats, "round-0002/model", 5)[0]["w"] == 5
