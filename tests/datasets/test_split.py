from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_fed.datasets.split import split_at_random, split_by_column
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import SITE_NAME

CASES = [f"case_{i:02d}" for i in range(20)]
SCANNERS = {case: ("North 3T", "south", "east/2")[i % 3] for i, case in enumerate(CASES)}


def write_table(folder: Path, rows: list[list[str]]) -> None:
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_dataset(folder: Path, **change: Any) -> None:
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1}, "numTraining": 20}
    (folder / "dataset.json").write_text(json.dumps({**dataset, "file_ending": ".nii.gz", "licence": "CC0", **change}))


@pytest.fixture
def pooled(tmp_path: Path) -> Path:
    """Twenty cases of two channels; the files hold their own names."""
    folder = tmp_path / "pooled"
    for subset, names in (
        ("imagesTr", [f"{case}_{channel:04d}.nii.gz" for case in CASES for channel in (0, 1)]),
        ("labelsTr", [f"{case}.nii.gz" for case in CASES]),
    ):
        (folder / subset).mkdir(parents=True)
        for name in names:
            (folder / subset / name).write_text(f"{subset}/{name}")
    write_dataset(folder)
    write_table(folder, [["case", "scanner", "note"], *([case, SCANNERS[case], "a, b"] for case in CASES)])
    return folder


def check_site(folder: Path, cases: list[str]) -> None:
    """The folder is a complete data set of exactly these cases, with the right file behind every name."""
    assert cases == sorted(cases)
    images = [f"{case}_{channel:04d}.nii.gz" for case in cases for channel in (0, 1)]
    assert sorted(path.name for path in (folder / "imagesTr").iterdir()) == images
    assert sorted(path.name for path in (folder / "labelsTr").iterdir()) == [f"{case}.nii.gz" for case in cases]
    for path in folder.glob("*Tr/*"):
        assert path.read_text() == path.relative_to(folder).as_posix()
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["numTraining"] == len(cases)
    assert dataset["licence"] == "CC0"
    assert dataset["channel_names"] == {"0": "T1", "1": "T2"}


def rows_of(folder: Path) -> list[list[str]]:
    with (folder / "cases.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_by_column_each_site_has_its_own_cases(pooled: Path, tmp_path: Path) -> None:
    sites = split_by_column(pooled, tmp_path / "out", "scanner")
    assert list(sites) == ["North_3T", "east_2", "south"]
    assert sites["North_3T"] == [case for case in CASES if SCANNERS[case] == "North 3T"]
    assert sorted(case for cases in sites.values() for case in cases) == CASES
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(sites)
    for site, cases in sites.items():
        assert SITE_NAME.fullmatch(site)
        check_site(tmp_path / "out" / site, cases)
        header, *rows = rows_of(tmp_path / "out" / site)
        assert header == ["case", "scanner", "note"]
        assert rows == [[case, SCANNERS[case], "a, b"] for case in cases]


def test_rows_of_absent_cases_are_ignored(pooled: Path, tmp_path: Path) -> None:
    with (pooled / "cases.csv").open("a") as file:
        file.write("case_99,west,\n")
    assert "west" not in split_by_column(pooled, tmp_path / "out", "scanner")


def test_links_survive_a_relative_folder_and_lead_to_the_original(
    pooled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    split_at_random(Path("pooled"), Path("out/deep"), sites=1)
    monkeypatch.chdir("/")
    link = tmp_path / "out" / "deep" / "site_1" / "labelsTr" / "case_00.nii.gz"
    assert link.is_symlink()
    assert link.readlink() == (pooled / "labelsTr" / "case_00.nii.gz").resolve()


def test_copies_where_links_are_not_allowed(pooled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    sites = split_at_random(pooled, tmp_path / "out", sites=2)
    for site, cases in sites.items():
        check_site(tmp_path / "out" / site, cases)
        assert not any(path.is_symlink() for path in (tmp_path / "out" / site).rglob("*"))


@pytest.mark.parametrize("alpha", [None, 1e-6, 0.5, 1e6])
@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_at_random_is_a_partition(pooled: Path, tmp_path: Path, count: int, alpha: float | None) -> None:
    sites = split_at_random(pooled, tmp_path / "out", count, alpha)
    assert list(sites) == [f"site_{i}" for i in range(1, count + 1)]
    assert sorted(case for cases in sites.values() for case in cases) == CASES
    assert all(sites.values())
    if alpha is None:
        sizes = [len(cases) for cases in sites.values()]
        assert max(sizes) - min(sizes) <= 1
    for site, cases in sites.items():
        check_site(tmp_path / "out" / site, cases)


def test_a_small_alpha_is_unequal(pooled: Path, tmp_path: Path) -> None:
    sites = split_at_random(pooled, tmp_path / "out", 4, alpha=0.01)
    assert max(len(cases) for cases in sites.values()) > 10


def test_at_random_follows_the_seed(pooled: Path, tmp_path: Path) -> None:
    one, two, other = (
        split_at_random(pooled, tmp_path / name, 3, seed=seed) for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert one == two
    assert one != other
    assert one["site_1"] != CASES[: len(one["site_1"])]


def test_cases_csv_is_optional_at_random(pooled: Path, tmp_path: Path) -> None:
    (pooled / "cases.csv").unlink()
    split_at_random(pooled, tmp_path / "out", 2)
    assert not (tmp_path / "out" / "site_1" / "cases.csv").exists()


def test_limit_caps_each_site_by_a_fixed_random_choice(pooled: Path, tmp_path: Path) -> None:
    everything = split_by_column(pooled, tmp_path / "all", "scanner")
    four = split_by_column(pooled, tmp_path / "four", "scanner", limit=4)
    again = split_by_column(pooled, tmp_path / "again", "scanner", limit=4)
    two = split_by_column(pooled, tmp_path / "two", "scanner", limit=2)
    assert four == again
    for site, cases in four.items():
        assert len(cases) == 4
        assert set(two[site]) < set(cases) < set(everything[site])
        check_site(tmp_path / "four" / site, cases)
        assert [row[0] for row in rows_of(tmp_path / "four" / site)[1:]] == cases
    assert any(cases != everything[site][:4] for site, cases in four.items())


def test_limit_above_a_sites_size_keeps_all(pooled: Path, tmp_path: Path) -> None:
    sites = split_at_random(pooled, tmp_path / "out", 3, limit=100)
    assert sum(map(len, sites.values())) == len(CASES)


def test_spacing_files_of_tiff_follow_their_case(pooled: Path, tmp_path: Path) -> None:
    for subset in ("imagesTr", "labelsTr"):
        (pooled / subset / "case_00.json").write_text(f"{subset}/case_00.json")
    split_at_random(pooled, tmp_path / "out", 1)
    assert (tmp_path / "out" / "site_1" / "imagesTr" / "case_00.json").read_text() == "imagesTr/case_00.json"
    assert (tmp_path / "out" / "site_1" / "labelsTr" / "case_00.json").exists()


def test_folds_are_restricted_to_the_site(pooled: Path, tmp_path: Path) -> None:
    folds = [{"train": CASES[6:], "val": CASES[:6]}, {"train": CASES[:14], "val": CASES[14:]}]
    (pooled / "splits_final.json").write_text(json.dumps(folds))
    sites = split_by_column(pooled, tmp_path / "out", "scanner")
    for site, cases in sites.items():
        own = json.loads((tmp_path / "out" / site / "splits_final.json").read_text())
        assert len(own) == 2
        assert own[0]["val"] == [case for case in CASES[:6] if case in cases]
        for fold in own:
            assert sorted(fold["train"] + fold["val"]) == cases


def test_folds_that_lose_a_part_are_left_out(pooled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (pooled / "splits_final.json").write_text(json.dumps([{"train": CASES[1:], "val": CASES[:1]}]))
    with caplog.at_level(logging.WARNING):
        split_by_column(pooled, tmp_path / "out", "scanner")
    assert (tmp_path / "out" / "North_3T" / "splits_final.json").exists()
    assert not (tmp_path / "out" / "south" / "splits_final.json").exists()
    assert [site for site in ("North_3T", "east_2", "south") if site in caplog.text] == ["east_2", "south"]


def _bad_table(rows: list[list[str]]) -> Callable[[Path], None]:
    return lambda folder: write_table(folder, rows)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), r"dataset\.json does not exist"),
        (lambda folder: (folder / "dataset.json").write_text("{"), r"dataset\.json cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text("{}"), "has no 'file_ending'"),
        (lambda folder: write_dataset(folder, dataset={"a": {}}), "table 'dataset'"),
        (lambda folder: write_dataset(folder, file_ending=".mha"), r"no training case \*_0000\.mha"),
        (lambda folder: (folder / "labelsTr" / "case_03.nii.gz").unlink(), r"case_03\.nii\.gz: the file is not there"),
        (lambda folder: (folder / "imagesTr" / "stray.nii.gz").touch(), r"'stray\.nii\.gz' has no number of a channel"),
        (lambda folder: (folder / "splits_final.json").write_text('{"train": []}'), "no list of 'train' and 'val'"),
        (lambda folder: (folder / "cases.csv").unlink(), r"cases\.csv does not exist"),
        (lambda folder: (folder / "cases.csv").write_bytes("case,scanner\nä,1".encode("latin-1")), "no UTF-8"),
        (_bad_table([["name", "scanner"]]), "no column 'case'; its columns are name, scanner"),
        (_bad_table([["case", "site"]]), "no column 'scanner'; its columns are case, site"),
        (_bad_table([["case", "scanner"], ["case_00"]]), "line 2: the row needs 2 cells"),
        (_bad_table([["case", "scanner"], ["case_00", "A"], ["case_00", "B"]]), "'case_00' twice"),
        (_bad_table([["case", "scanner"], ["case_00", "A"]]), "no 'scanner' for case 'case_01'"),
        (_bad_table([["case", "scanner"], ["case_00", " "]]), "no 'scanner' for case 'case_00'"),
        (_bad_table([["case", "scanner"], ["case_00", "--"]]), "'--' gives no site name"),
        (_bad_table([["case", "scanner"], ["case_00", "A 1"], ["case_01", "a/1"]]), "'A 1' and 'a/1' .* same site"),
    ],
)
def test_unusable_folders_are_named_and_nothing_is_written(
    pooled: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(pooled)
    with pytest.raises(ConfigurationError, match=message):
        split_by_column(pooled, tmp_path / "out", "scanner")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": 0}, "ask for 1 to 20"),
        ({"sites": 21}, "ask for 1 to 20"),
        ({"sites": 2, "alpha": 0.0}, "alpha is 0"),
        ({"sites": 2, "alpha": float("nan")}, "alpha is nan"),
        ({"sites": 2, "limit": 0}, "limit is 0"),
        ({"sites": 2, "seed": -1}, "seed is -1"),
    ],
)
def test_numbers_out_of_range_are_refused(pooled: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        split_at_random(pooled, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_refuses_a_folder_with_content(pooled: Path) -> None:
    with pytest.raises(ConfigurationError, match="not empty"):
        split_at_random(pooled, pooled, 2)


def test_refuses_a_file_as_folder(pooled: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigurationError, match="cannot be made"):
        split_at_random(pooled, tmp_path / "out", 2)
