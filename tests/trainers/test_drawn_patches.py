"""The selector's patches are drawn once, and are the same bits however they come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_fed.methods.selector import SelectorConfiguration
from nnunet_fed.trainers.fedsm import drawn_patches
from nnunet_fed.trainers.fedsm.drawn_patches import DrawnPatches

CONFIGURATION = SelectorConfiguration(channels=1, classes=2, patch_size=(4, 4))


class Draws:
    """Draws patches, and counts how often."""

    def __init__(self, scale: float = 1.0):
        self.patches = scale * torch.from_numpy(np.random.default_rng(0).normal(size=(2, 1, 4, 4)).astype(np.float32))
        self.number = 0

    def __call__(self) -> torch.Tensor:
        self.number += 1
        return self.patches


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    folder = tmp_path / "nnUNetPlans_2d"
    folder.mkdir()
    (folder / "one.b2nd").write_bytes(b"image")
    return folder


def kept(cases: Path) -> list[Path]:
    return sorted(cases.parent.glob("nnUNetPlans_2d_selector/*/*"))


def test_a_case_is_drawn_once_even_by_another_training(cases: Path) -> None:
    draws = Draws()
    first = [DrawnPatches(cases, CONFIGURATION).of("one", draws) for _ in range(3)]
    assert draws.number == 1
    assert all(patches.dtype == torch.float32 and torch.equal(patches, first[0]) for patches in first)
    assert torch.equal(first[0], draws.patches.half().float())
    assert [path.name for path in kept(cases)] == ["one.npz"]
    assert [path.name for path in cases.iterdir()] == ["one.b2nd"], "nnU-Net would take it for a case"


def test_a_case_that_was_preprocessed_again_is_drawn_again(cases: Path) -> None:
    draws = Draws()
    DrawnPatches(cases, CONFIGURATION).of("one", draws)
    (cases / "one.b2nd").write_bytes(b"another image")
    DrawnPatches(cases, CONFIGURATION).of("one", draws)
    assert draws.number == 2


def test_another_selector_has_patches_of_its_own(cases: Path) -> None:
    draws = Draws()
    DrawnPatches(cases, CONFIGURATION).of("one", draws)
    DrawnPatches(cases, SelectorConfiguration(channels=1, classes=2, patch_size=(4, 4), patches=3)).of("one", draws)
    assert draws.number == 2
    DrawnPatches(cases, SelectorConfiguration(channels=1, classes=5, patch_size=(4, 4))).of("one", draws)
    assert draws.number == 2, "how many sites there are does not matter"


def test_what_float16_cannot_hold_is_kept_in_float32(cases: Path) -> None:
    draws = Draws(scale=1e6)
    for _ in range(2):
        assert torch.equal(DrawnPatches(cases, CONFIGURATION).of("one", draws), draws.patches)
    assert draws.number == 1


@pytest.mark.parametrize("content", [b"", b"no archive", None])
def test_a_file_that_is_not_whole_is_drawn_again(cases: Path, content: bytes | None) -> None:
    draws = Draws()
    whole = DrawnPatches(cases, CONFIGURATION).of("one", draws)
    (path,) = kept(cases)
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    assert torch.equal(DrawnPatches(cases, CONFIGURATION).of("one", draws), whole)
    assert draws.number == 2


def test_the_disk_holds_no_more_than_is_said(cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_patches, "LARGEST_BYTES", 100)
    draws, store = Draws(), DrawnPatches(cases, CONFIGURATION)
    for case in ("one", "two", "one", "two"):
        store.of(case, draws)
    assert draws.number == 3
    DrawnPatches(cases, CONFIGURATION).of("two", draws)
    assert [path.name for path in kept(cases)] == ["one.npz"], "nor does another training add to it"


def test_without_a_place_to_write_it_is_drawn_each_time(cases: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases.with_name("nnUNetPlans_2d_selector").write_text("in the way")
    draws, store = Draws(), DrawnPatches(cases, CONFIGURATION)
    first = [store.of("one", draws) for _ in range(2)]
    assert draws.number == 2
    assert torch.equal(*first)
    assert caplog.text.count("drawn again") == 1
