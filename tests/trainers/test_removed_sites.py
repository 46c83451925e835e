"""A site is taken out of the study between any two collectives of a round: the others go on, as if alone from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from in_process import InProcess, LocalSession, same_arrays
from shrinking import ShrinkingCoordinator, ShrinkingThreads, When

from nnunet_fed.exchange.keys import MODEL, scope_of_round
from nnunet_fed.exchange.payload import Array
from nnunet_fed.methods.selector import SelectorCase, SelectorConfiguration
from nnunet_fed.methods.selector_training import SelectorTraining
from nnunet_fed.methods.server_optimizer import AdamMoments
from nnunet_fed.methods.tensors import shared_tensors, to_arrays
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods.fedadam_options import FedAdam
from nnunet_fed.study.methods.fedsm_options import FedSM
from nnunet_fed.trainers.nnUNetTrainerFedAdam import nnUNetTrainerFedAdam
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM
from nnunet_fed.trainers.parts.publishing import fetch_published

SITES = "abc"
ROUNDS = 2


def network(seed: int) -> torch.nn.Module:
    """The same from the same seed, and no draw from generators that all threads share."""
    drawn, made = torch.Generator().manual_seed(seed), torch.nn.Conv2d(2, 3, 3)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=drawn))
    return made


def train(trained: torch.nn.Module, site: str, number: int) -> None:
    """What stands for a round of training: it follows from the model, the site and the round."""
    noise = np.random.default_rng([number, *site.encode()])
    with torch.no_grad():
        for tensor in trained.parameters():
            tensor += torch.from_numpy(noise.normal(0, 0.1, tuple(tensor.shape)).astype(np.float32))


def made(trainer: type[Any], options: Any, communicator: Any) -> Any:
    """A trainer of which there is only what its exchange needs."""
    bare = object.__new__(trainer)
    bare.study = Federation.model_validate(
        {"name": "study", "sites": tuple(SITES), "method": {"name": trainer.method}, "rounds": ROUNDS}
    )
    bare.options, bare.communicator, bare._training_cases = options, communicator, 3 + ord(communicator.site) % 5
    bare.num_epochs, bare.local_rank, bare.disable_checkpointing = ROUNDS, 0, True
    bare.diagnostics, bare.output_folder, bare.initial_lr = {}, ".", 0.1
    bare.happened = lambda text: None
    return bare


def rounds_of_fedadam(communicator: Any) -> dict[str, Array]:
    """Two rounds of a site's; c begins the second without moments, so that they are published."""
    trainer = made(nnUNetTrainerFedAdam, FedAdam(name="fedadam"), communicator)
    trainer.network = network(0)
    trainer.moments = AdamMoments(0.9, 0.99, 1e-3)
    start = {name: array.copy() for name, array in trainer.shared_arrays().items()}
    trainer.moments.begin(start, list(start))
    trainer._round_start = start
    for number in range(ROUNDS):
        if number == 1 and communicator.site == "c":
            trainer.moments.begin(start, list(start))
        train(trainer.network, communicator.site, number)
        trainer.exchange(scope_of_round(number))
        trainer._round_start = {name: array.copy() for name, array in trainer.shared_arrays().items()}
    return {**trainer._round_start, **trainer.moments.tensors()}


def cases(site: str, count: int) -> list[SelectorCase]:
    generator = torch.Generator().manual_seed(ord(site))
    level = "abc".index(site)
    return [SelectorCase(level + 0.3 * torch.randn(2, 1, 8, 8, generator=generator)) for _ in range(count)]


class SelectorCases(list[SelectorCase]):
    names = ("x", "y")


def rounds_of_fedsm(communicator: Any) -> dict[str, Any]:
    """Two rounds of a site's; after the last one the super model is judged and shared."""
    trainer = made(nnUNetTrainerFedSM, FedSM(name="fedsm", selector_steps_per_round=2), communicator)
    site = communicator.site
    trainer.network = network(1)
    trainer._global = SimpleNamespace(network=network(2))
    trainer.optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    trainer.selector = SelectorTraining(SelectorConfiguration(1, 3, (8, 8)), seed=0)
    trainer._cases = {"training": SelectorCases(cases(site, 3)), "validation": SelectorCases(cases(site, 2))}
    for number in range(ROUNDS):
        trainer.current_epoch = number
        for model in (trainer.network, trainer.shared_network):
            train(model, site, number)
        trainer.exchange(scope_of_round(number))
    models = {"personal": trainer.network, "global": trainer.shared_network}
    tensors = {f"{what}/{name}": t for what, model in models.items() for name, t in shared_tensors(model).items()}
    tensors |= {f"selector/{name}": tensor for name, tensor in trainer.selector.state_dict().items()}
    return {**{name: array.copy() for name, array in to_arrays(tensors).items()}, "found": trainer.found.plain()}


METHODS: dict[str, Callable[[Any], dict[str, Any]]] = {"fedadam": rounds_of_fedadam, "fedsm": rounds_of_fedsm}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    said = [{name: value for name, value in of.items() if not isinstance(value, np.ndarray)} for of in (one, other)]
    tensors = [{name: value for name, value in of.items() if isinstance(value, np.ndarray)} for of in (one, other)]
    return said[0] == said[1] and same_arrays(*tensors)


def keys_of(method: str) -> list[str]:
    undisturbed = ShrinkingThreads(SITES)
    undisturbed.run_parts(METHODS[method])
    return undisturbed.keys


def test_the_rounds_have_all_collectives_of_their_methods() -> None:
    assert keys_of("fedadam") == [
        *(f"round-0000/{name}" for name in ("update", "moments", "model")),
        *(f"round-0001/{name}" for name in ("update", "moments", "state-0", "model")),
    ]
    every_round = [
        "personal-sites", "personal", "personal-deviation", "selector-0", "selector-1", "selector", "state"
    ]  # fmt: skip
    at_last = ["selector-temperature", "selector-validation", "texture-means", "texture-scatter", "texture-distances"]
    at_last += [f"personal-of-{site}" for site in SITES]
    assert keys_of("fedsm") == [
        *(f"round-0000/{name}" for name in (*every_round, "model")),
        *(f"round-0001/{name}" for name in (*every_round, *at_last, "model")),
    ]


@pytest.mark.parametrize("when", ["before it contributes", "after it has contributed"])
@pytest.mark.parametrize("removed", ["a", "b"])
@pytest.mark.parametrize("method", METHODS)
def test_a_site_that_is_removed_between_any_two_collectives(
    tmp_path: Path, method: str, removed: str, when: When
) -> None:
    """Site a publishes. The others have the numbers that they would have alone from that collective on."""
    keys = keys_of(method)
    for place, key in enumerate(keys):
        at = ShrinkingCoordinator(tmp_path / str(place), SITES, key, removed, when)
        found = at.run_parts(METHODS[method])
        expected = ShrinkingThreads(SITES, keys[:place], removed).run_parts(METHODS[method])
        assert found.keys() == expected.keys() == set(SITES) - {removed}, key
        for site, numbers in found.items():
            assert equal(numbers, expected[site]), (key, site)
        (run,) = at.coordinator.status(record=True)["runs"].values()
        for collective in run["collectives"]:
            assert (removed in collective["sites"]) == (collective["key"] in keys[:place]), collective["key"]
        last = at.coordinator.newest(at.run, MODEL)
        assert last in (f"round-0001/{MODEL}", f"round-0001/{MODEL}/1"), "a late site finds it"
        at.coordinator.close()


def test_what_the_next_source_has_published_is_found(tmp_path: Path) -> None:
    at = ShrinkingCoordinator(tmp_path, SITES, "round-0000/state", "a", "before it contributes")

    def part(seat: Any) -> Any:
        rounds_of_fedsm(seat)
        return fetch_published(seat, "round-0000/state", len(SITES))

    states = at.run_parts(part)
    assert set(states) == {"b", "c"}
    assert same_arrays(states["b"], states["c"])
    at.coordinator.close()


@pytest.mark.parametrize("now", ["ab", "abcd"])
def test_fedsm_goes_on_with_the_sites_of_the_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: str) -> None:
    """A site that joins again hears of names that have come or gone; the selector still tells the old ones apart."""

    class Edited(LocalSession):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            study = self.membership.study.model_copy(update={"sites": tuple(now)})
            self.membership = replace(self.membership, study=study)

    sites = InProcess(tmp_path, monkeypatch)
    monkeypatch.setattr("in_process.LocalSession", Edited)
    study = sites.study(method={"name": "fedsm"}, sites=("a", "b", "c"))
    trained = sites.train(nnUNetTrainerFedSM, study)
    for trainer in trained.values():
        assert trainer.operational.sites == tuple(now)
        assert trainer.found.selector.sites == ("a", "b", "c")
