"""``nnunet_fed check -d ID --data``: all that is wrong with a data set, without a coordinator."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from commands import Command
from faulty_data import arrays, describe, make, write_itk
from tiny import tiny_cascade
from workers import look_in_threads

from nnunet_fed.cli import check_command


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    look_in_threads(monkeypatch)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.delenv("nnUNet_fed_site", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return make(tmp_path / "nnUNet_raw" / "Dataset001_Own")


def test_good_data(command: Command, data: Path) -> None:
    _, out, _ = command("check", "-d", "1", "--data", "-device", "cpu")
    assert "ok       data           Dataset001_Own: 3 cases, no errors, no warnings; all of it stands in" in out


def test_all_faults_in_a_table_and_a_json(command: Command, data: Path, tmp_path: Path) -> None:
    write_itk(arrays(1)[1] * 7, data / "labelsTr" / "c1.nii.gz")
    describe(data, labels={"zero": 0, "organ": 1})
    status, out, _ = command("check", "-d", "1", "--data", "-device", "cpu")
    kept = tmp_path / "nnUNet_preprocessed" / "Dataset001_Own" / "data_check.json"
    assert status == 1
    assert f"3 cases, 2 errors, no warnings; all of it stands in {kept}." in out
    assert "labelsTr/c1.nii.gz" in out.partition("what to do")[2]
    assert [finding["kind"] for finding in json.loads(kept.read_text())["findings"]] == [
        "background",
        "unknown label values",
    ]
    status, out, _ = command("check", "-d", "1", "--data", "--json", "-device", "cpu")
    assert [finding["state"] for finding in json.loads(out) if finding["about"] == "data"] == ["failed"]


def test_which_data_set_is_asked(command: Command) -> None:
    assert "--data: name the data set with -d" in command.fails("check", "--data")


def test_split_looks_first(command: Command, data: Path, tmp_path: Path) -> None:
    write_itk(arrays(1)[1] * 7, data / "labelsTr" / "c1.nii.gz")
    status, _, err = command("split", str(data), str(tmp_path / "sites"), "--sites", "2")
    assert status == 2
    assert "have 1 error (nothing was split)" in err
    assert [path.name for path in (tmp_path / "sites").iterdir()] == ["data_check.json"]
    write_itk(arrays(1)[1], data / "labelsTr" / "c1.nii.gz")
    assert command("split", str(data), str(tmp_path / "sites"), "--sites", "2")[0] == 0
    assert (tmp_path / "sites" / "site_1" / "dataset.json").is_file()


def test_other_data_sets_of_the_same_number(command: Command, data: Path, tmp_path: Path) -> None:
    (tmp_path / "nnUNet_results" / "Dataset001_Old").mkdir()
    (tmp_path / "nnUNet_preprocessed" / data.name).mkdir()
    status, out, _ = command("check", "-d", "1", "--data", "-device", "cpu")
    assert status == 1
    told = "Dataset001_Own (in nnUNet_raw and nnUNet_preprocessed), Dataset001_Old (in nnUNet_results). nnU-Net counts"
    assert told in " ".join(out.split())


def test_a_cascade_trains_on_what_is_preprocessed_for_full_resolution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[Path | None] = []

    def preprocessed_bytes(raw: Path | None, done: Path | None, voxels: float | None) -> float:
        looked_at.append(done)
        return 0.0

    monkeypatch.setattr(check_command.folder_checks, "preprocessed_bytes", preprocessed_bytes)
    monkeypatch.setattr(check_command._Check, "_preprocessed", lambda check: tmp_path)
    with ExitStack() as stack:
        check = check_command._Check(stack, 1, None, "3d_cascade_fullres", None, "cpu", 1, False)
        check.plans = tiny_cascade()
        check._check_disk()
    assert looked_at == [tmp_path / "tiny"]
