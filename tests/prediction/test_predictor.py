"""The super model's predictor against nnU-Net's own, on tiny real model folders."""

from __future__ import annotations

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_fed.cli.app import DEBUG_VARIABLE, main
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.methods.familiarity import Familiarity, texture
from nnunet_fed.methods.fedsm import GLOBAL, Route
from nnunet_fed.methods.selector import Selector, SelectorConfiguration, draw_patches
from nnunet_fed.methods.selector_validation import SelectorValidation
from nnunet_fed.prediction import bundle
from nnunet_fed.prediction.bundle import (
    BUNDLE,
    SELECTOR_FILE,
    ValidationDice,
    load_tensors,
    personal_checkpoint,
    read_bundle,
    write_checkpoint,
    write_fold,
    write_selector,
)
from nnunet_fed.prediction.checkpoint_files import FINAL_CHECKPOINT, GLOBAL_CHECKPOINT
from nnunet_fed.prediction.predictor import ROUTING, SuperModelPredictor

SITES = ("a", "b", "c")
PATCH = (16, 16, 16)
CASCADE = "3d_cascade_fullres"
SELECTOR = SelectorConfiguration(channels=1, classes=3, patch_size=PATCH, patches=2)


def plans() -> dict[str, Any]:
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    resample = {
        f"resampling_fn_{what}{suffix}": value
        for what in ("data", "seg", "probabilities")
        for suffix, value in (("", "resample_data_or_seg_to_shape"), ("_kwargs", resampling))
    }
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 2, "features_per_stage": [2, 3], "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]], "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1], "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"affine": True},
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip
    return {
        "dataset_name": "Dataset001_Tiny", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "tiny", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
                "patch_size": list(PATCH), "spacing": [1.0, 1.0, 1.0], "normalization_schemes": ["NoNormalization"],
                "use_mask_for_norm": [False], "batch_dice": False, "architecture": architecture, **resample,
            },
            CASCADE: {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
    }  # fmt: skip


DATASET = {
    "channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "numTraining": 4, "file_ending": ".nii.gz",
}  # fmt: skip


def network(seed: int, channels: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    manager = PlansManager(plans())
    built: torch.nn.Module = nnUNetTrainer.build_network_architecture(
        manager, manager.get_configuration("3d_fullres"), channels, 2, enable_deep_supervision=False
    )
    for parameter in built.parameters():  # biases too, so that no two models agree anywhere
        torch.nn.init.normal_(parameter, std=0.5)
    return built


def leveled_selector(sharpness: float = 3.0, configuration: SelectorConfiguration = SELECTOR) -> Selector:
    """Takes dark images for site a's, bright ones for site b's: one path carries the level, one its negative."""
    selector = Selector(configuration)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.zero_()
        for number, layer in enumerate(module for module in selector.features if hasattr(module, "weight")):
            layer.weight[0, 0, 1, 1, 1] = 1
            layer.weight[1, 0 if number == 0 else 1, 1, 1, 1] = -1 if number == 0 else 1
        selector.head.weight[0, 1] = selector.head.weight[1, 0] = sharpness
    return selector


def validation(right: int = 10, temperature: float = 1.0) -> SelectorValidation:
    confusion = tuple(tuple(right if row == column else 1 for column in range(3)) for row in range(3))
    return SelectorValidation(SITES, temperature, confusion, (0, 0, 0))


def write_model(
    folder: Path,
    fold: int = 0,
    seed: int = 0,
    shared: tuple[str, ...] = ("b", "c"),
    selector: Selector | None = None,
    stage: str = "3d_fullres",
    **facts: Any,
) -> Path:
    """A model folder as site a has it after a FedSM training."""
    channels = 2 if stage == CASCADE else 1
    within = folder / f"fold_{fold}"
    within.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans()))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    weights = {name: network(10 * seed + number, channels).state_dict() for number, name in enumerate((GLOBAL, *SITES))}
    final = {
        "network_weights": weights["a"],
        "optimizer_state": {"step": np.float64(1)},  # a training checkpoint holds more than tensors
        "init_args": {"plans": plans(), "configuration": stage, "fold": fold, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(final, within / FINAL_CHECKPOINT)
    write_checkpoint(within / GLOBAL_CHECKPOINT, within / FINAL_CHECKPOINT, weights[GLOBAL])
    for site in shared:
        write_checkpoint(within / personal_checkpoint(site), within / FINAL_CHECKPOINT, weights[site])
    selector = selector or leveled_selector()
    write_selector(within / SELECTOR_FILE, facts.get("configuration", SELECTOR), selector)
    settings = {"gamma": 0.9, "selector_min_accuracy": 0.6, "validation": validation(), **facts}
    settings["selector"] = settings.pop("configuration", SELECTOR)
    write_fold(folder, fold, site="a", shared=shared, **settings)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fedsm") / "model")


def case_data(level: float, seed: int = 0) -> torch.Tensor:
    """A case as nnU-Net preprocesses it: about the level, and larger than a patch."""
    generator = torch.Generator().manual_seed(seed)
    return level + 0.01 * torch.randn(1, 16, 20, 16, generator=generator)


def predictor(folder: Path, folds: Any = (0,), gamma: float | None = None, force: str | None = None) -> Any:
    made = SuperModelPredictor(gamma=gamma, force=force, device=torch.device("cpu"), allow_tqdm=False)
    made.initialize_from_trained_model_folder(str(folder), folds)
    return made


def stock_logits(folder: Path, checkpoint: str, data: torch.Tensor, folds: Any = (0,)) -> torch.Tensor:
    """What ``nnUNetv2_predict -chk`` computes."""
    made = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    made.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    logits: torch.Tensor = made.predict_logits_from_preprocessed_data(data)
    return logits


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------------- routing


def test_t16_each_case_gets_the_logits_of_the_stock_predictor_with_the_chosen_checkpoint(model: Path) -> None:
    dark, bright, unsure = case_data(-1), case_data(1), case_data(0)
    expected = {
        "a": stock_logits(model, FINAL_CHECKPOINT, dark),
        "b": stock_logits(model, personal_checkpoint("b"), bright),
        GLOBAL: stock_logits(model, GLOBAL_CHECKPOINT, unsure),
    }
    made = predictor(model)
    for data, choice in ((dark, "a"), (bright, "b"), (dark, "a"), (unsure, GLOBAL), (bright, "b"), (unsure, GLOBAL)):
        assert torch.equal(made.predict_logits_from_preprocessed_data(data), expected[choice])
        assert made.router.choose(data, None)[0].choice == choice
    assert not torch.allclose(expected["a"], stock_logits(model, GLOBAL_CHECKPOINT, dark), atol=0.1), "models differ"


def test_the_predictor_is_as_before_after_a_case_that_fails(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = predictor(model)
    usual = made.list_of_parameters

    def fails(data: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(made, "predict_sliding_window_return_logits", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.predict_logits_from_preprocessed_data(case_data(-1))
    assert made.list_of_parameters is usual


def test_t15_gamma_of_the_command_goes_before_the_bundles(model: Path) -> None:
    for gamma, choices in ((None, {"a", "b", GLOBAL}), (1.0, {GLOBAL}), (0.0, {"a", "b"})):
        made = predictor(model, gamma=gamma)
        assert made.router.gamma == (0.9 if gamma is None else gamma)
        assert {made.router.choose(case_data(level), None)[0].choice for level in (-1, 1, 0)} == choices


def test_forced_models_and_what_is_said_of_them(model: Path) -> None:
    data = case_data(1)
    for force, checkpoint in (("c", personal_checkpoint("c")), (GLOBAL, GLOBAL_CHECKPOINT), ("a", FINAL_CHECKPOINT)):
        made = predictor(model, force=force)
        assert torch.equal(made.predict_logits_from_preprocessed_data(data), stock_logits(model, checkpoint, data))
        assert made.router.choose(data, None) == (Route(force, "forced"), None)
    with pytest.raises(ConfigurationError, match=r"--force d: there is no such model in .*; there are global, a, b, c"):
        predictor(model, force="d")


def test_folds_are_averaged_and_decide_once(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    soft = leveled_selector(1.0)
    write_model(tmp_path / "other", fold=1, seed=1, selector=soft, validation=validation(temperature=2.0))
    (tmp_path / "other/fold_1").rename(folder / "fold_1")
    entry = read_bundle(tmp_path / "other").folds["1"]
    bundle = read_bundle(folder)
    (folder / BUNDLE).write_text(bundle.model_copy(update={"folds": {**bundle.folds, "1": entry}}).model_dump_json())

    data, made = case_data(1), predictor(folder, None, gamma=0.5)
    expected = stock_logits(folder, personal_checkpoint("b"), data, folds=(0, 1))
    assert torch.equal(made.predict_logits_from_preprocessed_data(data), expected)
    together = made.router.choose(data, None)[1]
    apart = [predictor(folder, (fold,)).router.choose(data, None)[1] for fold in (0, 1)]
    for site in SITES:
        assert together[site] == pytest.approx((apart[0][site] + apart[1][site]) / 2)
    assert apart[0]["b"] > apart[1]["b"] + 0.1
    with pytest.raises(ConfigurationError, match=r"has no fold 3; choose with -f from 0, 1"):
        predictor(folder, (0, 3))


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"gamma": 0.5}, "gamma"),
        ({"validation": SelectorValidation(("a", "b", "d"), 1, ((5, 0, 0),) * 3, (0, 0, 0))}, "sites"),
    ],
)
def test_folds_that_do_not_belong_together(tmp_path: Path, facts: dict[str, Any], what: str) -> None:
    folder = write_model(tmp_path / "model")
    shutil.copytree(folder / "fold_0", folder / "fold_1")
    entry = {"gamma": 0.9, "validation": validation(), "selector": SELECTOR, "selector_min_accuracy": 0.0, **facts}
    write_fold(folder, 1, site="a", shared=("b",), **entry)
    with pytest.raises(ConfigurationError, match=rf"trained with different {what} \(fold 0: .*; fold 1: .* with -f"):
        predictor(folder, None)
    predictor(folder, (1,))
    if what == "gamma":
        assert predictor(folder, None, gamma=0.7).router.gamma == 0.7


def test_folds_that_end_at_the_same_time_are_all_in_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read = write_model(tmp_path / "model"), bundle.read_bundle
    for fold in (1, 2):
        shutil.copytree(folder / "fold_0", folder / f"fold_{fold}")
    entry = {"gamma": 0.9, "validation": validation(), "selector": SELECTOR, "selector_min_accuracy": 0.0}

    def slowly(model_folder: Path) -> Any:
        found = read(model_folder)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(bundle, "read_bundle", slowly)

    def write(fold: int) -> None:
        write_fold(folder, fold, site="a", shared=("b",), **entry)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (2, 1)))
    assert list(read(folder).folds) == ["0", "1", "2"]
    assert not [*folder.glob("*.lock")]


def test_an_inaccurate_selector_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_model(tmp_path / "model", validation=validation(right=1))
    made = predictor(folder)
    assert "the selector of fold 0 reached an accuracy of 0.333" in caplog.text
    taken, probabilities = made.router.choose(case_data(-1), None)
    assert taken == Route(GLOBAL, "gate")
    assert probabilities["a"] > 0.9, "for the record"
    assert predictor(folder, force="a").router.choose(case_data(-1), None)[0].choice == "a"


def test_images_of_nobody_go_to_the_global_model(tmp_path: Path) -> None:
    seen = texture(draw_patches(case_data(-1), SELECTOR))
    precision = tuple(map(tuple, np.eye(len(seen)).tolist()))
    made = predictor(
        write_model(tmp_path / "model", familiarity=Familiarity({"a": tuple(seen.tolist())}, precision, 1.0))
    )
    taken, _ = made.router.choose(case_data(-1), None)
    assert (taken.choice, taken.reason) == ("a", "personal")
    assert taken.unfamiliarity == pytest.approx(0, abs=1e-9)
    noisy = case_data(-1) + 0.5 * torch.randn(1, 16, 20, 16, generator=torch.Generator().manual_seed(1))
    taken, probabilities = made.router.choose(noisy, None)
    assert (taken.choice, taken.reason) == (GLOBAL, "unfamiliar")
    assert max(probabilities, key=probabilities.get) == "a", "the selector alone would not have noticed"


def test_models_that_are_not_shared_or_not_better(tmp_path: Path) -> None:
    own = predictor(write_model(tmp_path / "own", shared=()))
    assert own.router.choose(case_data(-1), None)[0] == Route("a", "personal")
    assert own.router.choose(case_data(1), None)[0] == Route(GLOBAL, "not_shared")
    with pytest.raises(ConfigurationError, match="there are global, a. One that is not shared"):
        predictor(tmp_path / "own", force="b")
    dice = {site: ValidationDice(personal=0.8, common=0.7 if site == "a" else 0.8) for site in SITES}
    gated = predictor(write_model(tmp_path / "gated", validation_dice=dice))
    assert gated.router.choose(case_data(-1), None)[0] == Route("a", "personal")
    assert gated.router.choose(case_data(1), None)[0] == Route(GLOBAL, "best_model_gate")


# -------------------------------------------------------------------------------------------------------- bad files


class Command:
    """What a file may hold that runs when pickle reads it."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def test_nothing_runs_that_stands_in_a_model_folder(model: Path, tmp_path: Path) -> None:
    for name in (FINAL_CHECKPOINT, GLOBAL_CHECKPOINT, personal_checkpoint("b"), SELECTOR_FILE):
        assert "network_weights" in load_tensors(model / "fold_0" / name)
    torch.save({"network_weights": {}, "logging": Command(tmp_path / "ran")}, tmp_path / "checkpoint.pth")
    with pytest.raises(FederationError, match=r"checkpoint.pth cannot be read"):
        load_tensors(tmp_path / "checkpoint.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [FINAL_CHECKPOINT, GLOBAL_CHECKPOINT, personal_checkpoint("c"), SELECTOR_FILE])
def test_files_that_are_missing_or_changed(model: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    file = folder / "fold_0" / name
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(FederationError, match=rf"{name} is not the file that {BUNDLE} describes: its SHA-256"):
        predictor(folder)
    file.unlink()
    with pytest.raises(FederationError, match=rf"{name} cannot be read: No such file"):
        predictor(folder)


def test_a_selector_for_other_images(tmp_path: Path) -> None:
    two = SelectorConfiguration(channels=2, classes=3, patch_size=PATCH)
    folder = write_model(tmp_path / "model", configuration=two, selector=Selector(two))
    with pytest.raises(ConfigurationError, match=r"images of 2 channels .* have 1 channels"):
        predictor(folder)
    write_selector(folder / "fold_0" / SELECTOR_FILE, SELECTOR, leveled_selector())
    write_fold(
        folder, 0, site="a", gamma=0.9, selector=two, validation=validation(), selector_min_accuracy=0, shared=()
    )
    with pytest.raises(FederationError, match=r"fedsm_selector.pth holds the selector .*'channels': 1"):
        predictor(folder)


def changed(bundle: dict[str, Any], **fields: Any) -> str:
    return json.dumps({**bundle, "folds": {"0": {**bundle["folds"]["0"], **fields}}})


def test_bundles_that_are_none(model: Path, tmp_path: Path) -> None:
    good = json.loads((model / BUNDLE).read_text())
    entry = good["folds"]["0"]
    bad = {
        "is no valid bundle": "{",
        "format_version: there is no 2": json.dumps({**good, "format_version": 2}),
        "unknown key 'folds.0.lambda'": changed(good, **{"lambda": 1}),
        "gamma: input should be less than or equal to 1": changed(good, gamma=1.5),
        "sorted and each once": changed(good, sites=["b", "a", "c"]),
        "no site may be called 'global'": changed(good, sites=["a", "b", "global"]),
        "must be among a, b, c": changed(good, shared=["x"]),
        "must be of 3 sites": changed(good, selector={**entry["selector"], "classes": 4}),
        "one hash for each": changed(good, sha256={"../x": "0"}),
        "at least one channel": changed(good, selector={**entry["selector"], "channels": 0}),
    }
    for sentence, text in bad.items():
        (tmp_path / BUNDLE).write_text(text)
        with pytest.raises(ConfigurationError, match=BUNDLE) as told:
            read_bundle(tmp_path)
        assert sentence in str(told.value)
    with pytest.raises(ConfigurationError, match="Give the folder of a model that was trained with FedSM"):
        read_bundle(tmp_path / "nowhere")


def test_a_model_of_another_network(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    within = folder / "fold_0"
    write_checkpoint(within / personal_checkpoint("b"), within / FINAL_CHECKPOINT, {"w": torch.zeros(1)})
    write_fold(
        folder,
        0,
        site="a",
        gamma=0.9,
        selector=SELECTOR,
        validation=validation(),
        selector_min_accuracy=0,
        shared=("b",),
    )
    with pytest.raises(FederationError, match=r"checkpoint_personal_b.pth is of another network"):
        predictor(folder)


# -------------------------------------------------------------------------------------------------------- the command


def write_images(folder: Path, **levels: float) -> Path:
    folder.mkdir()
    for name, level in levels.items():
        image = sitk.GetImageFromArray(case_data(level)[0].numpy())
        sitk.WriteImage(image, str(folder / f"{name}_0000.nii.gz"))
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv(DEBUG_VARIABLE, "")

    def run(*arguments: Any) -> tuple[int, str, str]:
        given = {"-device": "cpu", "-npp": 0, "-nps": 0}
        options = [text for option, value in given.items() if option not in arguments for text in (option, value)]
        monkeypatch.setattr(sys, "argv", ["nnunet_fed", "predict", *map(str, (*arguments, *options))])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (0 if code is None else int(code)), *capsys.readouterr()

    return run


def routing(folder: Path) -> dict[str, tuple[str, str]]:
    cases = json.loads((folder / ROUTING).read_text())["cases"]
    return {case: (entry["choice"], entry["reason"]) for case, entry in cases.items()}


ROUTES = {"x": ("b", "personal"), "y": (GLOBAL, "below_gamma"), "z": ("a", "personal")}


def test_the_command_predicts_continues_and_keeps_a_record(model: Path, tmp_path: Path, command: Any) -> None:
    images, out = write_images(tmp_path / "in", z=-1, x=1, y=0), tmp_path / "deep" / "out"
    status, said, errors = command("-i", images, "-o", out, "-m", model, "-f", 0, "--save_probabilities")
    assert status == 0, errors
    assert "a (personal): 1 cases" in said
    assert routing(out) == ROUTES
    probabilities = json.loads((out / ROUTING).read_text())["cases"]["x"]["probabilities"]
    assert list(probabilities) == list(SITES)
    assert probabilities["b"] > 0.9

    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), (0,), personal_checkpoint("b"))
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential([[str(images / "x_0000.nii.gz")]], str(tmp_path / "stock"), True)
    with np.load(out / "x.npz") as ours, np.load(tmp_path / "stock/x.npz") as theirs:
        np.testing.assert_array_equal(ours["probabilities"], theirs["probabilities"])

    (out / "y.nii.gz").unlink()
    written = (out / "x.nii.gz").stat().st_mtime_ns
    assert command("-i", images, "-o", out, "-m", model, "--continue_prediction")[0] == 0
    assert (out / "x.nii.gz").stat().st_mtime_ns == written
    assert (out / "y.nii.gz").is_file()
    assert routing(out) == ROUTES
    status, _, errors = command("-i", images, "-o", out, "-m", model, "--continue_prediction", "--gamma", 0.5)
    assert status == 2
    assert "was begun with another gamma" in errors
    (out / ROUTING).write_text("[]")
    assert "cannot be read" in command("-i", images, "-o", out, "-m", model, "--continue_prediction")[2]


def test_processes_predict_what_one_process_predicts(model: Path, tmp_path: Path, command: Any) -> None:
    images, out = write_images(tmp_path / "in", z=-1, x=1, y=0), tmp_path / "out"
    status, _, errors = command(
        "-i", images, "-o", out, "-m", model, "-npp", 1, "-nps", 1, "--disable_tta", "-step_size", 1
    )
    assert status == 0, errors
    assert routing(out) == ROUTES


def test_the_second_stage_of_a_cascade_goes_on_from_what_the_first_has_predicted(
    model: Path, tmp_path: Path, command: Any
) -> None:
    second = write_model(tmp_path / "second", stage=CASCADE)
    images, before = write_images(tmp_path / "in", x=1, z=-1), tmp_path / "before"
    assert command("-i", images, "-o", before, "-m", model)[0] == 0
    arguments = ("-i", images, "-o", tmp_path / "out", "-m", second)
    status, _, errors = command(*arguments)
    assert status == 2
    assert "goes on from predictions of 3d_lowres: predict the same images with that model first" in errors
    status, _, errors = command(*arguments, "-prev_stage_predictions", images)
    assert f"-prev_stage_predictions {images}: x.nii.gz is missing; predict it with 3d_lowres first." in errors
    status, _, errors = command("-i", images, "-o", tmp_path / "o", "-m", model, "-prev_stage_predictions", before)
    assert "this model has no previous stage; leave the option out" in errors
    status, _, errors = command(*arguments, "-prev_stage_predictions", before)
    assert status == 0, errors
    assert routing(tmp_path / "out") == {case: ROUTES[case] for case in "xz"}, "the selector sees the images alone"
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(second), (0,), personal_checkpoint("b"))
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(
        [[str(images / "x_0000.nii.gz")]], str(tmp_path / "stock"), folder_with_segs_from_prev_stage=str(before)
    )
    ours, theirs = (tmp_path / name / "x.nii.gz" for name in ("out", "stock"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_header_features_come_from_the_raw_images(tmp_path: Path, command: Any) -> None:
    configuration = SelectorConfiguration(1, 3, PATCH, patches=2, header_features=True)
    selector = Selector(configuration)
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.zero_()
        selector.head.weight[2, -2] = 10  # the inverse hyperbolic sine of the mean speaks for site c
    folder = write_model(tmp_path / "model", configuration=configuration, selector=selector)
    images, out = write_images(tmp_path / "in", dark=-1, bright=1), tmp_path / "out"
    assert command("-i", images, "-o", out, "-m", folder)[0] == 0
    assert routing(out) == {"bright": ("c", "personal"), "dark": (GLOBAL, "below_gamma")}
    with pytest.raises(FederationError, match="Case 'array': its raw image is unknown"):
        predictor(folder).predict_logits_from_preprocessed_data(case_data(0))


def test_a_case_that_no_patch_fits_is_named(model: Path) -> None:
    with pytest.raises(FederationError, match="Case 'array': No patch of 1 channels"):
        predictor(model).predict_logits_from_preprocessed_data(torch.zeros(0, 16, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-i", "nowhere"), "-i nowhere: there is no such folder"),
        (("-i", "."), "there are no images with names as nnU-Net's"),
        (("-m", "nowhere"), "nowhere/fedsm_bundle.json cannot be read"),
        (("-f", "x"), "-f must be a whole number or 'all', not 'x'"),
        (("-f", 0, 7, "all"), "has no fold 7, all; choose with -f from 0"),
        (("--gamma", 2), "gamma is 2; it must lie between 0"),
        (("--force", "nobody"), "--force nobody: there is no such model"),
        (("-npp", 0, "-nps", 2), "-npp 0 -nps 2: give numbers from 1 on, or 0 for both"),
        (("-step_size", 0), "-step_size 0: it must be above 0"),
        (("-device", "mps"), "-device mps: torch finds no such device"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Any,
    arguments: tuple[Any, ...],
    sentence: str,
) -> None:
    images = write_images(tmp_path / "in", x=0)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    usual = {"-i": images, "-o": tmp_path / "out", "-m": model}
    rest = [text for option, value in usual.items() if option not in arguments for text in (option, value)]
    status, out, errors = command(*arguments, *rest)
    assert status == 2
    assert "Traceback" not in out + errors
    assert sentence in errors.splitlines()[-1]


def test_cases_that_lack_a_channel(model: Path, tmp_path: Path, command: Any) -> None:
    images = write_images(tmp_path / "in", x=0)
    shutil.copy(images / "x_0000.nii.gz", images / "x_0001.nii.gz")
    status, _, errors = command("-i", images, "-o", tmp_path / "out", "-m", model)
    assert status == 2
    assert "needs 1 channels of each case, but there are 2 of x_0000.nii.gz" in errors
