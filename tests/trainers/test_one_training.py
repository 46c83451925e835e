"""A second start of the same training at a site is refused while the first lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import on_two_ranks
from tiny import DESCRIPTION, tiny_plans, write_preprocessed

from nnunet_fed import leases
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.leases import take
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import SITE_FILE_VARIABLE
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.parts.study_trainer import LEASE

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
    with pytest.raises(FederationError, match=r"^Another process trains in .* now"):
        while True:
            trainer._require_folder()
    trainer._leave_folder()
    assert "host=other-" in path.read_text()


class Starts:
    """As one rank: a training, and a second one while the first lives; for both, whether it holds the folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> list[tuple[bool, str]]:
        leases.BEAT_SECONDS = 0.1
        folder, found = self.folder, []

        class Rank(nnUNetTrainerFedAvg):
            def __init__(self) -> None:
                self.fold, self.output_folder, self._takes_folder, self._lease = 0, str(folder), True, None

        trainers = [Rank(), Rank()]
        for trainer in trainers:
            sentence = ""
            try:
                trainer._take_folder()
            except ConfigurationError as error:
                sentence = str(error)
            found.append((trainer._lease is not None, sentence))
        return found


def test_rank_0_takes_the_folder_and_all_ranks_are_refused_with_it(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    zero, one = on_two_ranks(Starts(tmp_path / "fold_0"), tmp_path / "ranks", 60)
    assert (zero[0], one[0]) == ((True, ""), (False, ""))
    assert zero[1] == one[1]
    assert zero[1][1].startswith("Fold 0 is trained or validated already")
    assert not (tmp_path / "fold_0" / LEASE).exists(), "it goes with its process"
