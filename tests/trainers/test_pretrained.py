"""Trainings that start from pretrained weights: each method, whichever site has which file, and a file that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import CPU, InProcess, Killed, RememberingCommunicator, Rooms, same_arrays, same_training
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import DESCRIPTION, tiny_plans

from nnunet_fed.errors import ConfigurationError, DisagreementError, RoundClosedError
from nnunet_fed.methods.fedoap import STEM_NAMES
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.parts import catching_up, pretrained_start
from nnunet_fed.trainers.parts.pretrained_weights import read_weights, take_weights
from nnunet_fed.trainers.plugin import nnunet_fed_trainers as plugin

WITH_COORDINATOR = [name for name in METHODS if name not in ("custom", "gcml")]
HEADS = ".seg_layers."
NO_STEPS = 1e-30
"""A learning rate with which a training ends with the weights with which it began, bit for bit."""


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    monkeypatch.setenv("nnUNet_fed_debug", "1")
    return InProcess(tmp_path, monkeypatch)


@pytest.fixture
def file(sites: InProcess, tmp_path: Path) -> Path:
    """A checkpoint of a network of another seed, for other classes."""
    trainer = sites.make(nnUNetTrainerFedAvg, sites.study(method={"name": "fedavg"}, seed=7))["a"]
    trainer.initialize()
    with torch.no_grad():
        for tensor in trainer.network.parameters():  # a step without a length would still move a bias from 0
            tensor.add_(0.5)
    return write(tmp_path / "pretrained.pth", trainer.network.state_dict())


def write(path: Path, weights: dict[str, Any]) -> Path:
    with_heads = {name: torch.cat([tensor] * 3) if HEADS in name else tensor for name, tensor in weights.items()}
    torch.save({"network_weights": with_heads, "optimizer_state": {}}, path)
    return path


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=False)["network_weights"]
    return weights


def study_of(sites: InProcess, method: str, options: dict[str, Any] | None = None, **settings: Any) -> Federation:
    options = options or {"fedgs": {"threshold": 1.5}, "fedsm": {"selector_steps_per_round": 1}}.get(method, {})
    study = {"rounds": 1, "iterations_per_epoch": 1, "initial_lr": NO_STEPS, "seed": 3, "configuration": "2d"}
    return sites.study(method={"name": method, **options}, **{**study, **settings})


def with_file(trainer: Any, file: Path | None, continues: bool = False) -> Any:
    """As ``nnUNetv2_train ... -pretrained_weights FILE`` does it."""
    run_training.maybe_load_checkpoint(trainer, continues, False, None if file is None else str(file))
    return trainer


def assert_has(network: dict[str, torch.Tensor], pretrained: dict[str, torch.Tensor]) -> None:
    """All that nnU-Net's rule takes; what either has besides, such as FedOAP's attention, is its own affair."""
    taken = [name for name in network if HEADS not in name and not name.startswith(("bottleneck_q.", "dca."))]
    assert len(taken) > 10
    for name in taken:
        assert torch.equal(network[name], pretrained[name]), name


@pytest.mark.parametrize("method", WITH_COORDINATOR)
def test_all_models_of_a_method_start_from_the_file(sites: InProcess, file: Path, method: str) -> None:
    """The deployed one and the global one, at a site that is not the first by name, too.

    And with whatever checkpoint it has left a study of another method can start.
    """
    trainers = sites.make(getattr(plugin, METHODS[method].own_trainer()), study_of(sites, method))
    for trainer in trainers.values():
        with_file(trainer, file)
    sites.run(trainers)
    for trainer in trainers.values():
        for name in ("final", METHODS[method].LAST_MODEL):
            assert_has(weights_in(Path(trainer.output_folder) / f"checkpoint_{name}.pth"), weights_in(file))
    other = sites.trainer(nnUNetTrainerFedAvg, study_of(sites, "fedavg", seed=9), "a")
    other.initialize()
    for checkpoint in Path(trainers["b"].output_folder).glob("checkpoint_*.pth"):
        take_weights(other.network, read_weights(checkpoint))
        assert_has(other.network.state_dict(), weights_in(checkpoint))


# ------------------------------------------------------------------------------------------------- who has which file


@pytest.mark.parametrize("at", ["a", "b"])
@pytest.mark.parametrize("other", ["another file", "no file"])
def test_sites_without_the_same_file_are_refused(
    sites: InProcess, file: Path, tmp_path: Path, other: str, at: str
) -> None:
    another = write(tmp_path / "another.pth", {name: tensor + 1 for name, tensor in weights_in(file).items()})
    digests = {at: read_weights(file).digest[:12], "ab".replace(at, ""): "none"}
    files = dict.fromkeys("ab")
    files[at] = file
    if other == "another file":
        files["ab".replace(at, "")] = another
        digests["ab".replace(at, "")] = read_weights(another).digest[:12]
    trainers = sites.make(nnUNetTrainerFedAvg, study_of(sites, "fedavg"))
    for site, trainer in trainers.items():
        with_file(trainer, files[site])
    told = rf"differ in their pretrained weights \(a: {digests['a']}, b: {digests['b']}\)\. Start all .* same file"
    with pytest.raises(DisagreementError, match=told):
        sites.run(trainers)
    assert list(sites.rooms.means) == ["start/model"], "nothing was trained"


def test_where_no_site_has_a_file_nobody_tells_of_it(sites: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """What version 0.1 tells, byte for byte."""
    told: list[dict[str, str]] = []
    monkeypatch.setattr(catching_up, "require_agreement", lambda seat, scope, digests: told.append(digests))
    sites.train(nnUNetTrainerFedAvg, study_of(sites, "fedavg"))
    assert [list(digests) for digests in told] == [["plans", "initial weights"]] * 2


def test_a_study_names_the_weights(sites: InProcess, file: Path, tmp_path: Path) -> None:
    another = write(tmp_path / "another.pth", {name: tensor + 1 for name, tensor in weights_in(file).items()})
    digest, other = (read_weights(path).digest for path in (file, another))
    study = study_of(sites, "fedavg", pretrained=digest)
    trainers = sites.make(nnUNetTrainerFedAvg, study)
    with pytest.raises(ConfigurationError, match=f"digest {digest}, and those that this command names have {other}"):
        with_file(trainers["a"], another)
    with pytest.raises(ConfigurationError, match=f"digest {digest}, and this command names none: add -pretrained_w"):
        sites.run({"b": trainers["b"]})
    assert not sites.rooms._contributions, "before anything is sent"
    for trainer in trainers.values():
        with_file(trainer, file)
    sites.run(trainers)
    for trainer in trainers.values():
        assert_has(weights_in(Path(trainer.output_folder) / "checkpoint_final.pth"), weights_in(file))
        record = json.loads((Path(trainer.output_folder) / "federation.json").read_text())
        assert record["pretrained"] == digest


def test_another_configuration_is_another_network(sites: InProcess, file: Path) -> None:
    """Such as the first stage of a cascade: its command says from what it starts."""
    study = study_of(sites, "fedavg", pretrained=read_weights(file).digest, configuration="3d_fullres")
    trainers = sites.make(nnUNetTrainerFedAvg, study)
    sites.run(trainers)
    assert trainers["a"].pretrained is None


def test_a_command_without_debug_ends_in_a_sentence(sites: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_fed_debug")
    trainer = sites.make(nnUNetTrainerFedAvg, study_of(sites, "fedavg"))["a"]
    with pytest.raises(
        SystemExit, match=r"^Error: The pretrained weights in nowhere\.pth cannot be read: No such file"
    ):
        with_file(trainer, Path("nowhere.pth"))


def test_stock_trainers_load_as_before(sites: InProcess, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites.make(nnUNetTrainerFedAvg, study_of(sites, "fedavg"))
    stock = nnUNetTrainer(tiny_plans(), "2d", 0, DESCRIPTION, CPU)
    with_file(stock, file)
    assert_has(stock.network.state_dict(), weights_in(file))


# ----------------------------------------------------------------------------------------------------- once, as a start


def test_a_killed_training_goes_on_to_the_same_bits_and_does_not_load_again(
    sites: InProcess, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(sites, "fedavg", rounds=2, initial_lr=0.05)

    def start(trainers: dict[str, Any]) -> dict[str, Any]:
        return {site: with_file(trainer, file) for site, trainer in trainers.items()}

    calm = start(sites.make(nnUNetTrainerFedAvg, study))
    sites.run(calm)
    killed = start(sites.make(nnUNetTrainerFedAvg, study))
    sites.rooms.kill_before = "round-0001/model"
    with pytest.raises(Killed):
        sites.run(killed)
    sites.rooms.kill_before = None
    monkeypatch.setattr(pretrained_start, "read_weights", None)
    resumed = {site: sites.trainer(nnUNetTrainerFedAvg, study, site) for site in killed}
    for trainer in resumed.values():
        with_file(trainer, file, continues=True)
    sites.run(resumed)
    for site in calm:
        assert same_training(calm[site], resumed[site])


def test_a_training_without_a_checkpoint_needs_the_file_again(sites: InProcess, file: Path) -> None:
    study = study_of(sites, "fedavg")
    killed = sites.make(nnUNetTrainerFedAvg, study)
    for trainer in killed.values():
        with_file(trainer, file)
    sites.rooms.kill_before = "start/model"
    with pytest.raises(Killed):
        sites.run(killed)
    sites.rooms.kill_before = None

    def resumed(given: Path | None) -> dict[str, Any]:
        trainers = {site: sites.trainer(nnUNetTrainerFedAvg, study, site) for site in killed}
        for trainer in trainers.values():
            trainer.logger.resume = True
            with_file(trainer, given, continues=True)
        return trainers

    digest = read_weights(file).digest
    with pytest.raises(ConfigurationError, match=f"digest {digest}, and has no checkpoint yet .* add -pretrained_wei"):
        sites.run(resumed(None))
    ended = resumed(file)
    sites.run(ended)
    assert_has(weights_in(Path(ended["b"].output_folder) / "checkpoint_final.pth"), weights_in(file))


def test_rounds_are_undone_up_to_the_start(sites: InProcess, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is the federation's, from whoever keeps it; the file is not asked for."""
    study = study_of(sites, "fedsm", rounds=2, initial_lr=0.05)
    killed = sites.make(plugin.nnUNetTrainerFedSM, study)
    for trainer in killed.values():
        with_file(trainer, file)
    sites.rooms.kill_before = "round-0001/model"
    with pytest.raises(Killed):
        sites.run(killed)
    start = sites.rooms.means["start/model"]
    study = study.model_copy(update={"initial_lr": NO_STEPS})
    resumed = {site: sites.trainer(plugin.nnUNetTrainerFedSM, study, site) for site in killed}
    sites.rooms = Rooms(list(sites.cases))
    sites.rooms.means["start/model"] = start
    monkeypatch.setattr(
        plugin.nnUNetTrainerFedSM, "_reason_to_start_anew", lambda *_: "rounds of this site were undone"
    )
    monkeypatch.setattr(pretrained_start, "read_weights", None)
    for trainer in resumed.values():
        with_file(trainer, None, continues=True)
    sites.run(resumed)
    for trainer in resumed.values():
        assert trainer.current_epoch == 2
        for name in ("final", "global"):
            assert_has(weights_in(Path(trainer.output_folder) / f"checkpoint_{name}.pth"), weights_in(file))


@pytest.mark.parametrize("named", [False, True])
def test_a_site_that_comes_late_takes_the_newest_model(
    sites: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Of a file that nobody compared nothing stays, private parts neither; of the study's file they do."""
    trainer = sites.make(plugin.nnUNetTrainerFedOAP, study_of(sites, "fedoap", seed=7))["a"]
    trainer.initialize()
    own = write(tmp_path / "own.pth", trainer.network.state_dict())
    private, file = "bottleneck_q.0.convs.0.conv.weight", weights_in(own)
    study = study_of(sites, "fedoap", pretrained=read_weights(own).digest if named else None)
    early = sites.make(plugin.nnUNetTrainerFedOAP, study)
    for trainer in early.values():
        with_file(trainer, own)
    sites.run(early)
    drawn = sites.trainer(plugin.nnUNetTrainerFedOAP, study, "a")
    drawn.initialize()

    late = with_file(sites.trainer(plugin.nnUNetTrainerFedOAP, study, "a"), own)
    late.communicator = RememberingCommunicator(sites.rooms, "a")
    monkeypatch.setattr(catching_up, "common_start", raising(RoundClosedError("The round closed without this site.")))
    late._start_together()
    expected = file if named else drawn.network.state_dict()
    assert torch.equal(late.network.state_dict()[private], expected[private])
    assert not torch.equal(file[private], drawn.network.state_dict()[private])
    assert_shared_is(late, sites.rooms.means["round-0000/model"])
    assert (late.pretrained is None) is not named


def raising(error: Exception) -> Any:
    def function(*_: Any) -> None:
        raise error

    return function


def assert_shared_is(trainer: Any, arrays: dict[str, Any]) -> None:
    assert same_arrays(trainer.shared_arrays(), arrays)


# ------------------------------------------------------------------------------------------------------ FedOAP and GCML


@pytest.mark.parametrize("query_branch", ["copy", "light"])
def test_fedoap_starts_from_its_own_checkpoints(sites: InProcess, tmp_path: Path, query_branch: str) -> None:
    """A module that is built otherwise begins as it is built, whole; the rest is taken."""
    study = study_of(sites, "fedoap", {"query_branch": query_branch})
    drawn, trainer = (sites.trainer(plugin.nnUNetTrainerFedOAP, study, "a") for _ in range(2))
    donor = sites.trainer(plugin.nnUNetTrainerFedOAP, study_of(sites, "fedoap", seed=7), "a")
    for one in (donor, drawn):
        one.initialize()
    file = write(tmp_path / "own.pth", donor.network.state_dict())
    with_file(trainer, file)
    network, given = trainer.network.state_dict(), weights_in(file)
    for name, tensor in network.items():
        if HEADS not in name:
            anew = query_branch == "light" and name.startswith("bottleneck_q.")
            assert torch.equal(tensor, (drawn.network.state_dict() if anew else given)[name]), name


def test_a_private_stem_may_have_other_channels(sites: InProcess, file: Path) -> None:
    stem = STEM_NAMES[0]
    weights = weights_in(file)
    for name, tensor in weights.items():
        if tensor.shape == weights[stem].shape:
            weights[name] = torch.cat([tensor, tensor], 1)
    write(file, {name: tensor for name, tensor in weights.items() if HEADS not in name})
    trainers = [
        sites.trainer(plugin.nnUNetTrainerFedOAP, study_of(sites, "fedoap", options), "a")
        for options in ({"private_stem": True}, {})
    ]
    with_file(trainers[0], file)
    second = "encoder.stages.1.0.convs.0.conv.weight"
    assert torch.equal(trainers[0].network.state_dict()[second], weights[second])
    with pytest.raises(
        ConfigurationError, match=rf"'{stem}' has the shape \(4, 2, 3, 3\) there and \(4, 1, 3, 3\) here"
    ):
        with_file(trainers[1], file)


def test_gcml_starts_from_what_the_study_names(sites: InProcess, file: Path) -> None:
    digest = read_weights(file).digest
    for pretrained in (None, digest):
        trainer = sites.trainer(plugin.nnUNetTrainerGCML, study_of(sites, "gcml", pretrained=pretrained), "a")
        if pretrained is None:
            with pytest.raises(ConfigurationError, match=f'pretrained = "{digest}" and configuration = "2d"'):
                with_file(trainer, file)
        else:
            assert_has(with_file(trainer, file).network.state_dict(), weights_in(file))
