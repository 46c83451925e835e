"""GCML in nnU-Net's own training loop, with a postman in the place of the peer process. Numbers: the notes' (6)."""

from __future__ import annotations

import copy
import errno
import gc
import itertools
import json
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise import gaussian_blur
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from postman import Postman, deliver
from pydantic import ValidationError
from serving import Served, make_study
from tiny import DATASET, DESCRIPTION, tiny_cascade, tiny_plans, write_preprocessed

from nnunet_fed import leases
from nnunet_fed.exchange.payload import Array, encode, measure
from nnunet_fed.gossip.mailbox import Letter, Mailbox, State
from nnunet_fed.gossip.schedule import Version
from nnunet_fed.methods.gcml import Plan, divergence
from nnunet_fed.methods.tensors import digest_of_tensors, load_arrays, shared_tensors, to_arrays
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import SITE_FILE_VARIABLE
from nnunet_fed.trainers.gossip import mutual_phase
from nnunet_fed.trainers.gossip.gossip_session import Standing
from nnunet_fed.trainers.gossip.mutual_learning import PLAN_VARIABLE
from nnunet_fed.trainers.gossip.patch_dice import foreground_dice
from nnunet_fed.trainers.gossip.peer_model import with_non_finite_replaced
from nnunet_fed.trainers.nnUNetTrainerGCML import nnUNetTrainerGCML
from nnunet_fed.trainers.parts import checkpoint
from nnunet_fed.trainers.parts.study_trainer import SKIP_VALIDATION_VARIABLE

PLANS = pytest.mark.parametrize("plan", get_args(Plan))
STEPS, EPOCHS = 3, 4
CPU = torch.device("cpu")
Weights = dict[str, Array]


def study(rounds: int = EPOCHS, **options: Any) -> Federation:
    method = {"name": "gcml", "topology": "ring", "ramp_steps": 2, **options}
    return make_study(
        method=method, rounds=rounds, iterations_per_epoch=STEPS, val_iterations_per_epoch=2, initial_lr=0.05,
        momentum=0.9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "preprocessed"
    write_preprocessed(folder)
    return folder


def site_file(name: str, peers: str = '{ a = "127.0.0.1:2", b = "127.0.0.1:3" }') -> str:
    own = f'name = "{name}"\ncoordinator = "127.0.0.1:1"\ninsecure = true\n'
    return own + (f'listen = "127.0.0.1:2"\npeers = {peers}\n' if peers else "")


@pytest.fixture
def postman(preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Postman:
    site = tmp_path / "site.toml"
    site.write_text(site_file("a"))
    variables = {
        "nnUNet_raw": tmp_path, "nnUNet_preprocessed": preprocessed, "nnUNet_results": tmp_path / "results",
        "nnUNet_n_proc_DA": 0, SITE_FILE_VARIABLE: site, SKIP_VALIDATION_VARIABLE: 1,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    for name in ("plot_network_architecture", "print_plans"):
        monkeypatch.setattr(nnUNetTrainer, name, lambda trainer: None)
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda logger, folder: None)
    postman = Postman()
    monkeypatch.setattr(nnUNetTrainerGCML, "start_peer", lambda trainer: postman(trainer))
    return postman


def make(wanted: Federation) -> Any:
    return nnUNetTrainerGCML(tiny_plans(wanted), "2d", 0, DESCRIPTION, CPU)


def train(wanted: Federation) -> Any:
    trainer = make(wanted)
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer


def stopwatch(later_is_faster: bool) -> Callable[[], float]:
    """For nnU-Net's blur, which first measures the direct way, then Fourier's, and takes the faster one."""
    looks = itertools.count()
    return lambda: next(looks) ** (0.5 if later_is_faster else 2)


def plain(monkeypatch: pytest.MonkeyPatch, rounds: int = EPOCHS) -> Any:
    """nnU-Net's own trainer with the study's settings."""
    configure = nnUNetTrainer.configure_optimizers

    def with_momentum(trainer: Any) -> Any:
        optimizer, schedule = configure(trainer)
        optimizer.param_groups[0]["momentum"] = 0.9
        return optimizer, schedule

    with monkeypatch.context() as patch:
        patch.setattr(nnUNetTrainer, "configure_optimizers", with_momentum)
        patch.setattr(gaussian_blur, "time", stopwatch(later_is_faster=False))
        trainer = nnUNetTrainer(tiny_plans(), "2d", 0, DESCRIPTION, CPU)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = rounds, STEPS, 2
        trainer.initial_lr = 0.05
        checkpoint.seed_everything(0)
        trainer.run_training()
    return trainer


def weights(trainer: Any) -> Weights:
    return {name: array.copy() for name, array in to_arrays(shared_tensors(trainer.network)).items()}


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def differences(one: Any, other: Any) -> list[str]:
    """What two trainings do not have in common, bit for bit, of weights, momenta and their course."""
    momenta = [trainer.optimizer.state_dict()["state"] for trainer in (one, other)]
    logs = [trainer.logger.get_checkpoint() for trainer in (one, other)]
    tensors = [
        {**weights(trainer), **{f"momentum {i}": of["momentum_buffer"].numpy() for i, of in momentum.items()}}
        for trainer, momentum in zip((one, other), momenta, strict=True)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    names = ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs")
    return [
        *(name for name in tensors[0] if not np.array_equal(tensors[0][name], tensors[1][name])),
        *(
            f"{name}: {logs[0][name]}, {logs[1][name]}"
            for name in names
            if not np.array_equal(logs[0][name], logs[1][name])
        ),
    ]


def foreign(seed: int = 7, channels: int = 1) -> Weights:
    """Weights of another network of the same kind."""
    torch.manual_seed(seed)
    manager = PlansManager(tiny_plans())
    network = nnUNetTrainer.build_network_architecture(manager, manager.get_configuration("2d"), channels, 3)
    return {name: array.copy() for name, array in to_arrays(shared_tensors(network)).items()}


def brings(postman: Postman, arrays: Weights, **changes: Any) -> None:
    postman.bring = lambda mailbox, state: deliver(mailbox, state, arrays, 1, 1, **changes)


def record(trainer: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(trainer.output_folder) / "federation.json").read_text())
    return content


# ------------------------------------------------------------------------------------------------------ without a peer


def test_12_without_a_peer_the_training_is_nnunets_bit_for_bit(
    postman: Postman, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train(study(keep="best"))
    assert differences(alone, plain(monkeypatch)) == []
    assert [(letter.version.counter, letter.version.epoch) for letter, _ in postman.posted] == [
        (number, number) for number in range(1, EPOCHS + 1)
    ]
    assert all(candidates == ("b",) for _, candidates in postman.posted)
    assert postman.mailbox is not None
    state = postman.mailbox.state()
    assert state is not None
    assert state.leaving
    final = torch.load(Path(alone.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert final["trainer_name"] == "nnUNetTrainer"
    assert record(alone)["mutual_phases"] == []


def test_what_is_posted_is_the_model_of_the_round_and_nothing_leaves_in_the_warm_up(postman: Postman) -> None:
    trainer = train(study(warm_up_epochs=3))
    assert [letter.version.epoch for letter, _ in postman.posted] == [3, 4]
    last = postman.posted[-1][0]
    assert last.digest == measure(encode(weights(trainer)))[0]
    assert last.training_cases == 4
    assert last.initial == trainer._standing.initial != digest_of_tensors(trainer.shared())


def test_rounds_of_several_epochs_are_as_many_occasions(postman: Postman) -> None:
    wanted = study(rounds=2)
    train(wanted.model_copy(update={"local_epochs": 2}))
    assert [letter.version.epoch for letter, _ in postman.posted] == [2, 4]


def test_a_16_bit_wire_halves_what_is_posted(postman: Postman) -> None:
    wanted = study(rounds=2)
    train(wanted)
    full = postman.posted[0][0].size
    train(wanted.model_copy(update={"wire_dtype": "bfloat16"}))
    assert postman.posted[-1][0].size < 0.7 * full


def test_a_full_disk_costs_the_site_nothing_but_the_post(postman: Postman, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(mailbox: Mailbox, **facts: Any) -> Letter:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Mailbox, "post", full)
    trainer = train(study())
    monkeypatch.undo()
    assert trainer.current_epoch == EPOCHS
    assert "No space left" in record(trainer)["events"][0]["text"]


def test_each_site_starts_from_its_own_weights_only_if_the_study_says_so(
    postman: Postman, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(site: str, **options: Any) -> Weights:
        path = tmp_path / f"{site}.toml"
        path.write_text(site_file(site))
        monkeypatch.setenv(SITE_FILE_VARIABLE, str(path))
        trainer = make(study(**options))
        trainer.initialize()
        return weights(trainer)

    assert equal(start("a"), start("b"))
    assert not equal(start("a", common_init=False), start("b", common_init=False))
    assert equal(start("a", common_init=False), start("a", common_init=False))


# --------------------------------------------------------------------------------------------------------- with a peer


@PLANS
def test_13_with_weight_0_the_own_model_trains_as_if_alone(
    postman: Postman, monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, plan)
    brings(postman, foreign())
    trainer = train(study(mutual_weight=0.0, mutual_epochs=2))
    assert differences(trainer, plain(monkeypatch)) == []
    (phase,) = trainer._standing.phases
    assert (phase["from"], phase["began"], phase["ended"], phase["plan"], phase["kept"]) == ("b", 1, 2, plan, "local")


@PLANS
def test_14_a_copy_with_the_same_momentum_changes_nothing(
    postman: Postman, monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, plan)
    begin = nnUNetTrainerGCML._begin_phase
    ended: list[tuple[Weights, Weights]] = []

    def begin_with_own(trainer: Any, letter: Letter, payload: Path) -> None:
        begin(trainer, letter, payload)
        load_arrays(shared_tensors(trainer._peer_model.network), to_arrays(shared_tensors(trainer.network)))
        trainer._peer_model.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))

    end = nnUNetTrainerGCML._keep_one

    def compare(trainer: Any, peer_model: Any) -> None:
        ended.append((weights(trainer), to_arrays(shared_tensors(peer_model.network))))
        end(trainer, peer_model)

    monkeypatch.setattr(nnUNetTrainerGCML, "_begin_phase", begin_with_own)
    monkeypatch.setattr(nnUNetTrainerGCML, "_keep_one", compare)
    brings(postman, foreign())
    trainer = train(study(mutual_epochs=2, ramp_steps=0))
    assert equal(*ended[0])
    assert equal(weights(trainer), weights(plain(monkeypatch)))


def test_15_both_plans_train_the_same_models(postman: Postman, monkeypatch: pytest.MonkeyPatch) -> None:
    brings(postman, foreign())
    ends = []
    for plan in get_args(Plan):
        monkeypatch.setenv(PLAN_VARIABLE, plan)
        ends.append(weights(train(study())))
    assert not equal(ends[0], weights(plain(monkeypatch))), "the peer is felt"
    assert all(np.abs(ends[0][name] - ends[1][name]).max() < 1e-4 for name in ends[0])


def test_17_the_incoming_model_has_the_sites_learning_rate_and_a_fresh_optimizer(
    postman: Postman, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float, int]] = []
    step = nnUNetTrainerGCML.train_step

    def look(trainer: Any, batch: Any) -> Any:
        if trainer._peer_model is not None:
            rates = [
                optimizer.param_groups[0]["lr"] for optimizer in (trainer.optimizer, trainer._peer_model.optimizer)
            ]
            assert trainer._peer_model.optimizer.param_groups[0]["momentum"] == 0.9
            seen.append((*rates, len(trainer._peer_model.optimizer.state)))  # type: ignore[arg-type]
        return step(trainer, batch)

    monkeypatch.setattr(nnUNetTrainerGCML, "train_step", look)
    brings(postman, foreign())
    train(study(mutual_epochs=2))
    assert len(seen) == 2 * STEPS
    assert all(own == theirs for own, theirs, _ in seen)
    assert seen[0][0] != seen[-1][0]
    assert seen[0][2] == 0
    assert all(momenta > 0 for *_, momenta in seen[1:])


@PLANS
def test_17_an_overflow_in_one_model_skips_its_step_and_not_the_others(
    postman: Postman, monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    scaler, step = torch.amp.GradScaler, nnUNetTrainerGCML.train_step
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler("cpu", init_scale=64.0))
    seen: list[tuple[str, dict[str, bool], dict[str, float]]] = []

    def overflowing(trainer: Any, batch: Any) -> Any:
        if trainer._peer_model is None or len(seen) == 3:
            return step(trainer, batch)
        networks = {"own": trainer.network, "theirs": trainer._peer_model.network}
        before = {name: copy.deepcopy(network.state_dict()) for name, network in networks.items()}
        victim = ("nobody", "theirs", "own")[len(seen)]
        hooks = [
            next(network.parameters()).register_hook(lambda gradient: gradient * torch.inf)
            for name, network in networks.items()
            if name == victim
        ]
        result = step(trainer, batch)
        for hook in hooks:
            hook.remove()
        stepped = {
            name: any(not torch.equal(tensor, before[name][key]) for key, tensor in network.state_dict().items())
            for name, network in networks.items()
        }
        scales = {"own": trainer.grad_scaler.get_scale(), "theirs": trainer._peer_model.grad_scaler.get_scale()}
        seen.append((victim, stepped, scales))
        return result

    monkeypatch.setattr(nnUNetTrainerGCML, "train_step", overflowing)
    monkeypatch.setenv(PLAN_VARIABLE, plan)
    brings(postman, foreign())
    trainer = make(study(mutual_epochs=2))
    trainer.grad_scaler = torch.amp.GradScaler("cuda")
    trainer.run_training()
    assert seen == [
        ("nobody", {"own": True, "theirs": True}, {"own": 64.0, "theirs": 64.0}),
        ("theirs", {"own": True, "theirs": False}, {"own": 64.0, "theirs": 32.0}),
        ("own", {"own": False, "theirs": True}, {"own": 32.0, "theirs": 32.0}),
    ]


def test_18_nothing_of_a_peer_outlives_its_phase(postman: Postman, monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[Any] = []
    end = nnUNetTrainerGCML._keep_one

    def note(trainer: Any, peer_model: Any) -> None:
        networks.append(weakref.ref(peer_model.network))
        end(trainer, peer_model)

    def is_free(device: torch.device) -> None:
        gc.collect()
        freed.append([network() for network in networks] == [None])

    freed: list[bool] = []
    monkeypatch.setattr(nnUNetTrainerGCML, "_keep_one", note)
    monkeypatch.setattr(mutual_phase, "empty_cache", is_free)
    brings(postman, foreign())
    trainer = train(study())
    assert freed == [True], "what is still held is no free memory of the device"
    assert trainer._peer_model is None
    assert trainer.method_state()["incoming"] is None
    assert postman.mailbox is not None
    assert postman.mailbox.taken() is None


@pytest.mark.parametrize("defect", ["not finite", "other run", "other tensors", "too far", "other start"])
def test_a_model_that_does_not_fit_is_not_trained_with(
    postman: Postman, monkeypatch: pytest.MonkeyPatch, defect: str
) -> None:
    arrays, changes = foreign(), {}
    if defect == "not finite":
        next(iter(arrays.values())).flat[0] = np.nan
    if defect == "other run":
        changes["run"] = "another"
    if defect == "other tensors":
        arrays.popitem()
    if defect == "other start":
        changes["initial"] = "another"
    epoch = 200 if defect == "too far" else 1
    postman.bring = lambda mailbox, state: deliver(mailbox, state, arrays, 1, epoch, **changes)
    trainer = train(study(keep="merge"))
    assert differences(trainer, plain(monkeypatch)) == []
    assert trainer._standing.phases == []
    if defect == "not finite":
        assert trainer._standing.received == {"b": 1}
        assert any("not finite" in event["text"] for event in record(trainer)["events"])


def test_an_incoming_model_that_diverges_teaches_nothing() -> None:
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 4)
    teacher[0] = torch.nan
    taught = with_non_finite_replaced([teacher, teacher], [student])[0]
    divergence(taught, student, softmax=True).sum().backward()
    assert student.grad is not None
    assert torch.count_nonzero(student.grad[0]) == 0
    assert student.grad[1].isfinite().all()
    assert torch.count_nonzero(student.grad[1]) > 0


# ------------------------------------------------------------------------------------------------- which model is kept


def test_merged_is_the_mean_of_both_and_the_momentum_starts_anew(
    postman: Postman, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = nnUNetTrainerGCML._keep_one
    seen: list[Weights] = []

    def look(trainer: Any, peer_model: Any) -> None:
        own, theirs = weights(trainer), to_arrays(shared_tensors(peer_model.network))
        end(trainer, peer_model)
        assert all(
            np.allclose(array, 0.75 * own[name] + 0.25 * theirs[name], atol=1e-6)
            for name, array in weights(trainer).items()
        )
        assert len(trainer.optimizer.state) == 0
        seen.append(own)

    monkeypatch.setattr(nnUNetTrainerGCML, "_keep_one", look)
    brings(postman, foreign())
    trainer = train(study(keep="merge", merge_weight=0.75))
    assert len(seen) == 1
    assert trainer._standing.phases[0]["kept"] == "merged"
    assert trainer._standing.version.vector == {"a": EPOCHS, "b": 1}
    assert trainer._standing.used == {"b": 1}


def test_19_best_takes_the_highest_score_on_the_frozen_patches(
    postman: Postman, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {name: 5 * array for name, array in foreign().items()}
    brings(postman, bad)
    trainer = train(study(keep="best", keep_tolerance=0.0, mutual_weight=0.0))
    (phase,) = trainer._standing.phases
    scores = phase["scores"]
    assert scores.keys() == {"local", "before", "incoming", "merged"}
    assert scores[phase["kept"]] == max(scores.values())


def test_best_goes_back_to_the_model_before_a_phase(postman: Postman, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"local": 0.1, "before": 0.9, "incoming": 0.2, "merged": 0.3}
    monkeypatch.setattr("nnunet_fed.trainers.gossip.mutual_phase.foreground_dice", lambda *arguments: scores)
    begin, end = nnUNetTrainerGCML._begin_phase, nnUNetTrainerGCML._keep_one
    before: list[Weights] = []

    def note(trainer: Any, *letter: Any) -> None:
        before.append(weights(trainer))
        begin(trainer, *letter)

    def look(trainer: Any, peer_model: Any) -> None:
        assert not equal(weights(trainer), before[-1])
        end(trainer, peer_model)
        assert equal(weights(trainer), before[-1])

    monkeypatch.setattr(nnUNetTrainerGCML, "_begin_phase", note)
    monkeypatch.setattr(nnUNetTrainerGCML, "_keep_one", look)
    brings(postman, foreign())
    trainer = train(study(keep="best"))
    assert len(before) == 1
    assert "b" not in trainer._standing.version.vector, "it knows nothing of the peer's"
    assert trainer._standing.received == {"b": 1}


def test_the_frozen_patches_are_the_same_each_time_and_nobody_elses_draws_change(postman: Postman) -> None:
    trainer = train(study())
    states = checkpoint.random_states()
    first, again = (foreground_dice(trainer, {"local": trainer.network}, 3) for _ in range(2))
    assert first == again
    assert first != foreground_dice(trainer, {"local": trainer.network}, 4)
    after = checkpoint.random_states()
    assert torch.equal(after["torch"], states["torch"])
    assert after["python"] == states["python"]
    assert np.array_equal(after["numpy"][1], states["numpy"][1])
    assert trainer.network.training is False


# ------------------------------------------------------------------------------------------------------------ crashes


class Killed(BaseException):
    pass


def killed_at(monkeypatch: pytest.MonkeyPatch, epoch: int, wanted: Federation) -> Path:
    """Train until a step in the middle of an epoch; the checkpoint that is there then."""
    step = nnUNetTrainerGCML.train_step
    steps = 0

    def dying(trainer: Any, batch: Any) -> Any:
        nonlocal steps
        steps += trainer.current_epoch == epoch
        if steps == 2:
            raise Killed
        return step(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(nnUNetTrainerGCML, "train_step", dying)
        trainer = make(wanted)
        with pytest.raises(Killed):
            trainer.run_training()
    return Path(trainer.output_folder) / "checkpoint_latest.pth"


@pytest.mark.parametrize(
    ("epoch", "options"), [(1, {}), (2, {}), (3, {}), (4, {}), (2, {"keep": "best"}), (3, {"keep": "merge"})]
)
def test_28_a_stop_at_any_time_resumes_to_the_same_bits(
    postman: Postman, monkeypatch: pytest.MonkeyPatch, epoch: int, options: dict[str, Any]
) -> None:
    # the phase is of epochs 1 and 2; the peer's next model comes only after it
    arrays = [foreign(7), foreign(8)]
    postman.bring = lambda mailbox, state: [
        deliver(mailbox, state, arrays[number], number + 1, number + 1)
        for number in range(2 if state.version.epoch >= 3 else 1)
    ]  # type: ignore[return-value]
    wanted = study(rounds=5, mutual_epochs=2, **options)
    calm = train(wanted)
    assert len(calm._standing.phases) == 2
    path = killed_at(monkeypatch, epoch, wanted)
    resumed = make(wanted)
    resumed.load_checkpoint(str(path))
    assert (resumed._peer_model is not None) == (epoch in (2, 4))
    resumed.run_training()
    assert differences(resumed, calm) == []
    assert resumed._standing.phases == calm._standing.phases
    assert resumed._standing.version == calm._standing.version


def test_no_stopwatch_decides_what_a_training_computes(postman: Postman, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = train(study(rounds=8))
    monkeypatch.setattr(gaussian_blur, "time", stopwatch(later_is_faster=True))
    assert differences(train(study(rounds=8)), calm) == []
    stock = staticmethod(nnUNetTrainer.get_training_transforms)
    monkeypatch.setattr(nnUNetTrainerGCML, "get_training_transforms", stock)
    assert differences(train(study(rounds=8)), calm), "nnU-Net's own augmentation blurs the other way then"


def test_a_killed_training_posts_the_same_letter_again(postman: Postman, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = study()
    path = killed_at(monkeypatch, 2, wanted)
    assert postman.mailbox is not None
    letter = postman.posted[-1][0]
    (postman.mailbox.folder / "served.json").unlink()
    postman.posted.clear()
    resumed = make(wanted)
    resumed.load_checkpoint(str(path))
    resumed.run_training()
    assert letter.version.epoch == 2
    assert postman.posted[0][0] == letter


def test_a_new_training_forgets_the_mail_of_an_old_one_but_not_what_was_sent(postman: Postman) -> None:
    brings(postman, foreign())
    assert len(train(study())._standing.phases) == 1
    assert postman.mailbox is not None
    listed = postman.mailbox.folder / "outgoing.jsonl"
    listed.write_text("what left\n")
    postman.mailbox.note_event(event="sent", peer="b", bytes=1)
    postman.bring = lambda mailbox, state: None
    again = train(study())
    assert again._standing.phases == []
    assert record(again)["transfers"] == []
    assert listed.read_text() == "what left\n"


# ------------------------------------------------------------------------------------------------------------ lockstep


def test_in_lockstep_a_site_waits_for_its_sender_but_not_for_ever(
    postman: Postman, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def after_a_while(mailbox: Mailbox, state: State) -> None:
        nonlocal looks
        looks += 1
        if state.version.epoch == 1 and looks > 5:
            deliver(mailbox, state, arrays, 1, 1)

    arrays = foreign()
    postman.bring = after_a_while
    wanted = study(lockstep=True).model_copy(update={"deadline_minutes": 1 / 60})
    trainer = train(wanted)
    (phase,) = trainer._standing.phases
    assert phase["began"] == 1
    texts = [event["text"] for event in record(trainer)["events"]]
    assert "could not get the models of epoch 2 from b, and went on" in texts
    assert not any("epoch 1 from" in text for text in texts)
    assert trainer._standing.members == {"a": 4, "b": 4}


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "merge", "common_init": False}, "common_init"),
        ({"mix": "convex", "mutual_weight": 1.5}, "at most 1"),
        ({"expected_senders": 1.0}, "bernoulli"),
        ({"topology": "bernoulli", "expected_senders": 3.0}, "has 2 sites"),
        ({"lockstep": True, "mode": "pull"}, "lockstep"),
        ({"warm_up_epochs": 4}, "do not fit"),
        ({"mutual_epochs": 5}, "do not fit"),
        ({"contrast_weight": -0.1}, "contrast_weight"),
        ({"margin": 0.0}, "margin"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        study(**options)


def test_one_site_has_nobody_to_talk_to() -> None:
    with pytest.raises(ValidationError, match="at least two sites"):
        make_study(["a"], method={"name": "gcml"})


def test_the_warm_up_is_a_twentieth_of_the_epochs() -> None:
    for rounds, expected in ((1000, 50), (10, 0), (40, 2)):
        wanted = make_study(method={"name": "gcml"}, rounds=rounds)
        assert wanted.method.warm_up(wanted.epochs) == expected  # type: ignore[union-attr]


def test_what_cannot_work_is_refused_before_the_training(
    postman: Postman, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, "both")
    with pytest.raises(SystemExit, match="simultaneous, two_pass"):
        make(study()).run_training()
    monkeypatch.delenv(PLAN_VARIABLE)
    other = make_study(["b", "c"], method={"name": "gcml"}, rounds=2)
    with pytest.raises(SystemExit, match="Site 'a' is not in the study"):
        make(other).run_training()
    third = make_study(["a", "b", "c"], method={"name": "gcml"}, rounds=2)
    with pytest.raises(SystemExit, match="lacks the study's c:"):
        make(third).run_training()
    (tmp_path / "site.toml").write_text(site_file("a", peers=""))
    with pytest.raises(SystemExit, match="names no peers"):
        make(study()).run_training()
    assert postman.mailbox is None


def test_folds_are_trained_one_after_the_other(postman: Postman, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer process has one address; and no coordinator says which folds there are."""
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    both = make_study(folds=[0, 1], method={"name": "gcml"}, rounds=1, iterations_per_epoch=1)
    first = nnUNetTrainerGCML(tiny_plans(both), "2d", 1, DESCRIPTION, CPU)
    first._take_address()
    with pytest.raises(SystemExit, match=r"^Error: GCML trains one fold .* \(127\.0\.0\.1:2\): process"):
        make(both).run_training()
    first._close()
    with pytest.raises(SystemExit, match=r"^Error: The study in the plans trains fold 0, this command fold 1\."):
        nnUNetTrainerGCML(tiny_plans(study()), "2d", 1, DESCRIPTION, CPU).run_training()
    assert postman.mailbox is None
    runs = set()
    for fold in (0, 1):
        trainer = nnUNetTrainerGCML(tiny_plans(both), "2d", fold, DESCRIPTION, CPU)
        monkeypatch.setattr(trainer, "_training_cases", 4)
        trainer.initialize()
        trainer._standing = Standing(Version("a", {}, 0), "")
        runs.add(trainer._open_session()._state.run)
    assert len(runs) == 2, "no model of a fold comes into another one"


def test_more_rounds_after_the_end(postman: Postman, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The coordinator, which is needed for nothing else, is asked once; the site's own standing goes on."""
    ended = train(study())
    with ExitStack() as stack:
        served = Served(study().model_copy(update={"more_rounds": 2}), tmp_path / "state", stack)
        (tmp_path / "site.toml").write_text(site_file("a").replace("127.0.0.1:1", served.server.address))
        plans = {**tiny_plans(study()), "continue_training": True}
        trainer = nnUNetTrainerGCML(plans, "2d", 0, DESCRIPTION, CPU)
        trainer.load_checkpoint(str(Path(ended.output_folder) / "checkpoint_final.pth"))
        begun: list[Any] = []
        start = trainer.on_epoch_start
        trainer.on_epoch_start = lambda: (begun.append((weights(trainer), trainer._standing.version)), start())
        trainer.run_training()
        trainer.perform_actual_validation()
    assert equal(begun[0][0], weights(ended))
    assert begun[0][1] == ended._standing.version
    assert trainer.current_epoch == EPOCHS + 2
    assert [letter.version.epoch for letter, _ in postman.posted][-2:] == [EPOCHS + 1, EPOCHS + 2]
    assert (Path(trainer.output_folder) / f"after_{EPOCHS}_rounds" / "checkpoint_final.pth").is_file()


# --------------------------------------------------------------------------------------------------------- the cascade


def test_in_the_second_stage_of_a_cascade_both_models_see_what_the_first_has_predicted(
    postman: Postman, tmp_path: Path
) -> None:
    wanted = study(rounds=2, mutual_epochs=1)
    trainer = nnUNetTrainerGCML(tiny_cascade(wanted), "3d_cascade_fullres", 0, DESCRIPTION, CPU)
    with pytest.raises(SystemExit, match="First train fold all of 3d_lowres"):  # most cases are in no fold
        trainer.run_training()
    assert postman.mailbox is None, "nobody has heard of it"
    first_stage = tmp_path / "results" / DATASET / "nnUNetTrainerGCML__nnUNetFedPlans__3d_lowres"
    predicted = first_stage / "predicted_next_stage" / "3d_cascade_fullres"
    predicted.mkdir(parents=True)
    for case in range(5):
        nnUNetDatasetBlosc2.save_seg(np.ones((3, 20, 20), np.uint8), str(predicted / f"case_{case}"))
    brings(postman, foreign(channels=3))
    trainer = nnUNetTrainerGCML(tiny_cascade(wanted), "3d_cascade_fullres", 0, DESCRIPTION, CPU)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert [phase["from"] for phase in record(trainer)["mutual_phases"]] == ["b"]
