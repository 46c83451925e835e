"""More rounds after the end: every method goes on with all that it had, its personal states included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from at_coordinator import AtCoordinator

from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.trainers.parts.more_rounds import MoreRoundsTrainer
from nnunet_fed.trainers.plugin import nnunet_fed_trainers

OPTIONS: dict[str, dict[str, Any]] = {
    "fedgs": {"threshold": 1.5, "log_base": 2.0, "variant": "fedgs_norm"},
    "fedoap": {"finetune_epochs": 1},
    "fedsm": {"selector_patches": 2, "best_model_gate": False},
}
AT_A_COORDINATOR = [name for name in METHODS if name not in ("custom", "gcml")]
ROUNDS, MORE = 2, 2


def trainer_of(method: str) -> type[Any]:
    trainer: type[Any] = getattr(nnunet_fed_trainers, METHODS[method].own_trainer())
    return trainer


class Started:
    """Notes with what each site's first epoch of a command begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, trainer: type[Any]):
        self.states: dict[str, dict[str, Any]] = {}
        start = trainer.on_train_start

        def noted(one: Any) -> None:
            start(one)
            # as the checkpoint holds it, which is a copy
            path = Path(one.output_folder) / "started.pth"
            one.save_at_epoch_start(path.name)
            self.states[one.own_site().name] = torch.load(path, map_location="cpu", weights_only=False)

        monkeypatch.setattr(trainer, "on_train_start", noted)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other or one != one)


def loaded(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return content


@pytest.mark.parametrize("method", AT_A_COORDINATOR)
def test_every_method_goes_on_with_what_it_had(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites, trainer = AtCoordinator(tmp_path, monkeypatch), trainer_of(method)
    options = {"name": method, **OPTIONS.get(method, {})}
    study = sites.study(rounds=ROUNDS, method=options)
    sites.go(trainer, study)
    fine_tuned = study.method.fine_tuning
    name = f"checkpoint_{METHODS[method].LAST_MODEL if fine_tuned else 'final'}.pth"
    ended = {site: loaded(sites.results(site) / name) for site in sites.cases}
    more = Federation.model_validate({**study.model_dump(mode="json"), "more_rounds": MORE})
    with monkeypatch.context() as patch:
        started = Started(patch, trainer)
        record = sites.go(trainer, study, more, continues=True)
    for site, before in ended.items():
        begun = started.states[site]
        assert begun["current_epoch"] == ROUNDS
        for what in ("network_weights", "optimizer_state", "logging"):
            assert equal(begun[what], before[what]), what
        assert equal(begun["federation"]["method"], before["federation"]["method"])
        folder = sites.results(site)
        assert equal(loaded(folder / f"after_{ROUNDS}_rounds" / name)["network_weights"], before["network_weights"])
        final, total = loaded(folder / "checkpoint_final.pth"), ROUNDS + MORE
        assert {len(values) for values in final["logging"].values()} == {total + fine_tuned}
        rates = [0.05 * (1 - epoch / total) ** 0.9 for epoch in range(ROUNDS, total)]
        assert final["logging"]["lrs"][ROUNDS:total] == pytest.approx(rates), "nnU-Net's, of all epochs"
        if METHODS[method].EXCHANGES:
            assert [entry["scope"] for entry in sites.record(site)["rounds"]] == [
                f"round-{number:04d}" for number in range(total)
            ]
        assert (folder / "checkpoint_best.pth").is_file()
    last = [loaded(sites.results(site) / f"checkpoint_{METHODS[method].LAST_MODEL}.pth") for site in sites.cases]
    if METHODS[method].EXCHANGES and method != "fedoap":
        assert equal(*(one["network_weights"] for one in last)), "the sites have one model again"
    assert record["study"]["more_rounds"] == MORE
    assert "undone" not in " ".join(event["text"] for event in record["events"])
