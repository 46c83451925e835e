"""A site corrects what it has told while planning: all sites plan as if it had told it right at once."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.paths import nnUNet_preprocessed
from planning_sites import LABELS, SITE_A, SITE_B, SITE_C, few_samples, preprocessed, read, write_dataset
from serving import Serve, Served, make_study
from workers import workers_as_threads

from nnunet_fed.agreement.fingerprint import LocalFingerprint
from nnunet_fed.errors import DisagreementError, FederationError, RefusedError
from nnunet_fed.exchange.communicator import LocalFederation
from nnunet_fed.exchange.keys import PLANS, PUBLISHED
from nnunet_fed.planners import planning
from nnunet_fed.planners.beginning_anew import KeptExtraction, plan_with_corrections
from nnunet_fed.planners.joining import join_and_preprocess
from nnunet_fed.planners.planning import DESCRIPTIONS, plan_and_preprocess
from nnunet_fed.study.federation import Federation

DATASETS = {"a": SITE_A, "b": SITE_B, "c": SITE_C}
CASES = {"a": (0, 2, 4), "b": (1, 3), "c": (5, 6)}
FILES = ("nnUNetFedPlans.json", "dataset_fingerprint.json", "dataset_fingerprint_federation.json", "dataset.json")


class KilledError(Exception):
    """Stands for kill -9 of a site."""


@pytest.fixture
def extracted(raw: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Three sites with the right data, real planning without preprocessing; counts extractions by data set."""
    few_samples(monkeypatch)
    workers_as_threads(monkeypatch)
    monkeypatch.setattr(planning, "preprocess_dataset", lambda *_: None)
    for site, number in DATASETS.items():
        write_dataset(raw, number, CASES[site])
    counts, extract = Counter[int](), planning.extract

    def counted(number: int, *arguments: int) -> LocalFingerprint:
        counts[number] += 1
        return extract(number, *arguments)

    monkeypatch.setattr(planning, "extract", counted)
    return counts


def command(
    served: Served, site: str, corrects: bool = False, report: Callable[[str], None] = lambda phase: None
) -> Any:
    """What ``plan_and_preprocess`` does at a site."""
    seat = served.seat(site, "planning", corrects=corrects, tls={"connect_minutes": 1})
    kept = KeptExtraction()

    def once(study: Federation) -> Any:
        return plan_and_preprocess(seat, study, DATASETS[site], None, 1, report, kept=kept)

    return plan_with_corrections(seat, served.study, once)


def waits_for(served: Served, key: str, *missing: str) -> None:
    while not any((c["key"], tuple(c["missing"])) == (key, missing) for c in served.coordinator.status()["open"]):
        threading.Event().wait(0.05)


def left_behind() -> dict[tuple[str, str], bytes]:
    return {
        (site, name): (preprocessed(number) / name).read_bytes() for site, number in DATASETS.items() for name in FILES
    }


def assert_as_if_it_had_been_right_at_once(study: Federation) -> None:
    """Every bit that the sites have now is what they plan from the same data in a federation without a mistake."""
    found = left_behind()
    shutil.rmtree(str(nnUNet_preprocessed))
    Path(str(nnUNet_preprocessed)).mkdir()
    LocalFederation("abc").run(lambda seat: plan_and_preprocess(seat, study, DATASETS[seat.site], None, 1))
    assert found == left_behind()
    assert read(SITE_A, FILES[2]) == read(SITE_C, FILES[2])


def small_voxels(raw: Path) -> Callable[[], None]:
    """All files of c have voxel sizes a twentieth of what they are; returns what puts that right."""
    files = list((raw / "Dataset013_Test").rglob("*.nii.gz"))
    right = {file: file.read_bytes() for file in files}
    for file in files:
        image = sitk.ReadImage(str(file))
        image.SetSpacing([step / 20 for step in image.GetSpacing()])
        sitk.WriteImage(image, str(file))

    def undo() -> None:
        for file, content in right.items():
            file.write_bytes(content)

    return undo


def a_case_too_few(raw: Path) -> Callable[[], None]:
    folder, aside = raw / "Dataset013_Test", raw / "aside"
    shutil.copytree(folder, aside)
    for file in folder.rglob("case_006*"):
        file.unlink()
    (folder / "dataset.json").write_text(
        json.dumps({**json.loads((folder / "dataset.json").read_text()), "numTraining": 1})
    )

    def undo() -> None:
        shutil.rmtree(folder)
        shutil.move(aside, folder)

    return undo


@pytest.mark.parametrize(
    ("mistake", "geometry", "extractions"),
    [(small_voxels, "private", 1), (small_voxels, "lists", 1), (a_case_too_few, "private", 2)],
)
def test_all_plan_as_if_the_site_had_been_right_at_once(
    serve: Serve, raw: Path, extracted: Counter[int], mistake: Any, geometry: str, extractions: int
) -> None:
    """The site was ended when it had told all but its plans; the others wait, and nobody touches them."""
    undo = mistake(raw)
    served = serve(make_study("abc", geometry=geometry))

    def killed_when_it_plans(phase: str) -> None:
        if phase == "planning":
            raise KilledError

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(command, served, site) for site in "ab"]
        with pytest.raises(KilledError):
            command(served, "c", report=killed_when_it_plans)
        waits_for(served, PLANS, "c")
        undo()
        with pytest.raises(RefusedError, match="has already contributed other values to .*with --correct"):
            command(served, "c")
        assert (first := served.coordinator.planning_run()) is not None
        corrected = command(served, "c", corrects=True)
        results = [other.result(120) for other in others]
    assert {result.plans_digest for result in (*results, corrected)} == {corrected.plans_digest}
    assert served.coordinator.planning_run() == f"{first}.1"
    assert extracted[SITE_A] == extracted[SITE_B] == extractions, "what does not depend on the others is kept"
    assert (preprocessed(SITE_A) / "nnUNetFedPlans.refused.json").exists(), "the plans that are void are set aside"
    assert_as_if_it_had_been_right_at_once(served.study)


def test_a_planning_that_has_failed_is_corrected(serve: Serve, raw: Path, extracted: Counter[int]) -> None:
    """The data sets differed, so all commands have ended: the corrected one withdraws, the others are repeated."""
    path = raw / "Dataset013_Test" / "dataset.json"
    right = path.read_text()
    path.write_text(json.dumps({**json.loads(right), "labels": {"background": 0, "organ": 1, "tumour": 2}}))
    served = serve(make_study("abc"))

    def fails(site: str) -> None:
        with pytest.raises(
            DisagreementError, match=r"(?s)differ in labels.*first with --correct at each site that was"
        ):
            command(served, site)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fails, "abc"))
    path.write_text(right)
    fails("a")
    with pytest.raises(RefusedError, match="contributed other values to 'planning/dataset'.*with --correct"):
        command(served, "c")
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(command, served, "c", corrects=True)]
        waits_for(served, DESCRIPTIONS, "a", "b")
        running += [pool.submit(command, served, site) for site in "ab"]
        assert len({result.result(120).plans_digest for result in running}) == 1
    assert_as_if_it_had_been_right_at_once(served.study)
    path.write_text(json.dumps({**json.loads(right), "labels": {**LABELS, "new": 3}}))
    with pytest.raises(RefusedError, match="Site 'c' cannot withdraw what it told: the plans are agreed.*new-attempt"):
        command(served, "c", corrects=True)
    path.write_text(right)
    assert command(served, "c", corrects=True).plans_digest == read(SITE_A, FILES[0])["federation"]["plans_digest"]


def of_site(spacing: list[float]) -> LocalFingerprint:
    return LocalFingerprint(
        [spacing] * 3, [[24, 64, 64]] * 3, [0.9] * 3, [np.arange(9, dtype=np.float32)] * 2, {"organ": [2.5]}
    )


@pytest.fixture
def odd_voxels(raw: Path, instant: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> dict[int, LocalFingerprint]:
    """What two sites find in their files: b says metres along an axis."""
    parts = {SITE_A: of_site([1.0, 1.0, 1.0]), SITE_B: of_site([1000.0, 1.0, 1.0]), SITE_C: of_site([1.0, 1.0, 1.0])}
    monkeypatch.setattr(planning, "extract", lambda number, *_: parts[number])
    for number in parts:
        write_dataset(raw, number, (0, 1, 2))
    return parts


def test_plans_by_which_a_site_cannot_preprocess_are_not_agreed(
    serve: Serve, odd_voxels: dict[int, LocalFingerprint]
) -> None:
    """The innocent site fails; the one with the odd voxels waits, is corrected, and withdraws."""
    served = serve(make_study("ab"))
    with ThreadPoolExecutor(2) as pool:
        waiting: Future[Any] = pool.submit(command, served, "b")
        with pytest.raises(
            FederationError, match=r"nothing would be left.*Nothing is agreed yet.*with --correct where"
        ):
            command(served, "a")
        assert not (preprocessed(SITE_A) / FILES[0]).exists(), "nobody trains by them"
        odd_voxels[SITE_B] = of_site([2.0, 1.0, 1.0])
        corrected = pool.submit(command, served, "b", True)
        with pytest.raises(RefusedError, match="Another command at site 'b' has withdrawn.*This one ends"):
            waiting.result(60)  # two of them would preprocess into one folder
        assert command(served, "a").plans_digest == corrected.result(60).plans_digest
    assert not (preprocessed(SITE_B) / "nnUNetFedPlans.previous.json").exists()


def test_who_joins_later_takes_the_plans_of_the_planning_that_counts(
    serve: Serve, odd_voxels: dict[int, LocalFingerprint]
) -> None:
    odd_voxels[SITE_B] = of_site([3.0, 1.0, 1.0])
    first = serve(make_study("ab"))

    def killed(phase: str) -> None:
        if phase == "planning":
            raise KilledError

    with ThreadPoolExecutor(1) as pool:
        a = pool.submit(command, first, "a")
        with pytest.raises(KilledError):
            command(first, "b", report=killed)
        odd_voxels[SITE_B] = of_site([2.0, 1.0, 1.0])
        command(first, "b", corrects=True)
        a.result(60)
    plans = read(SITE_A, FILES[0])
    assert plans["original_median_spacing_after_transp"] == [1.5, 1.0, 1.0]
    first.stop()
    second = serve(make_study("abc"))
    seat = second.seat("c", "planning")
    joined = join_and_preprocess(seat, second.study, SITE_C, None, 1)
    assert joined.plans_digest == plans["federation"]["plans_digest"]
    assert seat.generation == 1
    assert seat.gathered(PUBLISHED) is not None
