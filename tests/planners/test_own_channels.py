"""Sites whose channels are their own plan together: what depends on the channels is each site's, all else is common."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from planning_sites import (
    OTHER,
    POOL,
    SITE_A,
    SITE_B,
    SITE_C,
    few_samples,
    plan,
    read,
    set_paths,
    study,
    write_dataset,
)
from serving import Served, make_study, together
from workers import workers_as_threads

from nnunet_fed.agreement.fingerprint import INTENSITIES, LocalFingerprint
from nnunet_fed.agreement.fingerprint_files import COMMON
from nnunet_fed.agreement.plan_digest import comparable, plans_digest
from nnunet_fed.errors import DisagreementError, FederationError
from nnunet_fed.exchange.communicator import LocalFederation
from nnunet_fed.exchange.keys import PUBLISHED
from nnunet_fed.methods.fedoap import shared_names, stem_name
from nnunet_fed.methods.tensors import shared_tensors
from nnunet_fed.planners import joining, planning
from nnunet_fed.planners.dataset import find_dataset, reader_of
from nnunet_fed.planners.joining import join_and_preprocess
from nnunet_fed.planners.nnUNetPlannerFed import nnUNetPlannerFed
from nnunet_fed.planners.planning import plan_and_preprocess
from nnunet_fed.trainers.nnUNetTrainerFedOAP import nnUNetTrainerFedOAP

OWN = {"name": "fedoap", "private_stem": True}
SITES = {"a": SITE_A, "b": SITE_B, "c": SITE_C}
CHANNELS = {"a": ("CT",), "b": ("MRI",), "c": ("CT", "MRI")}
CASES = {"a": (0, 2, 4), "b": (1, 3), "c": (5,)}
OF_CHANNELS = ("normalization_schemes", "use_mask_for_norm")


@pytest.fixture(scope="module", params=["private", "lists"])
def planned(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Plans of three sites with channels of their own."""
    with pytest.MonkeyPatch.context() as patch:
        raw = set_paths(patch, tmp_path_factory.mktemp("own"))
        few_samples(patch)
        workers_as_threads(patch)
        patch.setattr(planning, "preprocess_dataset", lambda *_: None)
        for site, number in SITES.items():
            write_dataset(raw, number, CASES[site], CHANNELS[site])
        write_dataset(raw, POOL, range(6), ("CT",))
        results = plan(SITES, method=OWN, geometry=request.param)
        assert len({result.plans_digest for result in results.values()}) == 1
        yield [read(number, "nnUNetFedPlans.json") for number in SITES.values()]


def test_what_does_not_depend_on_the_channels_is_that_of_the_pool(planned: list[dict[str, Any]]) -> None:
    pool = comparable(
        LocalFederation(["pool"]).run(lambda seat: planning.agree(seat, study(["pool"]), POOL, 1))["pool"].plans
    )
    del pool[INTENSITIES]
    for configuration in pool["configurations"].values():
        for key in OF_CHANNELS:
            del configuration[key]
    assert [comparable(plans) for plans in planned] == [pool] * 3


def test_what_depends_on_the_channels_is_what_nnunet_finds_at_the_site_alone(planned: list[dict[str, Any]]) -> None:
    for plans, number in zip(planned, SITES.values(), strict=True):
        dataset = find_dataset(number)
        samples = int(10e4 // len(dataset.cases))
        found = [
            DatasetFingerprintExtractor.analyze_case(case["images"], case["label"], reader_of(dataset), samples)[2]
            for case in dataset.cases.values()
        ]
        assert plans[INTENSITIES].keys() == {str(channel) for channel in range(len(dataset.channel_names))}
        for channel, properties in plans[INTENSITIES].items():
            values = np.concatenate([case[int(channel)] for case in found])
            low, median, high = np.percentile(values, (0.5, 50, 99.5))
            assert (properties["percentile_00_5"], properties["median"], properties["percentile_99_5"]) == (
                low, median, high
            )  # fmt: skip
            assert properties["mean"] == pytest.approx(np.mean(values, dtype=np.float64))
        assert read(number, COMMON)[INTENSITIES] == plans[INTENSITIES]
    schemes = [plans["configurations"]["3d_fullres"]["normalization_schemes"] for plans in planned]
    assert schemes == [["CTNormalization"], ["ZScoreNormalization"], ["CTNormalization", "ZScoreNormalization"]]


def test_the_networks_share_all_but_the_first_convolution(planned: list[dict[str, Any]]) -> None:
    networks = [network(plans, number) for plans, number in zip(planned, SITES.values(), strict=True)]
    schemas = [{name: shape(net, name) for name in shared_names(net, private_stem=True)} for net in networks]
    assert schemas[0] == schemas[1] == schemas[2]
    stems = [shape(net, stem_name(net)) for net in networks]
    assert [stem[1] for stem in stems] == [1, 1, 2]


def network(plans: dict[str, Any], number: int) -> torch.nn.Module:
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    channels = determine_num_input_channels(manager, configuration, read(number, "dataset.json"))
    return nnUNetTrainerFedOAP.build_network_architecture(manager, configuration, channels, 3)


def shape(net: torch.nn.Module, name: str) -> tuple[int, ...]:
    return tuple(shared_tensors(net)[name].shape)


@pytest.mark.parametrize("network_class", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_nnunet_estimates_memory_without_the_channels(network_class: str) -> None:
    """So that sites with other numbers of channels get the same patches and batches."""
    three_d: list[Any] = [[3, 3, 3]] * 3
    blocks = "n_conv_per_stage" if network_class == "PlainConvUNet" else "n_blocks_per_stage"
    shape_of = {
        "n_stages": 3, "features_per_stage": [8, 16, 32], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": three_d, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], blocks: [2, 2, 2],
        "n_conv_per_stage_decoder": [2, 2],
    }  # fmt: skip
    name = f"dynamic_network_architectures.architectures.unet.{network_class}"
    estimates = {
        nnUNetPlannerFed.static_estimate_VRAM_usage((16, 16, 16), channels, 3, name, shape_of, ("conv_op",))
        for channels in (1, 8)
    }
    assert len(estimates) == 1


# ------------------------------------------------------------------------------------------------ joining, and refusals


Serve = Callable[..., Served]
DATASETS = {"a": SITE_A, "b": SITE_B, "c": OTHER}


@pytest.fixture
def intensities(instant: Any, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Any]]:
    """Foreground intensities of each channel by data set, for a made-up analysis."""
    made_up: dict[int, list[Any]] = {}

    def extract(dataset_id: int, total_cases: int, processes: int) -> LocalFingerprint:
        return LocalFingerprint([[1.0] * 3] * 2, [[20, 22, 24]] * 2, [0.5] * 2, made_up[dataset_id], {"lesion": []})

    for module in (planning, joining):
        monkeypatch.setattr(module, "extract", extract)
    return made_up


def make(raw: Path, intensities: dict[int, list[Any]], number: int, *channels: str) -> None:
    write_dataset(raw, number, (0, 1), channels)
    intensities[number] = [np.arange(number + channel, dtype=np.float32) for channel in range(len(channels))]


@pytest.mark.parametrize("geometry", ["private", "lists"])
def test_a_site_with_other_channels_joins_later(
    serve: Serve,
    raw: Path,
    intensities: dict[int, list[Any]],
    geometry: str,
) -> None:
    make(raw, intensities, SITE_A, "CT")
    make(raw, intensities, SITE_B, "MRI")
    make(raw, intensities, OTHER, "T2", "CT", "noNorm")

    def run(served: Served, site: str, function: Any) -> Any:
        return function(served.seat(site, "planning"), served.study, DATASETS[site], None, 1)

    first = serve(make_study("ab", method=OWN, geometry=geometry))
    together(lambda: run(first, "a", plan_and_preprocess), lambda: run(first, "b", plan_and_preprocess))
    first.stop()
    before = read(SITE_A, "nnUNetFedPlans.json")

    second = serve(make_study("abc", method=OWN, geometry=geometry))
    published = second.seat("c", "planning").gathered(PUBLISHED)
    assert published is not None
    text = json.dumps(published)
    assert "percentile" not in text, "no site's intensities"
    assert "Normalization" not in text

    assert run(second, "c", join_and_preprocess).plans_digest == before["federation"]["plans_digest"]
    plans = read(OTHER, "nnUNetFedPlans.json")
    assert plans_digest(plans) == plans["federation"]["plans_digest"]
    assert [properties["max"] for properties in plans[INTENSITIES].values()] == [20.0, 21.0, 22.0]
    for name, configuration in plans["configurations"].items():
        assert configuration.keys() == before["configurations"][name].keys()
        assert [configuration[key] for key in OF_CHANNELS] == [
            ["ZScoreNormalization", "CTNormalization", "NoNormalization"], [True, False, False],
        ]  # fmt: skip
    assert network(plans, OTHER).encoder.stages[0][0].convs[0].conv.weight.shape[1] == 3  # type: ignore[union-attr,index]


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize(("method", "remedy"), [("fedoap", True), ("fedavg", False)])
def test_channels_that_differ_without_the_option(raw: Path, method: str, remedy: bool) -> None:
    write_dataset(raw, SITE_A, (0, 1), ("CT",))
    write_dataset(raw, SITE_B, (0, 1), ("MRI",))
    with pytest.raises(DisagreementError, match="differ in channels:") as error:
        plan({"a": SITE_A, "b": SITE_B}, method={"name": method})
    assert ("'private_stem = true' in federation.toml" in str(error.value)) == remedy


def test_labels_must_agree_nevertheless(raw: Path) -> None:
    write_dataset(raw, SITE_A, (0, 1), ("CT",))
    write_dataset(raw, SITE_B, (0, 1), ("MRI",), labels={"background": 0, "organ": 1, "tumour": 2})
    with pytest.raises(DisagreementError, match="differ in labels:") as error:
        plan({"a": SITE_A, "b": SITE_B}, method=OWN)
    assert "private_stem" not in str(error.value)


def test_a_site_without_foreground(raw: Path, intensities: dict[int, list[Any]]) -> None:
    make(raw, intensities, SITE_A, "CT")
    intensities[SITE_A] = [np.array([], np.float32)]
    with pytest.raises(FederationError, match="No training case of this site has foreground"):
        plan({"a": SITE_A}, method=OWN)
