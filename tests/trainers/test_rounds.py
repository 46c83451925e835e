"""How rounds sit in epochs, and what a federated checkpoint adds to nnU-Net's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunet_fed.errors import DisagreementError, NoContributionError
from nnunet_fed.exchange.communicator import Array, LocalCommunicator, LocalFederation
from nnunet_fed.trainers.parts import checkpoint
from nnunet_fed.trainers.parts.rounds import PRETRAINED, common_start, fit_log, require_agreement

# ------------------------------------------------------------------------------------------------------------ the start


def weights(site: str) -> dict[str, Array]:
    return {"w": np.full(3, ord(site), np.float32)}


def test_all_start_with_the_weights_of_the_first_site() -> None:
    asked: list[str] = []

    def start(seat: LocalCommunicator) -> tuple[str, dict[str, Array]]:
        return common_start(seat, "model", lambda: asked.append(seat.site) or weights(seat.site))  # type: ignore[func-returns-value]

    for scope, arrays in LocalFederation("bca").run(start).values():
        assert scope == "start"
        assert arrays["w"].tobytes() == weights("a")["w"].tobytes()
    assert asked == ["a"], "the others do not even gather theirs"


class WithoutTheFirst:
    """What a site sees when others than it took part in the round's mean: nobody gave anything."""

    def __init__(self, seat: LocalCommunicator, absent: str):
        self._seat = seat
        self._absent = absent
        self.site, self.sites = seat.site, (absent, *seat.sites)
        self.keys: list[str] = []

    def mean(self, key: str, tensors: dict[str, Array], weight: float, exact: bool = False) -> dict[str, Array]:
        self.keys.append(key)
        return self._seat.mean(key, tensors, weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seat, name)


def test_the_next_site_steps_in_for_one_that_is_absent() -> None:
    def start(seat: LocalCommunicator) -> tuple[str, dict[str, Array], list[str]]:
        left = WithoutTheFirst(seat, "A")
        return *common_start(left, "model", lambda: weights(seat.site)), left.keys  # type: ignore[arg-type]

    for scope, arrays, keys in LocalFederation("bc").run(start).values():
        assert scope == "start-1"
        assert arrays["w"].tobytes() == weights("b")["w"].tobytes()
        assert keys == ["start/model", "start-1/model"], "a key of its own for each try"


def test_nobody_gives_initial_weights() -> None:
    class Nobody(WithoutTheFirst):
        def mean(self, key: str, tensors: dict[str, Array], weight: float, exact: bool = False) -> dict[str, Array]:
            raise NoContributionError(key)

    seat = LocalFederation("b").communicator("b")
    with pytest.raises(NoContributionError, match="No site contributed initial weights"):
        common_start(Nobody(seat, "A"), "model", dict)  # type: ignore[arg-type]


def test_agreement_is_silent() -> None:
    LocalFederation("ab").run(lambda seat: require_agreement(seat, "start", {"plans": "1" * 64, "weights": "2" * 64}))


def test_a_disagreement_names_what_and_who() -> None:
    digests = {"a": "1" * 64, "b": "2" * 64, "c": "1" * 64}

    def check(seat: LocalCommunicator) -> str:
        with pytest.raises(DisagreementError) as told:
            require_agreement(seat, "start", {"initial weights": "3" * 64, "plans": digests[seat.site]})
        return str(told.value)

    for sentence in LocalFederation("abc").run(check).values():
        assert f"differ in their plans (a: {'1' * 12}, b: {'2' * 12}, c: {'1' * 12})" in sentence
        assert "initial weights" not in sentence
        assert "plan_and_preprocess" in sentence


def test_a_site_of_version_0_1_tells_of_no_pretrained_weights() -> None:
    """It is refused where the others have some, at every site; the remedy is another one than for plans."""

    def check(seat: LocalCommunicator) -> str:
        digests = {"plans": "1" * 64, "initial weights": "2" * 64}
        with pytest.raises(DisagreementError) as told:
            require_agreement(seat, "start", {PRETRAINED: "3" * 64, **digests} if seat.site == "b" else digests)
        return str(told.value)

    for sentence in LocalFederation("ab").run(check).values():
        assert f"differ in their pretrained weights (a: none, b: {'3' * 12}). Start all sites with the same" in sentence


# -------------------------------------------------------------------------------------------------------------- the log


def log_epoch(logger: MetaLogger, epoch: int) -> None:
    """All that nnU-Net logs in an epoch, in its order."""
    for key, value in (
        ("epoch_start_timestamps", 100.0 * epoch),
        ("lrs", 0.01),
        ("train_losses", 0.5),
        ("mean_fg_dice", 0.8),
        ("dice_per_class_or_region", [0.7, 0.9]),
        ("val_losses", 0.6),
        ("epoch_end_timestamps", 100.0 * epoch + 50),
    ):
        logger.log(key, value, epoch)


@pytest.mark.parametrize("trained", [0, 1, 2])
@pytest.mark.parametrize("epochs", [3, 7])
def test_a_padded_log_goes_on_in_nnunets_logger(tmp_path: Path, trained: int, epochs: int) -> None:
    logger = MetaLogger(str(tmp_path), False)
    for epoch in range(trained):
        log_epoch(logger, epoch)
    fit_log(logger.get_checkpoint(), epochs)
    log = logger.get_checkpoint()
    assert {len(values) for values in log.values()} == {epochs}
    before = {name: list(values) for name, values in log.items()}
    log_epoch(logger, epochs)
    for name, values in log.items():
        assert len(values) == epochs + 1
        assert str(values[:-1]) == str(before[name]), name  # as text, where a NaN equals a NaN
    if trained:
        assert log["train_losses"][trained:epochs] == [0.5] * (epochs - trained)
        assert log["dice_per_class_or_region"][:epochs] == [[0.7, 0.9]] * epochs
        assert log["ema_fg_dice"][epochs] == pytest.approx(0.8), "the moving average goes on from the last one"
    else:
        assert np.isnan(log["train_losses"][:epochs]).all()
        assert log["ema_fg_dice"][epochs] == pytest.approx(0.08), "a Dice of 0 before, and not a number that is none"
    logger.plot_progress_png(str(tmp_path))
    assert (tmp_path / "progress.png").stat().st_size > 0


def test_repeated_entries_are_not_the_same_list() -> None:
    log: dict[str, list[Any]] = {"dice_per_class_or_region": [[0.5]]}
    fit_log(log, 3)
    log["dice_per_class_or_region"][2][0] = 0.9
    assert log["dice_per_class_or_region"] == [[0.5], [0.5], [0.9]]


def test_what_was_undone_goes_from_the_log() -> None:
    log: dict[str, list[Any]] = {"train_losses": [1.0, 2.0], "lrs": [1.0]}
    fit_log(log, 1)
    assert log == {"train_losses": [1.0], "lrs": [1.0]}


# ----------------------------------------------------------------------------------------------------------- checkpoint


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), *torch.randn(3).tolist()]


def test_restored_random_states_repeat_the_draws(tmp_path: Path) -> None:
    checkpoint.seed_everything(3)
    draws()  # leaves a second Gaussian number in store, which belongs to the state
    torch.save(checkpoint.random_states(), tmp_path / "states")
    first = draws()
    checkpoint.seed_everything(4)
    assert draws() != first
    checkpoint.restore_random_states(torch.load(tmp_path / "states", weights_only=False))
    assert draws() == first


def test_a_seed_repeats_the_draws() -> None:
    drawn = []
    for seed in (1, 2, 1):
        checkpoint.seed_everything(seed)
        drawn.append(draws())
    assert drawn[0] == drawn[2]
    assert all(one != other for one, other in zip(drawn[0], drawn[1], strict=True)), "each generator is seeded"


def saved(path: Path, value: float) -> dict[str, Any]:
    """A checkpoint in which one tensor has two names, as in nnU-Net's."""
    tensor = torch.full((1000,), value)
    content = {"network_weights": {"w": tensor, "alias": tensor}, "current_epoch": int(value), "logging": {"a": [1]}}
    torch.save(content, path)
    return content


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_a_checkpoint_is_nnunets_with_additions(tmp_path: Path) -> None:
    filename = tmp_path / "checkpoint.pth"
    saved(filename, 1)
    plain_size, save = filename.stat().st_size, torch.save
    with checkpoint.written_with({checkpoint.FEDERATION: {"pending": None}, "current_epoch": 5}, filename) as part:
        content = saved(part, 2)
    assert torch.save is save
    written = torch.load(filename, weights_only=False)
    assert equal(written, {**content, checkpoint.FEDERATION: {"pending": None}, "current_epoch": 5})
    assert filename.stat().st_size < 1.5 * plain_size, "a tensor of two names is written once"
    assert written["network_weights"]["w"].data_ptr() == written["network_weights"]["alias"].data_ptr()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert checkpoint.federation_state(filename) == {"pending": None}


def test_a_checkpoint_of_nnunet_has_no_state_of_ours(tmp_path: Path) -> None:
    saved(tmp_path / "stock.pth", 1)
    assert checkpoint.federation_state(tmp_path / "stock.pth") is None


@pytest.mark.parametrize("written", [0, 100, None], ids=["nothing", "a part", "everything"])
def test_a_failing_write_leaves_the_old_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int | None
) -> None:
    filename = tmp_path / "checkpoint.pth"
    saved(filename, 1)
    old = filename.read_bytes()
    save = torch.save

    def fail(content: Any, file: str) -> None:
        save(content, file)
        with Path(file).open("r+b") as partial:
            partial.truncate(written)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with (
        pytest.raises(OSError, match="No space left"),
        checkpoint.written_with({checkpoint.FEDERATION: {}}, filename) as part,
    ):
        saved(part, 2)
    assert torch.save is fail
    assert filename.read_bytes() == old
    monkeypatch.undo()
    with checkpoint.written_with({checkpoint.FEDERATION: {}}, filename) as part:
        saved(part, 3)
    assert torch.load(filename, weights_only=False)["current_epoch"] == 3, "and the next one goes well"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
