"""A second start of the same training at a site is refused while the first lives."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DESCRIPTION, tiny_plans, write_preprocessed

from nnunet_fed import leases
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.leases import take
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import SITE_FILE_VARIABLE
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.parts import one_process
from nnunet_fed.trainers.parts.one_process import LEASE

Act = Callable[[Any], None]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Gives trainers of one fold at one site, whose site.toml is not there: who reads it fails."""
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    write_preprocessed(tmp_path / "preprocessed")
    variables = {
        "nnUNet_raw": tmp_path, "nnUNet_preprocessed": tmp_path / "preprocessed", "nnUNet_results": tmp_path / "out",
        SITE_FILE_VARIABLE: tmp_path / "none.toml",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    study = Federation(name="s", sites=("a",), rounds=1, method={"name": "fedavg"})  # type: ignore[arg-type]
    return lambda: nnUNetTrainerFedAvg(tiny_plans(study), "2d", 0, DESCRIPTION, torch.device("cpu"))


@pytest.mark.parametrize(
    "act",
    [
        lambda trainer: trainer.run_training(),
        lambda trainer: trainer.load_checkpoint("none.pth"),  # what nnU-Net does first with --c and --val
        lambda trainer: trainer.perform_actual_validation(),
    ],
    ids=["start", "--c or --val", "validation"],
)
def test_a_second_start_is_refused_before_anything_is_read_or_sent(make: Callable[[], Any], act: Act) -> None:
    second = make()
    first = take(Path(second.output_folder) / LEASE, "")
    before = sorted(path.name for path in Path(second.output_folder).iterdir())
    with pytest.raises(SystemExit, match=r"^Error: Fold 0 is trained or validated already in .*: process \d+ on "):
        act(second)
    assert second.network is None
    after = [path.name for path in Path(second.output_folder).iterdir() if not path.name.startswith("training_log")]
    assert sorted(after) == [name for name in before if not name.startswith("training_log")]
    first.release()
    second._take_folder()
    second._leave_folder()


def test_what_another_machine_has_taken_over_ends_here(make: Callable[[], Any]) -> None:
    """A process that was suspended for longer than a lease does not write over the one that has gone on."""
    trainer = make()
    trainer._take_folder()
    path = Path(trainer.output_folder) / LEASE
    theirs = path.with_name("theirs")
    theirs.write_text(path.read_text().replace("host=", "host=other-"))
    theirs.replace(path)
    deadline = time.monotonic() + 30
    while trainer._lease.compromise is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(FederationError, match=r"^Another process trains in .* now"):
        trainer._require_folder()
    trainer._leave_folder()
    assert "host=other-" in path.read_text()


def test_another_rank_takes_nothing_and_is_refused_with_rank_0(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What :func:`from_rank_zero` does on other ranks, ``test_ranks.py`` tests in processes."""
    trainer = make()
    monkeypatch.setattr(one_process, "from_rank_zero", lambda function: None)
    trainer._take_folder()
    assert trainer._lease is None
    assert not (Path(trainer.output_folder) / LEASE).exists()

    def refuse(function: Callable[[], None]) -> None:
        raise ConfigurationError("told by rank 0")

    monkeypatch.setattr(one_process, "from_rank_zero", refuse)
    with pytest.raises(SystemExit, match="^Error: told by rank 0$"):
        make().run_training()
