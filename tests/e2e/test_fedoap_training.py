"""FedOAP by the stock commands: what leaves a site, both phases, crashes, a new site, and prediction."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from harness import (
    PLANS,
    Planned,
    RunningFederation,
    RunningSite,
    Trained,
    command,
    environment,
    federation,
    run,
    same_bits,
    until,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from recording_proxy import RecordingProxy

from nnunet_fed.methods.fedoap import PRIVATE_PREFIXES, is_private
from nnunet_fed.simulation.simulate import plugin_folder, to_toml
from nnunet_fed.study.federation import Federation
from nnunet_fed.trainers.nnUNetTrainerFedOAP import nnUNetTrainerFedOAP

pytestmark = pytest.mark.e2e

SITES = {"site_a": "site_a", "site_b": "site_b"}
METHOD = {"name": "fedoap", "finetune_epochs": 2}
ROUNDS = 2
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def wire() -> bytearray:
    """What site_a sends in the training of :func:`trained`."""
    return bytearray()


@pytest.fixture(scope="module")
def study_of_three(planned: Planned) -> Federation:
    settings = {**planned.study.model_dump(), "method": METHOD, "rounds": ROUNDS}
    return Federation.model_validate({**settings, "sites": (*SITES, "site_c")})


@pytest.fixture(scope="module")
def joined(
    planned: Planned, study_of_three: Federation, wire: bytearray, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, RunningSite]:
    """Two rounds and two fine-tuned epochs at two sites, with the validation of both models; then a third joins."""
    folder = tmp_path_factory.mktemp("fedoap") / "run"
    variables = {"nnUNet_fed_skip_validation": ""}
    running = RunningFederation(study_of_three, folder, planned, {**SITES, "site_c": "site_a"}, **variables)
    study_file = running.folder / "federation.toml"
    try:
        study_file.write_text(to_toml({**study_of_three.model_dump(mode="json"), "sites": list(SITES)}))
        running.serve()
        until(lambda: bool(running.watcher.status()), "the coordinator answers")
        proxy = RecordingProxy(running.address)
        a, b, c = running.sites.values()
        settings = a.folder / "site.toml"
        settings.write_text(settings.read_text().replace(running.address, proxy.address))
        a.start()
        b.start()
        a.finish()
        b.finish()
        proxy.close()
        wire += proxy.sent
        study_file.write_text(to_toml(study_of_three.model_dump(mode="json")))
        running.restart()
        c.start()
        c.finish()
        return running.sites
    finally:
        running.stop()


@pytest.fixture(scope="module")
def trained(joined: dict[str, RunningSite]) -> Trained:
    """The two sites that took part in the rounds."""
    return Trained({name: joined[name] for name in SITES})


def weights(site: RunningSite, name: str, private: bool) -> Weights:
    """Either part of a checkpoint's parameters; names of the network without its aliases."""
    stored: Weights = site.checkpoint(name)["network_weights"]
    names = [name for name in stored if not name.startswith("decoder.encoder.") and ".all_modules." not in name]
    return {name: stored[name] for name in names if is_private(name) == private}


def trained_weights(part: Weights) -> list[str]:
    """Convolutions that get a gradient: all but the lowest head, which deep supervision gives no weight (15)."""
    lowest = "decoder.seg_layers.0."
    return [name for name, tensor in part.items() if tensor.ndim > 1 and not name.startswith(lowest)]


def equal(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_23_shared_tensors_are_equal_after_the_rounds_and_private_ones_are_not(trained: Trained) -> None:
    a, b = trained.sites.values()
    federated, final = "checkpoint_federated.pth", "checkpoint_final.pth"
    assert equal(weights(a, federated, private=False), weights(b, federated, private=False))
    assert not equal(weights(a, final, private=False), weights(b, final, private=False)), "nothing is frozen"
    ours, theirs = weights(a, federated, private=True), weights(b, federated, private=True)
    assert ours.keys() == theirs.keys()
    assert [name for name in trained_weights(ours) if torch.equal(ours[name], theirs[name])] == []


def test_3_no_private_tensor_is_on_the_wire(trained: Trained, wire: bytearray) -> None:
    network = weights(trained.sites["site_a"], "checkpoint_federated.pth", private=False)
    assert sum(name.encode() in wire for name in network) > len(network) * 0.9, "names may be cut between two frames"
    assert not [prefix for prefix in PRIVATE_PREFIXES if prefix.encode() in wire]
    assert b".adapter." not in wire
    for site in trained.sites.values():
        entries = outgoing(site)
        uploads = [entry["tensors"] for entry in entries if entry["what"] == "upload" and entry["verb"] == "mean"]
        assert len(uploads) >= ROUNDS
        assert not [name for tensors in uploads for name in tensors if is_private(name)]
    tensors = next(entry["tensors"] for entry in outgoing(trained.sites["site_a"]) if "tensors" in entry)
    assert tensors.keys() == network.keys()


def test_8_the_fine_tuning_sends_nothing_and_freezes_nothing(trained: Trained) -> None:
    for site in trained.sites.values():
        entries = outgoing(site)
        assert entries[-1]["what"] == "leave"
        assert sum(entry["what"] == "leave" for entry in entries) == 1
        log = next(site.results.glob("training_log_*.txt")).read_text()
        assert log.index("Fine-tuning for 2 epochs") < log.index("Epoch 3")
        assert "Best fine-tuned epoch so far" in log
        for private in (False, True):
            before = weights(site, "checkpoint_federated.pth", private)
            after = weights(site, "checkpoint_final.pth", private)
            assert [name for name in trained_weights(before) if torch.equal(before[name], after[name])] == []
        assert not (site.results / "checkpoint_finetuned.pth").exists()


def outgoing(site: RunningSite) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (site.results / "outgoing.jsonl").read_text().splitlines()]


def test_both_models_are_validated(trained: Trained) -> None:
    for site in trained.sites.values():
        for folder in ("validation", "federated/validation"):
            summary = json.loads((site.results / folder / "summary.json").read_text())
            assert len(summary["metric_per_case"]) == 1
            assert (site.results / folder / "lesions.json").is_file()


def test_9_a_fine_tuning_that_was_killed_goes_on_without_a_coordinator(
    planned: Planned, trained: Trained, tmp_path: Path
) -> None:
    with federation(planned, tmp_path / "run", SITES, method=METHOD, rounds=ROUNDS) as running:
        a, b = running.sites.values()
        a.start()
        b.start()
        until((a.results / "checkpoint_federated.pth").is_file, "the fine-tuning has begun")
        a.send(signal.SIGKILL)
        b.finish()
        assert running.coordinator is not None
        running.coordinator.kill()
        running.coordinator.wait()
        a.start("--c")
        a.finish()
        for name, site in running.sites.items():
            assert same_bits(site.checkpoint(), trained.sites[name].checkpoint())
            undisturbed = trained.sites[name].checkpoint("checkpoint_federated.pth")
            assert same_bits(site.checkpoint("checkpoint_federated.pth"), undisturbed)


def test_a_new_site_takes_the_shared_weights_and_fine_tunes_alone(
    planned: Planned, study_of_three: Federation, joined: dict[str, RunningSite]
) -> None:
    a, c = joined["site_a"], joined["site_c"]
    federated = "checkpoint_federated.pth"
    assert equal(weights(c, federated, private=False), weights(a, federated, private=False))
    private = initial_private(planned, study_of_three)
    assert equal(weights(c, federated, private=True), private), "the study's seed gives them"
    assert not equal(weights(c, "checkpoint_final.pth", private=False), weights(c, federated, private=False))
    assert len([entry for entry in outgoing(c) if entry["what"] == "upload"]) == 0


def initial_private(planned: Planned, study: Federation) -> Weights:
    plans = json.loads(next(planned.dataset("site_a").glob(f"{PLANS}.json")).read_text())
    plans["federation"]["study"] = study.model_dump(mode="json")
    torch.manual_seed(study.seed)
    manager = PlansManager(plans)
    network = nnUNetTrainerFedOAP.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 3)
    return {name: tensor.detach() for name, tensor in network.named_parameters() if is_private(name)}


# ----------------------------------------------------------------------------------------------------------- prediction


def tiny_plans(axes: int, network: str) -> dict[str, Any]:
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    resample = {
        f"resampling_fn_{what}{suffix}": value
        for what in ("data", "seg", "probabilities")
        for suffix, value in (("", "resample_data_or_seg_to_shape"), ("_kwargs", resampling))
    }
    blocks = "n_conv_per_stage" if network == "PlainConvUNet" else "n_blocks_per_stage"
    architecture = {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
        "arch_kwargs": {
            "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": [[3] * axes] * 3, "strides": [[1] * axes, [2] * axes, [2] * axes], blocks: [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d", "norm_op_kwargs": {"affine": True},
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip
    study = Federation.model_validate(
        {"name": "s", "sites": ["a"], "rounds": 1, "method": {"name": "fedoap", "heads": 2, "query_branch": "light"}}
    )
    return {
        "dataset_name": "Dataset001_Tiny", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {
            f"{axes}d": {
                "data_identifier": "tiny", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
                "patch_size": [16] * axes, "spacing": [1.0] * axes, "normalization_schemes": ["NoNormalization"],
                "use_mask_for_norm": [False], "batch_dice": False, "architecture": architecture, **resample,
            }
        },
        "federation": {"study": study.model_dump(mode="json")},
    }  # fmt: skip


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_22_the_stock_command_rebuilds_the_network(
    axes: int, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans, trainer = tiny_plans(axes, architecture), "nnUNetTrainerFedOAP"
    dataset = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    manager = PlansManager(plans)
    torch.manual_seed(5)
    live = nnUNetTrainerFedOAP.build_network_architecture(
        manager, manager.get_configuration(f"{axes}d"), 1, 2, enable_deep_supervision=False
    )
    for parameter in live.parameters():  # so that every module matters
        torch.nn.init.normal_(parameter, std=0.3)
    model = tmp_path / "results" / "Dataset001_Tiny" / f"{trainer}__nnUNetPlans__{axes}d"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "network_weights": live.state_dict(), "trainer_name": trainer, "inference_allowed_mirroring_axes": None,
        "init_args": {"plans": plans, "configuration": f"{axes}d", "fold": 0, "dataset_json": dataset},
    }  # fmt: skip
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    data = np.random.default_rng(0).normal(size=(20, 18, 24)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(data), str(images / "case_0000.nii.gz"))
    paths = {
        name: tmp_path / name.partition("_")[2] for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    }
    arguments = ["-d", "Dataset001_Tiny", "-c", f"{axes}d", "-f", "0", "-tr", trainer, "-p", "nnUNetPlans"]
    in_one_process = ["-npp", "0", "-nps", "0"]
    run(
        [command("nnUNetv2_predict"), "-i", images, "-o", out, *arguments, "-device", "cpu", *in_one_process,
         "--save_probabilities"],
        environment(nnUNet_extTrainer=plugin_folder(), **paths), tmp_path / "predict.log",
    )  # fmt: skip
    monkeypatch.setenv("nnUNet_extTrainer", str(plugin_folder()))
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    patches = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1, *[16] * axes)).astype(np.float32))
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(patches), live.eval()(patches))
    expected = predictor.predict_single_npy_array(data[None], {"spacing": [1.0] * 3}, None, None, True)[1]
    stored = np.load(out / "case.npz")["probabilities"]
    # the command sums with other numbers of threads, and nnU-Net keeps logits in half precision
    assert np.allclose(stored, expected, rtol=0, atol=1e-3)
    assert np.std(stored) > 1e-2, "the network says something"
