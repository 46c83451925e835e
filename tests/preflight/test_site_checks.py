"""``nnunet_fed check``: what is wrong at a site is told, with the remedy, before the study begins."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from made_sites import raw as made_raw
from other_users import bound_to_permissions
from serving import Served, make_study, together
from typer.testing import CliRunner

from nnunet_fed.agreement.plan_digest import plans_digest
from nnunet_fed.certificates.authority import Authority
from nnunet_fed.cli.app import app
from nnunet_fed.datasets.findings import FILE
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.preflight import folder_checks, resources
from nnunet_fed.preflight import site_checks as checks
from nnunet_fed.preflight.site_checks import Finding, Outcome
from nnunet_fed.simulation.simulate import plugin_folder
from nnunet_fed.study.federation import PLANS_KEY, Federation
from nnunet_fed.study.site import SITE_FILE_VARIABLE
from nnunet_fed.transport.channel.noise import noise
from nnunet_fed.transport.channel.tls import KeyFiles
from nnunet_fed.transport.coordinator import check_service
from nnunet_fed.transport.proto import check_pb2 as pb
from nnunet_fed.transport.proto.check_pb2_grpc import CheckStub
from nnunet_fed.transport.site import connection_checks

Serve = Callable[..., Served]
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [2, 2, 2]], "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1], "conv_bias": True, "norm_op": None, "norm_op_kwargs": None,
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}  # fmt: skip
PARAMETERS = (27 * 4 + 4) + (27 * 4 * 8 + 8) + (8 * 8 * 4 + 4) + (27 * 8 * 4 + 4) + (4 * 2 + 2)
"""Encoder's two convolutions, transposed convolution, decoder's convolution, head; one channel, two classes."""


def federated_plans(study: Federation) -> dict[str, Any]:
    configuration = {
        "data_identifier": "cases", "batch_size": 2, "patch_size": [16, 16, 16], "architecture": ARCHITECTURE,
    }  # fmt: skip
    plans: dict[str, Any] = {"plans_name": "nnUNetFedPlans", "configurations": {"3d_fullres": configuration}}
    carried = {"digest": study.digest, "study": study.model_dump(mode="json"), "plans_digest": plans_digest(plans)}
    return {**plans, PLANS_KEY: carried}


class AtASite:
    """A site's folder and environment, and its ``nnunet_fed check``."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder = folder
        for name in folder_checks.FOLDERS:
            (folder / name).mkdir(parents=True)
            patch.setenv(name, str(folder / name))
        patch.setenv(checks.EXTERNAL_TRAINERS, str(plugin_folder()))
        patch.setenv(SITE_FILE_VARIABLE, str(folder / "site.toml"))
        self.data = folder / folder_checks.PREPROCESSED / "Dataset007_Test"
        (folder / folder_checks.RAW / self.data.name / "imagesTr").mkdir(parents=True)

    def set_up(self, address: str, name: str = "a", keys: Path | None = None) -> None:
        tls = "insecure = true\n"
        if keys is not None:
            files = {"certificate": "certificate.pem", "key": "key.pem", "ca": "ca.pem"}
            tls = "".join(f'{key} = "{keys / file}"\n' for key, file in files.items())
        (self.folder / "site.toml").write_text(
            f'name = "{name}"\ncoordinator = "{address}"\nconnect_minutes = 0.05\n{tls}'
        )

    def plan(self, plans: dict[str, Any]) -> None:
        (self.data / "cases").mkdir(parents=True, exist_ok=True)
        (self.data / "nnUNetFedPlans.json").write_text(json.dumps(plans))
        dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
        (self.data / "dataset.json").write_text(json.dumps({**dataset, "numTraining": 3}))

    def __call__(self, *options: str) -> tuple[int, dict[str, Finding]]:
        """Exit status and findings."""
        result = CliRunner().invoke(app, ["check", "-device", "cpu", "--megabytes", "0.5", "--json", *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        found = [Finding(**{**entry, "state": Outcome(entry["state"])}) for entry in json.loads(result.stdout)]
        return result.exit_code, {finding.about: finding for finding in found}


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AtASite:
    monkeypatch.setattr(folder_checks, "LEAST_RESULTS_GB", 0.001)
    monkeypatch.setattr(folder_checks, "LEAST_PREPROCESSED_GB", 0.001)
    return AtASite(tmp_path / "site", monkeypatch)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "study")


def with_tls(serve: Serve, authority: Authority) -> Served:
    folder = authority.site("coordinator", ["127.0.0.1"])
    return serve(make_study("ab"), keys=KeyFiles(*(folder / f"{name}.pem" for name in ("certificate", "key", "ca"))))


def states(found: dict[str, Finding], state: Outcome) -> set[str]:
    return {about for about, finding in found.items() if finding.state is state}


# ------------------------------------------------------------------------------------------------- all of it


def test_everything_is_fine(serve: Serve, authority: Authority, at: AtASite) -> None:
    served = with_tls(serve, authority)
    files = {site: authority.site(site) for site in "ab"}
    at.set_up(served.server.address, keys=files["a"])
    plans = federated_plans(served.study)
    at.plan(plans)
    made_raw(at.folder / folder_checks.RAW / at.data.name, channels=1)
    seats = {site: served.seat(site, "planning", files=files[site]) for site in "ab"}
    digest = {"digest": plans[PLANS_KEY]["plans_digest"]}
    together(*(lambda seat=seat: seat.gather("planning/plans", digest) for seat in seats.values()))  # type: ignore[misc]
    status, found = at("-d", "7", "-tr", "nnUNetTrainerFedAvg")
    assert states(found, Outcome.ok) == set(found), found
    assert status == 0
    assert list(found) == [
        "site.toml", "certificates", "name", "port", "TLS", "coordinator", "clock", "versions", "nnU-Net paths",
        "fold", "trainer", "plans", "memory", "disk", "transfer",
    ]  # fmt: skip
    assert "agreed with a, b" in found["plans"].text
    assert f"{PARAMETERS / 1e6:.1f} M parameters" in found["memory"].text
    sent = [json.loads(line) for line in (at.folder / "outgoing.jsonl").read_text().splitlines()]
    assert [entry["what"] for entry in sent] == ["introduce", "noise"]
    assert sent[0]["versions"] == checks.own_versions()
    assert sent[1]["bytes"] == 500_000


def test_nothing_is_there(at: AtASite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SITE_FILE_VARIABLE, folder_checks.RAW, checks.EXTERNAL_TRAINERS):
        monkeypatch.delenv(name)
    status, found = at()
    assert status == 1
    assert states(found, Outcome.failed) == {"site.toml", "nnU-Net paths", "trainer"}
    assert "nnunet_fed init" in found["site.toml"].text
    assert "nnunet_fed plugin-path" in found["trainer"].remedy
    assert found["coordinator"].state is found["transfer"].state is found["plans"].state is Outcome.skipped


def test_nothing_is_sent_that_cannot_be_listed(serve: Serve, at: AtASite) -> None:
    served = serve(make_study("ab"))
    at.set_up(served.server.address)
    (at.folder / "outgoing.jsonl").mkdir()
    status, found = at()
    assert (status, found["coordinator"].state) == (1, Outcome.failed)
    assert "outgoing.jsonl" in found["coordinator"].text
    assert served.coordinator.introduce("b", {}) == {"b": {}}, "site a has told nothing"


# ------------------------------------------------------------------------------------------- the way to the coordinator


def test_a_name_that_nobody_knows(at: AtASite, authority: Authority) -> None:
    at.set_up("coordinator.invalid:7464", keys=authority.site("a"))
    status, found = at()
    assert (status, found["name"].state) == (1, Outcome.failed)
    assert "coordinator.invalid of the coordinator is not known here" in found["name"].text
    assert "port" not in found


def test_a_closed_port(at: AtASite) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at.set_up(f"127.0.0.1:{free.getsockname()[1]}")
        _, found = at()
    assert found["port"].state is Outcome.failed
    assert "firewall" in found["port"].remedy


def test_another_authority(serve: Serve, at: AtASite, authority: Authority, tmp_path: Path) -> None:
    served = with_tls(serve, authority)
    at.set_up(served.server.address, keys=Authority.create(tmp_path / "other", "other").site("a"))
    _, found = at()
    assert found["port"].state is Outcome.ok
    assert found["TLS"].state is Outcome.failed
    assert "not signed by an authority" in found["TLS"].text


def test_a_certificate_that_ends_soon(at: AtASite, authority: Authority) -> None:
    at.set_up("coordinator.invalid:7464", keys=authority.site("a", days=5))
    _, found = at()
    assert found["certificates"].state is Outcome.warning
    assert "ends in 5 days" in found["certificates"].text


def test_somebody_elses_certificate(at: AtASite, authority: Authority) -> None:
    at.set_up("coordinator.invalid:7464", keys=authority.site("b"))
    _, found = at()
    assert found["certificates"].state is Outcome.failed
    assert "is of 'b'" in found["certificates"].text


def test_a_site_that_is_not_in_the_study(serve: Serve, at: AtASite, authority: Authority) -> None:
    served = with_tls(serve, authority)
    at.set_up(served.server.address, name="outsider", keys=authority.site("outsider"))
    _, found = at()
    assert (found["TLS"].state, found["coordinator"].state) == (Outcome.ok, Outcome.failed)
    assert "'outsider' is not a site of the study" in found["coordinator"].text


def test_who_is_not_a_site_may_not_check(serve: Serve, authority: Authority) -> None:
    served = with_tls(serve, authority)
    for name, claimed in (("watcher", "watcher"), ("outsider", "a"), ("a", "b")):
        folder = authority.site(name)
        ca, key, own = ((folder / file).read_bytes() for file in ("ca.pem", "key.pem", "certificate.pem"))
        credentials = grpc.ssl_channel_credentials(ca, key, own)
        with grpc.secure_channel(served.server.address, credentials) as channel:
            stub = CheckStub(channel)
            calls = [
                lambda stub=stub, claimed=claimed: stub.Introduce(pb.IntroduceRequest(site=claimed), timeout=10),
                lambda stub=stub, claimed=claimed: list(
                    stub.Receive(pb.NoiseRequest(site=claimed, size=9), timeout=10)
                ),
            ]
            if name != "a":  # noise says no name
                calls.append(lambda stub=stub: stub.Send(noise(9), timeout=10))
            for call in calls:
                with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED"):
                    call()
    assert served.coordinator.introduce("b", {}) == {"b": {}}, "nobody has told anything"


def test_another_protocol(serve: Serve, at: AtASite, monkeypatch: pytest.MonkeyPatch) -> None:
    at.set_up(serve(make_study("ab")).server.address)
    monkeypatch.setattr(check_service, "spoken_protocol", lambda *_: 99)
    _, found = at()
    assert found["coordinator"].state is Outcome.failed
    assert "speaks version 99 of the protocol, this site versions" in found["coordinator"].text


def test_a_coordinator_that_knows_no_checks(serve: Serve, at: AtASite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_fed.transport.coordinator.server.serve_checks", lambda *_: None)
    at.set_up(serve(make_study("ab")).server.address)
    _, found = at()
    assert "older than checks are" in found["coordinator"].text


def test_more_than_a_check_may_send(serve: Serve) -> None:
    served = serve(make_study("ab"))
    too_much = check_service.MOST_NOISE + 1
    with grpc.insecure_channel(served.server.address) as channel:
        stub = CheckStub(channel)
        for call in (
            lambda: stub.Send(noise(too_much), timeout=60),
            lambda: list(stub.Receive(pb.NoiseRequest(site="a", size=too_much), timeout=60)),
        ):
            with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
                call()
        with pytest.raises(grpc.RpcError, match="too long"):
            stub.Introduce(pb.IntroduceRequest(site="a", versions={"torch": "9" * 1000}), timeout=60)


def test_a_line_that_changes_what_is_sent(serve: Serve, at: AtASite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        check_service.CheckService, "Send", lambda self, requests, _: pb.NoiseCount(size=len(next(requests).data) - 1)
    )
    at.set_up(serve(make_study("ab")).server.address)
    _, found = at()
    assert found["transfer"].state is Outcome.failed
    assert "Of 500000 bytes 499999 arrived" in found["transfer"].text


def test_a_slow_line(serve: Serve, at: AtASite, monkeypatch: pytest.MonkeyPatch) -> None:
    at.set_up(serve(make_study("ab")).server.address)
    monkeypatch.setattr(connection_checks, "SLOWEST", 1e15)
    status, found = at()
    assert found["transfer"].state is Outcome.warning
    assert status == 3


# ----------------------------------------------------------------------------------------------------- one by one


def test_versions_are_told_by_all_sites_and_survive_a_restart(serve: Serve, tmp_path: Path) -> None:
    served = serve(make_study("ab"))
    served.coordinator.introduce("a", {"torch": "1"})
    served.stop()
    again = serve(make_study("ab"))
    assert again.coordinator.introduce("b", {"torch": "2"}) == {"a": {"torch": "1"}, "b": {"torch": "2"}}


@pytest.mark.parametrize(
    ("other", "state", "told"),
    [
        ({"nnunet-fed": "1", "nnunetv2": "2.8.1", "torch": "2.9.0"}, Outcome.ok, "no other at b"),
        (
            {"nnunet-fed": "1", "nnunetv2": "2.9.0", "torch": "2.9.0"},
            Outcome.failed,
            "nnunetv2 is 2.8.1 here, 2.9.0 at",
        ),
        ({"nnunet-fed": "1", "nnunetv2": "2.8.1", "torch": "2.8.0"}, Outcome.warning, "torch is 2.9.0+cpu here, 2.8.0"),
        ({"nnunet-fed": "1"}, Outcome.ok, "no other at b"),
    ],
)
def test_versions(other: dict[str, str], state: Outcome, told: str) -> None:
    own = {"nnunet-fed": "1", "nnunetv2": "2.8.1", "torch": "2.9.0+cpu"}
    finding = checks.check_versions("a", {"a": own, "b": other})
    assert finding.state is state
    assert told in finding.text


def test_the_clock() -> None:
    now = time.time()
    assert checks.check_clock(now, now + 3, 0.1).state is Outcome.ok
    behind = checks.check_clock(now, now + 3600, 0.1)
    assert (behind.state, "behind" in behind.text) == (Outcome.warning, True)
    assert "ahead of" in checks.check_clock(now, now - 3600, 0.1).text


def test_plans(at: AtASite) -> None:
    study = make_study("ab")
    plans = federated_plans(study)
    published = {"a": {"digest": plans[PLANS_KEY]["plans_digest"]}, "b": {"digest": "other"}}

    def state(plans: dict[str, Any], study: Federation = study, **options: Any) -> str:
        given = {"published": None, "configuration": "3d_fullres", **options}
        return checks.check_plans(plans, study, **given).text

    assert "belong to another study" in state(plans, make_study("ab", rounds=99))
    assert "b planned something else" in state(plans, published=published)
    assert "no configuration 2d" in state(plans, configuration="2d")
    edited = json.loads(json.dumps(plans))
    edited["configurations"]["3d_fullres"]["batch_size"] = 3
    assert "were changed since" in state(edited)
    assert state(plans).startswith("study ")


def test_plans_that_are_looked_for(at: AtASite) -> None:
    study = make_study("ab")
    at.plan(federated_plans(study))

    def found(name: str | None = None) -> Any:
        return checks.find_plans(at.data, name, study)

    assert found()[PLANS_KEY]["digest"] == study.digest
    assert found("nnUNetFedPlans") == found()
    assert found("otherPlans").state is Outcome.skipped
    (at.data / "nnUNetPlans.json").write_text("{}")
    assert found() == found("nnUNetFedPlans"), "nnU-Net's own plans are beside it"
    assert "was not made for a federation" in found("nnUNetPlans").text
    shutil.copy(at.data / "nnUNetFedPlans.json", at.data / "secondPlans.json")
    assert "-p" in found().remedy
    (at.data / "nnUNetFedPlans.json").write_text("{")
    assert "cannot be read" in found().text


def test_the_trainer(at: AtASite, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs T, not U" in checks.check_trainer(plugin_folder(), "U", "T").text
    average, adam = "nnUNetTrainerFedAvg", "nnUNetTrainerFedAdam"
    assert checks.check_trainer(plugin_folder(), adam, average).state is Outcome.failed
    assert checks.check_trainer(plugin_folder(), "nnUNetTrainerMine", average).state is Outcome.warning
    monkeypatch.setenv(checks.EXTERNAL_TRAINERS, os.pathsep.join(["/elsewhere", str(plugin_folder())]))
    assert checks.check_trainer(plugin_folder(), None, "T").state is Outcome.ok


def test_the_folders(at: AtASite, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_checks.check_paths().state is Outcome.ok
    monkeypatch.setenv(folder_checks.RESULTS, str(at.folder / "nowhere"))
    assert "is no folder" in folder_checks.check_paths().text


def test_folders_of_another_user(at: AtASite) -> None:
    """In a process that is bound to permissions, whoever runs the tests."""
    results = at.folder / folder_checks.RESULTS / at.data.name
    files = {
        "": Outcome.ok,
        str(at.data / "nnUNetFed_3d" / "case.b2nd"): Outcome.warning,
        str(at.folder / folder_checks.RAW / at.data.name / "imagesTr" / "c0_0000.nii.gz"): Outcome.failed,
        str(results / "nnUNetTrainerFedAvg__Plans__3d" / "fold_0" / "progress.png"): Outcome.failed,
        str(results / "nnUNetTrainer__Plans__3d" / "fold_0" / "progress.png"): Outcome.ok,
    }
    look = (
        "from nnunet_fed.preflight.folder_checks import check_paths; found = check_paths([7], 'nnUNetTrainerFedAvg'); "
        "print(found.state.value, found.line)"
    )
    for path, state in files.items():
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).touch()
            Path(path).chmod(0 if "imagesTr" in path else 0o444)
        said = subprocess.run(bound_to_permissions(sys.executable, "-c", look), capture_output=True, text=True)
        assert said.stdout.split(" ")[0] == state.value, said
        assert state is Outcome.ok or path in said.stdout
        if path:
            Path(path).unlink()
    at.data.chmod(0o500)
    said = subprocess.run(bound_to_permissions(sys.executable, "-c", look), capture_output=True, text=True)
    at.data.chmod(0o700)
    assert said.stdout.startswith("warning"), said
    assert f"{at.data} cannot be written by this user" in said.stdout


def test_the_disk(at: AtASite) -> None:
    assert folder_checks.check_disk(0, 0).state is Outcome.ok
    free = shutil.disk_usage(at.folder).free
    short = folder_checks.check_disk(0.6 * free, 0.6 * free)
    assert short.state is Outcome.failed, "both folders are on one disk"
    assert "nnUNet_preprocessed and nnUNet_results" in short.text


def test_what_the_images_take_once_they_were_looked_at(at: AtASite) -> None:
    assert folder_checks.voxels_of_images(at.data) is None
    at.data.mkdir(parents=True)
    files = [{"facts": {"shape": [10, 20, 30], "planes": 1}}, {"facts": {"shape": [10, 20, 30]}}]
    (at.data / FILE).write_text(json.dumps({"files": files}))
    voxels = folder_checks.voxels_of_images(at.data)
    assert voxels == 12_000
    raw = at.folder / folder_checks.RAW / at.data.name
    assert folder_checks.preprocessed_bytes(raw, None, voxels) == 48_000


def test_preprocessing_that_was_killed_takes_as_much_again(at: AtASite) -> None:
    raw = at.folder / folder_checks.RAW / at.data.name
    half = at.data / "nnUNetFed_3d_fullres_0123"
    half.mkdir(parents=True)
    assert folder_checks.preprocessed_bytes(raw, half) > 0
    (at.data / f"{half.name}.complete.json").write_text("{}")
    assert folder_checks.preprocessed_bytes(raw, half) == 0


@pytest.mark.parametrize(
    ("cases", "folds", "state", "told"),
    [
        (5, None, Outcome.ok, "0, of 5 that nnU-Net makes"),
        (3, None, Outcome.warning, "3 training cases, too few for nnU-Net's 5 folds"),
        (3, [["c0", "c1"], ["c2"]], Outcome.ok, "0 of "),
        (1, None, Outcome.failed, r"at least 2 \(min_cases\)"),
        (5, [["c0", "c1", "c9"], ["c2"]], Outcome.warning, r"2 cases \(c3, c4\) new, 1 case \(c9\) gone"),
    ],
)
def test_the_fold(at: AtASite, cases: int, folds: list[list[str]] | None, state: Outcome, told: str) -> None:
    raw = at.folder / folder_checks.RAW / at.data.name
    if folds is not None:
        at.data.mkdir(parents=True)
        (at.data / "splits_final.json").write_text(json.dumps([dict(zip(("train", "val"), folds, strict=True))]))
    names = [f"c{case}" for case in range(cases)]
    found = folder_checks.check_fold(make_study("ab", min_cases=2), names, raw, at.data)
    assert found.state is state
    assert re.search(told, found.text)


def test_what_preprocessing_takes(at: AtASite) -> None:
    raw = at.folder / folder_checks.RAW / at.data.name
    (raw / "imagesTr" / "case").write_bytes(bytes(10**6))
    assert folder_checks.preprocessed_bytes(raw, at.data / "cases") == folder_checks.PREPROCESSED_PER_RAW * 10**6
    (at.data / "cases").mkdir(parents=True)
    assert folder_checks.preprocessed_bytes(raw, at.data / "cases") == 0


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study("abc")
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}}
    one = resources.footprint(federated_plans(study), "3d_fullres", dataset, study)
    assert one.parameters == PARAMETERS
    other = make_study("abc", method={"name": "fedsm"})
    two = resources.footprint(federated_plans(other), "3d_fullres", dataset, other)
    assert two.step_bytes - one.step_bytes == pytest.approx(3 * 4 * PARAMETERS), "a second model with its optimizer"
    assert two.results_bytes > 2 * one.results_bytes
    monkeypatch.setattr(resources, "host_memory", lambda: (one.step_bytes / 2, 2 * one.step_bytes))
    assert "End what else uses it" in resources.check_memory(one, "cpu").remedy
    monkeypatch.setattr(resources, "host_memory", lambda: (one.step_bytes / 3, one.step_bytes / 2))
    assert "hardly fit" in resources.check_memory(one, "cpu").text
    assert "(50% of the planner's own)" in resources.check_memory(one, "cpu").remedy
    assert "(4 instead of 8)" in resources.check_memory(one, "cpu", target=8).remedy
    monkeypatch.setattr(resources.torch.cuda, "is_available", lambda: False)
    assert resources.check_memory(one, "cuda").state is Outcome.failed


def test_memory_is_of_what_is_really_trained(at: AtASite, serve: Serve) -> None:
    """FedOAP's adapter and its fine-tuning, not the plans' network alone; where that fails, it is said."""
    network = {**ARCHITECTURE["arch_kwargs"], "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d"}
    network = {**network, "norm_op_kwargs": {"affine": True}}
    study = make_study("ab", method={"name": "fedoap"})
    served = serve(study)
    at.set_up(served.server.address)
    plans = federated_plans(study)
    configuration = {"spacing": [1, 1, 1], "batch_dice": False, **plans["configurations"]["3d_fullres"]}
    names = [*ARCHITECTURE["_kw_requires_import"]]
    configuration["architecture"] = {**ARCHITECTURE, "arch_kwargs": network, "_kw_requires_import": names}
    plans["configurations"]["3d_fullres"] = {**configuration, "normalization_schemes": ["CTNormalization"]}
    at.plan({"dataset_name": at.data.name, "image_reader_writer": "SimpleITKIO", **plans})
    memory = at("-d", "7")[1]["memory"]
    assert "GB in training, 0.0 GB in fine-tuning" in memory.text
    assert "nnU-Net's own" not in memory.text
    assert list((at.folder / folder_checks.RESULTS).iterdir()) == []
    other = at("-d", "7", "-tr", "nnUNetTrainerFedAvg")[1]["memory"]
    assert "by nnU-Net's own reckoning of the plans, since: " in other.text


def test_the_memory_of_a_base_trainers_network() -> None:
    study = make_study("abc", trainer="nnUNetTrainerTinyPrimus")
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lesion": 1}}

    def build(plans: Any, configuration: Any, channels: int, classes: int, deep_supervision: bool) -> Any:
        return torch.nn.Conv3d(channels, classes, 1)

    found = resources.footprint(federated_plans(study), "3d_fullres", dataset, study, build)
    assert (found.parameters, found.steps) == (4, {})
    finding = resources.check_memory(found, "cpu")
    assert finding.state is Outcome.ok
    assert "is not known (0.0 M parameters)" in finding.text

    def fail(*_: Any) -> Any:
        raise AssertionError("only 3d is supported")

    with pytest.raises(ConfigurationError, match="cannot be built by these plans: AssertionError: only 3d is supp"):
        resources.footprint(federated_plans(study), "3d_fullres", dataset, study, fail)


def test_check_finds_a_base_trainer_that_is_not_there(at: AtASite, serve: Serve) -> None:
    served = serve(make_study("ab", trainer="nnUNetTrainerThatIsNot"))
    at.set_up(served.server.address)
    _, findings = at()
    assert findings["trainer"].state is Outcome.failed
    assert "names the trainer 'nnUNetTrainerThatIsNot', and there is none here" in findings["trainer"].text
