"""Trainers that build on a base trainer which the study names. docs/base_trainers.md has the table of all of them.

BASE_TRAINERS=all python -m pytest tests/trainers/test_base_trainers.py    all methods and bases; writes the table
"""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_combinations import (
    BASES,
    TINY_PRIMUS,
    WITH_OPTIONS,
    Combination,
    differences,
    final_of,
    own_trainers,
    peer,
    study_of,
    trainer_of,
    try_out,
)
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from in_process import InProcess
from nnunetv2.training.lr_scheduler.warmup import Lin_incr_LRScheduler, PolyLRScheduler_offset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.communicator import LocalCommunicator, LocalFederation
from nnunet_fed.simulation.simulate import require_trainer
from nnunet_fed.trainers.nnUNetTrainerDitto import nnUNetTrainerDitto
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.nnUNetTrainerFedGS import nnUNetTrainerFedGS
from nnunet_fed.trainers.nnUNetTrainerFedSM import nnUNetTrainerFedSM
from nnunet_fed.trainers.parts import study_trainer
from nnunet_fed.trainers.parts.base_trainer import BASE_TRAINER, code_digest, compose
from nnunet_fed.trainers.parts.rounds import require_agreement
from nnunet_fed.trainers.parts.starting_anew import begin_anew

PAGE = Path(__file__).parents[2] / "docs" / "base_trainers.md"
ALL = os.environ.get("BASE_TRAINERS") == "all"
QUICK = [
    ("fedavg", "nnUNetTrainerBN"), ("fedgs", "nnUNetTrainerAdam"), ("fedoap", TINY_PRIMUS), ("fedsm", TINY_PRIMUS),
]  # fmt: skip
"""What is tried each time; the whole table takes minutes."""
COMBINATIONS = [(method, base) for method in WITH_OPTIONS for base in BASES] if ALL else QUICK

_tried: list[Combination] = []


@pytest.mark.parametrize(("method", "base"), COMBINATIONS)
def test_it_trains_resumes_and_predicts(
    method: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = try_out(method, base, tmp_path, monkeypatch)
    assert bool(found.refused) == ((method, base) == ("fedoap", TINY_PRIMUS)), found.refused
    _tried.append(found)


HEAD = "<!-- made by tests/trainers/test_base_trainers.py with BASE_TRAINERS=all -->"


def table() -> str:
    """What was found, a line for each method."""
    cells = {(one.method, one.base): one.cell for one in _tried}
    rows = [["method", *(f"`{base}`" for base in BASES)], ["---"] * (1 + len(BASES))]
    rows += [[method, *(cells[method, base] for base in BASES)] for method in WITH_OPTIONS]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_page_has_the_table() -> None:
    """Of every method: who adds one makes the table anew."""
    before, after = PAGE.read_text(encoding="utf-8").split(HEAD)
    found = re.match(r"\n((?:\|.*\n)+)", after)
    assert found is not None
    if ALL:
        assert len(_tried) == len(COMBINATIONS), "a combination failed"
        PAGE.write_text(f"{before}{HEAD}\n{table()}\n{after[found.end() :]}", encoding="utf-8")
        return
    first, _, *lines = found[1].splitlines()
    assert first == "| method | " + " | ".join(f"`{base}`" for base in BASES) + " |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == WITH_OPTIONS


# ---------------------------------------------------------------------------------------------------------- composition


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    own_trainers(tmp_path, monkeypatch)
    return InProcess(tmp_path, monkeypatch)


def made(sites: InProcess, base: str, method: str = "fedavg", **settings: Any) -> Any:
    return sites.make(trainer_of(method), study_of(method, base, **settings))["a"]


def test_without_a_name_the_class_is_the_one_that_nnunet_found(sites: InProcess) -> None:
    one = made(sites, "nnUNetTrainer")
    assert type(one) is nnUNetTrainerFedAvg
    assert one.base_trainer is nnUNetTrainer
    assert (one.initial_lr, one.study.momentum) == (0.01, 0.99)
    assert one.compared_of_base() == {}


def test_static_hooks_go_to_the_base_and_the_name_stays(sites: InProcess) -> None:
    one = made(sites, "nnUNetTrainerBN")
    assert type(one).__name__ == "nnUNetTrainerFedAvg"
    assert "/nnUNetTrainerFedAvg__nnUNetFedPlans__2d/" in one.output_folder
    assert one.base_trainer is nnUNetTrainerBN
    assert type(one).build_network_architecture is nnUNetTrainerBN.build_network_architecture
    one.initialize()
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in one.network.modules())


def test_the_augmentation_is_the_bases_and_repeatable(sites: InProcess) -> None:
    one = made(sites, "nnUNetTrainerDA5")
    given = ([16, 16], (-1.0, 1.0), None, (0, 1), False)
    theirs, ours = nnUNetTrainerDA5.get_training_transforms(*given), one.get_training_transforms(*given)
    assert [type(part) for part in ours.transforms] == [type(part) for part in theirs.transforms]
    for part in study_trainer._all_in(theirs):
        if isinstance(part, GaussianBlurTransform):
            part.benchmark = True
    blurs = [part for part in study_trainer._all_in(theirs) if isinstance(part, GaussianBlurTransform)]
    assert blurs, "also those of which one is chosen by chance"


def test_the_studys_budget_counts_and_the_log_says_so(sites: InProcess) -> None:
    one = made(sites, "nnUNetTrainer_100epochs")
    assert one.num_epochs == 2
    assert "whose own 100 epochs do not count: it is the study that decides, 2 epochs" in Path(one.log_file).read_text()


def test_the_studys_budget_counts_in_a_class_that_was_put_together_by_hand(sites: InProcess) -> None:
    class nnUNetTrainerFedAvgMine(nnUNetTrainerFedAvg):  # noqa: N801
        def __init__(self, plans: Any, configuration: Any, fold: Any, dataset_json: Any, device: Any):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs = 100

    one = sites.make(nnUNetTrainerFedAvgMine, study_of("fedavg", "nnUNetTrainer"))["a"]
    one.initialize()
    assert one.num_epochs == 2


def test_the_bases_learning_rate_unless_the_study_says_one(sites: InProcess) -> None:
    assert made(sites, "nnUNetTrainerAdam3en4").initial_lr == 3e-4
    assert made(sites, "nnUNetTrainerAdam3en4", initial_lr=0.5).initial_lr == 0.5


def test_the_bases_momentum_unless_the_study_says_one(sites: InProcess) -> None:
    for settings, momentum in ({}, 0.99), ({"momentum": 0.5}, 0.5):
        one = made(sites, "nnUNetTrainerDA5", **settings)
        one.initialize()
        assert one.optimizer.param_groups[0]["momentum"] == momentum
    with pytest.raises(SystemExit, match="momentum = 0.5, but AdamW, .* of 'nnUNetTrainerAdam', has none"):
        made(sites, "nnUNetTrainerAdam", momentum=0.5).initialize()


def test_a_hand_made_class_is_predicted_as_what_builds_its_network(sites: InProcess) -> None:
    class nnUNetTrainerFedAvgBN(nnUNetTrainerFedAvg, nnUNetTrainerBN):  # noqa: N801
        pass

    class nnUNetTrainerBNFedAvg(nnUNetTrainerBN, nnUNetTrainerFedAvg):  # noqa: N801
        pass

    for trainer in (nnUNetTrainerFedAvgBN, nnUNetTrainerBNFedAvg):
        trained = sites.train(trainer, study_of("fedavg", "nnUNetTrainer"))
        assert final_of(trained["a"])["trainer_name"] == "nnUNetTrainerBN"


def test_a_composed_class_is_one_class_and_composing_again_changes_nothing() -> None:
    one = compose(nnUNetTrainerFedAvg, nnUNetTrainerDA5)
    assert compose(nnUNetTrainerFedAvg, nnUNetTrainerDA5) is one
    assert compose(one, nnUNetTrainerDA5) is one
    assert compose(nnUNetTrainerFedAvg, nnUNetTrainer) is nnUNetTrainerFedAvg


def test_what_the_training_hands_to_other_processes_knows_no_composed_class(sites: InProcess) -> None:
    """Where nnU-Net spawns: augmentation workers, the export of predictions; the ranks look the class up by name."""
    one = made(sites, "nnUNetTrainerDA5")
    one.initialize()
    sites._here.site = "a"
    loaders = one.get_tr_and_val_datasets(), one.get_training_transforms([16, 16], (-1.0, 1.0), None, (0, 1), False)
    assert pickle.loads(pickle.dumps(loaders))
    assert pickle.loads(pickle.dumps((one.configuration_manager, one.plans_manager)))


# ----------------------------------------------------------------------------------------- other optimizers, warming up


def rates(one: Any) -> list[float]:
    log: list[float] = one.logger.get_checkpoint()["lrs"]
    return log


WARM_UP = """
import torch
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup


class nnUNetTrainerShortWarmUp(nnUNetTrainer_warmup):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.warmup_duration_whole_net = 2
"""
NEW_OPTIMIZER = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerStaged(nnUNetTrainer):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.optimizer, self.lr_scheduler = self.configure_optimizers()
        super().on_train_epoch_start()
"""


LOSS_OF_ITS_OWN = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerOwnLoss(nnUNetTrainer):
    def train_step(self, batch):
        self.optimizer.zero_grad()
        loss = self.network(batch["data"])[0].square().mean()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}
"""


def test_gcml_refuses_a_trainer_that_it_cannot_teach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_trainers(tmp_path, monkeypatch, nnUNetTrainerOwnLoss=LOSS_OF_ITS_OWN)
    sites = InProcess(tmp_path, monkeypatch)
    peer(monkeypatch)
    one = sites.make(trainer_of("gcml"), study_of("gcml", "nnUNetTrainerOwnLoss"))["a"]
    with pytest.raises(SystemExit, match="'nnUNetTrainerOwnLoss' does not call its loss"):
        sites.run({"a": one})


@pytest.fixture
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    own_trainers(tmp_path, monkeypatch, nnUNetTrainerShortWarmUp=WARM_UP, nnUNetTrainerStaged=NEW_OPTIMIZER)
    return InProcess(tmp_path, monkeypatch)


@pytest.mark.parametrize("trainer", [nnUNetTrainerFedSM, nnUNetTrainerDitto])
def test_a_second_model_has_an_optimizer_of_its_own_and_the_same_learning_rate(
    warm: InProcess, trainer: type[Any]
) -> None:
    seen: dict[int, tuple[float, float]] = {}

    def watched(one: Any) -> Any:
        step = one.train_step

        def stepping(batch: Any) -> Any:
            seen[one.current_epoch] = (
                one.optimizer.param_groups[0]["lr"], one._global.optimizer.param_groups[0]["lr"]
            )  # fmt: skip
            return step(batch)

        one.train_step = stepping
        return one

    trainers = warm.make(trainer, study_of(trainer.method, "nnUNetTrainerShortWarmUp", rounds=4, initial_lr=0.05))
    watched(trainers["a"])
    warm.run(trainers)
    one = trainers["a"]
    own = {id(tensor) for group in one.optimizer.param_groups for tensor in group["params"]}
    theirs = {id(tensor) for group in one._global.optimizer.param_groups for tensor in group["params"]}
    assert own == {id(tensor) for tensor in one.network.parameters()}
    assert theirs == {id(tensor) for tensor in one._global.network.parameters()}
    expected = [0.025, 0.05, 0.05, 0.05 * 0.5**0.9]
    assert [pair[0] for pair in seen.values()] == pytest.approx(expected)
    assert all(own == other for own, other in seen.values())


def test_a_site_that_skips_the_end_of_the_warm_up_has_the_others_learning_rate(warm: InProcess) -> None:
    one = made(warm, "nnUNetTrainerShortWarmUp", rounds=8, initial_lr=0.05)
    one.initialize()
    first = one.optimizer
    for epoch, schedule in (0, Lin_incr_LRScheduler), (5, PolyLRScheduler_offset), (6, PolyLRScheduler_offset):
        one.current_epoch = epoch
        one.logger.get_checkpoint()["lrs"][:] = [0.0] * epoch
        one.on_train_epoch_start()
        assert type(one.lr_scheduler) is schedule
    assert one.optimizer is first
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * (1 - 4 / 6) ** 0.9)


def test_a_site_that_starts_anew_has_a_new_optimizer(warm: InProcess) -> None:
    one = made(warm, "nnUNetTrainerShortWarmUp")
    one.initialize()
    before = one.optimizer
    begin_anew(one)
    assert one.optimizer is not before
    assert {id(tensor) for tensor in one.optimizer.param_groups[0]["params"]} == set(map(id, one.network.parameters()))


def test_the_fine_tuning_follows_the_bases_schedule(warm: InProcess) -> None:
    method = {"name": "fedavg", "finetune_epochs": 2, "finetune_lr_factor": 0.5}
    trained = warm.train(
        nnUNetTrainerFedAvg,
        study_of("fedavg", "nnUNetTrainerShortWarmUp", rounds=4, initial_lr=0.05, method=method),
    )
    rounds = [0.025, 0.05, 0.05, 0.05 * 0.5**0.9]
    assert rates(trained["a"]) == pytest.approx([*rounds, 0.025, 0.025 * 0.5**0.9])


def test_resuming_after_the_warm_up_gives_the_same_bits(warm: InProcess) -> None:
    study = study_of("fedavg", "nnUNetTrainerShortWarmUp", rounds=4)
    calm = warm.train(nnUNetTrainerFedAvg, study)
    for site, one in warm.train_killed(nnUNetTrainerFedAvg, study, "round-0003/model").items():
        assert differences(final_of(one), final_of(calm[site])) == []


@pytest.mark.parametrize("method", ["fedprox", "ditto", "fedgs", "fedsm"])
def test_an_optimizer_that_takes_the_place_of_the_one_that_is_watched_is_refused(warm: InProcess, method: str) -> None:
    trainers = warm.make(trainer_of(method), study_of(method, "nnUNetTrainerStaged"))
    with pytest.raises(SystemExit, match="'nnUNetTrainerStaged' takes a new optimizer in epoch 1, which"):
        warm.run(trainers)


def test_an_optimizer_that_nobody_watches_may_be_replaced(warm: InProcess) -> None:
    trained = warm.train(nnUNetTrainerFedAvg, study_of("fedavg", "nnUNetTrainerStaged"))
    assert all(one.current_epoch == 2 for one in trained.values())


def test_momentum_on_round_resets_any_optimizer(warm: InProcess) -> None:
    for kept, expected in (("keep", {4.0}), ("reset", set())):
        study = study_of("fedavg", "nnUNetTrainerAdam", momentum_on_round=kept)
        one = warm.train(nnUNetTrainerFedAvg, study)["a"]
        assert {float(state["step"]) for state in one.optimizer.state.values()} == expected


def test_fedgs_accumulates_the_steps_of_any_optimizer(warm: InProcess) -> None:
    study = study_of("fedgs", "nnUNetTrainerAdam", rounds=1)
    for site, one in warm.train(nnUNetTrainerFedGS, study).items():
        assert one.diagnostics["scaled_share"] > 0
        start, sent = warm.rooms.means["start/model"], warm.rooms.sent["round-0000/model", site]
        assert any(not np.array_equal(start[name], sent[name]) for name in start)


# ------------------------------------------------------------------------------------------------------------ bad input

MINE = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerMine(nnUNetTrainer):
    pass


class NoTrainer:
    pass
"""
TWO_D_ONLY = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerBroken(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        raise ValueError("only volumes")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_trainers(tmp_path, monkeypatch, nnUNetTrainerMine=MINE, nnUNetTrainerBroken=TWO_D_ONLY)


@pytest.mark.parametrize(
    ("base", "sentence"),
    [
        ("nnUNetTrainerThatIsNot", r"names the trainer 'nnUNetTrainerThatIsNot', and there is none here: neither in "
         r"nnunetv2 2\.\S+ \(.*nnUNetTrainer\) nor in the folders of nnUNet_extTrainer \(.*own_trainers\)"),
        ("NoTrainer", "'NoTrainer' is no trainer of nnU-Net: it is not derived from nnUNetTrainer"),
        ("nnUNetTrainerFedProx", "'nnUNetTrainerFedProx', which is federated itself"),
        ("AbstractPrimus", "'AbstractPrimus', which builds no network"),
        ("nnUNetTrainerBenchmark_5epochs", "measures nnU-Net's speed and keeps no checkpoint"),
    ],
)  # fmt: skip
def test_a_base_that_is_none(own: Path, base: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence) as told:
        require_trainer(study_of("fedavg", base))
    assert "\n" not in str(told.value)


def test_a_base_that_is_none_ends_a_training_in_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Path
) -> None:
    with pytest.raises(SystemExit, match="Error: .* names the trainer 'nnUNetTrainerThatIsNot'"):
        made(InProcess(tmp_path, monkeypatch), "nnUNetTrainerThatIsNot")


def test_a_file_that_cannot_be_imported(own: Path) -> None:
    (own / "nnUNetTrainerMine.py").write_text("class nnUNetTrainerMine(", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"'nnUNetTrainerMine' .* ended in SyntaxError"):
        require_trainer(study_of("fedavg", "nnUNetTrainerMine"))


def test_a_base_that_does_not_go_with_the_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Path) -> None:
    sites = InProcess(tmp_path, monkeypatch)
    trainers = sites.make(nnUNetTrainerFedAvg, study_of("fedavg", "nnUNetTrainerBroken"))
    with pytest.raises(SystemExit, match="'nnUNetTrainerBroken', .* cannot train .* 2d .*: ValueError: only volumes"):
        sites.run(trainers)
    assert sites.rooms.sent == {}, "before anything is sent"


def test_fedoap_with_primus_is_refused_before_there_are_plans(own: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"FedOAP does not go with .* 'nnUNetTrainerTinyPrimus': .* U-Net"):
        require_trainer(study_of("fedoap", TINY_PRIMUS))


def test_the_sites_compare_the_file_of_the_base(own: Path) -> None:
    study = study_of("fedavg", "nnUNetTrainerMine")
    before = require_trainer(study)
    assert before is not None
    assert before.startswith("nnUNetTrainerMine ")
    file = own / "nnUNetTrainerMine.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert require_trainer(study) == before, "ends of lines do not count"
    file.write_text(MINE.replace("    pass", "    weight_decay = 0", 1), encoding="utf-8")
    assert require_trainer(study) != before
    assert require_trainer(study_of("fedavg", "nnUNetTrainer")) is None


def test_bases_that_differ_are_told_when_the_training_starts() -> None:
    digests = {"a": code_digest(nnUNetTrainerDA5), "b": "0" * 64}

    def check(seat: LocalCommunicator) -> str:
        with pytest.raises(Exception, match="The sites differ in their base trainer") as told:
            require_agreement(seat, "start", {BASE_TRAINER: digests[seat.site]})
        return str(told.value)

    for sentence in LocalFederation("ab").run(check).values():
        assert sentence.endswith(
            "Put the same file of it into nnUNet_extTrainer, or install the same nnunetv2, at all sites."
        )
