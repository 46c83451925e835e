"""``nnunet_fed compare`` on the command line: wrong options end in one sentence, and nothing is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import Command
from made_sites import raw

from nnunet_fed.comparison import arms, results
from nnunet_fed.evaluation import surface


@pytest.fixture
def sites(tmp_path: Path) -> list[str]:
    return [part for site in "ab" for part in ("--site", f"{site}={raw(tmp_path / site)}")]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--methods", "local,fedprocks"], "there is no 'fedprocks'; known: custom"),
        (["--methods", "mild=fedprocks"], "there is no 'fedprocks'; known: custom"),
        (["--methods", "fedgs=fedavg"], "a variant has a name that is no method's"),
        (["--methods", ""], "--methods: give at least one"),
        (["--option", "fedavg.finetune_epochs=x"], "The study of 'fedavg': method.finetune_epochs"),
        (["--option", "strength=2"], "--option strength: name the method too"),
        (["--rounds", "0"], "rounds"),
        (["--methods", "local,gcml", "--cross-site"], "The study of 'gcml': the file: cross_site = true needs"),
        (["--devices", "0,1"], "--devices 0,1: name GPUs with commas between them, as in cuda:0,cuda:1"),
        (["--device", "cuda:1"], "--device cuda:1: cpu, cuda or mps"),
        (["--fold", "first"], "--fold must be a whole number or 'all'"),
        (["--config", "3d_fullres", "--lr", "-1"], "initial_lr"),
        (["--trainer", "nnUNetTrainerThatIsNot"], "names the trainer 'nnUNetTrainerThatIsNot', and there is none here"),
        (["--trainer", "nnUNetTrainerFedAvg"], "'nnUNetTrainerFedAvg', which is federated itself"),
        (["--trainer", "nnUNet_Primus_S_Trainer", "--methods", "local,fedoap"], "FedOAP does not go with"),
    ],
)
def test_wrong_options(command: Command, sites: list[str], tmp_path: Path, options: list[str], told: str) -> None:
    assert told in command.fails("compare", *sites, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_without_monai_it_says_how_to_get_it(
    command: Command, sites: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surface, "find_spec", lambda name: None)
    told = command.fails("compare", *sites, "--out", tmp_path / "out")
    assert "pip install 'nnunet-fed[compare]'" in told


def test_what_is_said_is_what_is_compared(
    command: Command, sites: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(arms, "compare", lambda given, console: asked.append(given) or {})
    monkeypatch.setattr(results, "write_results", lambda *given: asked.append(given[1]) or CONTENT)
    status, out, _ = command(
        "compare", *sites, "--out", tmp_path / "out", "--methods", "local, fedgs, mild = fedgs",
        "--option", "mild.strength=0.5", "--seeds", "2", "--seed", "5",
        "--option", "fedgs.strength=1.5", "--rounds", "7", "--nsd-tolerance", "1", "--cross-site",
    )  # fmt: skip
    assert status == 0
    assert str(tmp_path / "out") in out.replace("\n", "")
    given, tolerance = asked
    assert (given.methods, given.seeds, tolerance) == (("local", "fedgs", "mild"), (5, 6), 1.0)
    assert given.options == {"fedgs": {"strength": 1.5}, "mild": {"strength": 0.5}}
    assert given.variants == {"mild": "fedgs"}
    study = given.study_of("fedgs", 6)
    assert (study.rounds, study.seed, study.method.strength, study.cross_site) == (7, 6, 1.5, True)
    assert not given.study_of("pooled", 6).cross_site, "there is one site only"


CONTENT = {
    "settings": {"statistics": {"level": 0.95, "interval": "-", "nsd_tolerance_mm": 1.0}}, "methods": {},
    "differences": [],
}  # fmt: skip
