"""Which GPU each process of a simulation sees; none is needed, and no command is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_sites import raw
from serving import make_study

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.processes import Step
from nnunet_fed.simulation import simulate
from nnunet_fed.simulation.devices import cuda_devices, visible_devices
from nnunet_fed.simulation.simulate import Simulation


def steps(folder: Path, **settings: Any) -> dict[str, list[Step]]:
    sites = {name: raw(folder / "raw" / name, 6) for name in "abc"}
    study = make_study(tuple(sites), plans_name="P")
    given = Simulation(sites, folder / "out", study, **settings)
    return {place.name: simulate._steps(given, study, place) for place in simulate._places(given)}


@pytest.mark.parametrize(
    ("before", "expected"),
    [(None, ["0", "1", "0"]), ("3,5", ["3", "5", "3"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"] * 2)],
)
def test_sites_take_devices_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, expected: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    made = steps(tmp_path, device="cuda", devices=cuda_devices("cuda:0, cuda:1"))
    for name, visible in zip("abc", expected, strict=False):
        planning, training = made[name]
        assert training.command[-2:] == ["-device", "cuda"]
        assert [step.environment["CUDA_VISIBLE_DEVICES"] for step in (planning, training)] == [visible, visible]


@pytest.mark.parametrize(("device", "set_by_user", "expected"), [
    ("cpu", None, "0"), ("cpu", "2", "2"), ("cuda", None, None), ("cuda", "7", "7"), ("mps", None, None),
])  # fmt: skip
def test_only_on_the_cpu_augmentation_has_no_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, set_by_user: str | None, expected: str | None
) -> None:
    for name in ("nnUNet_n_proc_DA", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    if set_by_user is not None:
        monkeypatch.setenv("nnUNet_n_proc_DA", set_by_user)
    training = steps(tmp_path, device=device)["a"][1]
    assert training.environment.get("nnUNet_n_proc_DA") == expected
    assert "CUDA_VISIBLE_DEVICES" not in training.environment


def test_what_is_no_device() -> None:
    for text in ("", "cuda", "0,1", "cuda:0,", "cpu"):
        with pytest.raises(ConfigurationError, match="cuda:0,cuda:1"):
            cuda_devices(text)
    with pytest.raises(ConfigurationError, match="leaves 1 GPUs"):
        visible_devices("ab", [0, 1], {"CUDA_VISIBLE_DEVICES": "7"})
