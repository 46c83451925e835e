"""A data set of a few small slices, preprocessed, and plans with a tiny network: nnU-Net's trainers run in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_fed.study.federation import PLANS_KEY, Federation

DATASET = "Dataset001_Tiny"
PATCHES = {"2d": [16, 16], "3d_fullres": [8, 16, 16]}
DESCRIPTION: dict[str, Any] = {
    "channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1, "lesion": 2}, "numTraining": 4,
    "file_ending": ".nii.gz",
}  # fmt: skip


def tiny_plans(study: Federation | None = None) -> dict[str, Any]:
    """As a trainer takes them; with a study as the planners leave it."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    resample = {
        f"resampling_fn_{what}{suffix}": value
        for what in ("data", "seg", "probabilities")
        for suffix, value in (("", "resample_data_or_seg_to_shape"), ("_kwargs", resampling))
    }
    carried = {} if study is None else {PLANS_KEY: {"study": study.model_dump(mode="json")}}
    return {
        "dataset_name": DATASET, "plans_name": "nnUNetFedPlans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "continue_training": False,
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0], "original_median_shape_after_transp": [3, 20, 20],
        "foreground_intensity_properties_per_channel": {"0": {}}, **carried,
        "configurations": {
            name: {
                "data_identifier": "tiny", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
                "patch_size": patch, "spacing": [1.0] * len(patch), "normalization_schemes": ["NoNormalization"],
                "use_mask_for_norm": [False], "batch_dice": False, "architecture": architecture(len(patch)), **resample,
            }
            for name, patch in PATCHES.items()
        },
    }  # fmt: skip


def architecture(dimensions: int) -> dict[str, Any]:
    """Of a U-Net with three stages."""
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions] * 3, "strides": [[stride] * dimensions for stride in (1, 2, 2)],
            "n_conv_per_stage": [1, 1, 1], "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d", "norm_op_kwargs": {"affine": True},
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }  # fmt: skip


def tiny_cascade(study: Federation | None = None) -> dict[str, Any]:
    """The same with the two stages of a cascade, by nnU-Net's names; both have the slices as they are."""
    plans = tiny_plans(study)
    configurations = plans["configurations"]
    configurations["3d_lowres"] = {**configurations["2d"], "next_stage": "3d_cascade_fullres"}
    configurations["3d_cascade_fullres"] = {"inherits_from": "2d", "previous_stage": "3d_lowres"}
    return plans


def write_preprocessed(folder: Path, cases: int = 5, slices: int = 3) -> None:
    """Write ``folder`` as nnU-Net's folder of preprocessed data."""
    dataset = folder / DATASET
    (dataset / "tiny").mkdir(parents=True)
    (dataset / "dataset_fingerprint.json").write_text("{}")
    names = [f"case_{number}" for number in range(cases)]
    (dataset / "splits_final.json").write_text(json.dumps([{"train": names[1:], "val": names[:1]}]))
    random = np.random.default_rng(0)
    for name in names:
        labels = np.zeros((1, slices, 20, 20), np.int16)
        row, column = random.integers(2, 8, 2)
        labels[:, :, row : row + 10, column : column + 10] = 1
        labels[:, :, row + 3 : row + 7, column + 3 : column + 7] = 2
        image = labels + random.normal(0, 0.3, labels.shape)
        places = {label: np.argwhere(labels == label) for label in (1, 2)}
        nnUNetDatasetBlosc2.save_case(
            image.astype(np.float32), labels, {"class_locations": places, "spacing": [1.0, 1.0, 1.0]},
            str(dataset / "tiny" / name), chunks=(1, 1, 20, 20), blocks=(1, 1, 20, 20),
        )  # fmt: skip
