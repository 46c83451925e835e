"""A site that joins later takes the plans as they are; a dry run sends nothing; both through a real coordinator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from planning_sites import OTHER, SITE_A, SITE_B, preprocessed, read, write_dataset
from serving import Served, lines, make_study, together

from nnunet_fed.agreement.fingerprint_files import COMMON
from nnunet_fed.errors import ConfigurationError, DisagreementError, RoundClosedError
from nnunet_fed.exchange.keys import PUBLISHED
from nnunet_fed.exchange.outgoing_log import OutgoingLog
from nnunet_fed.planners.dry_run import dry_run_planning
from nnunet_fed.planners.joining import join_and_preprocess
from nnunet_fed.planners.planning import plan_and_preprocess
from nnunet_fed.study.site import Site

Serve = Callable[..., Served]
DATASETS = {"a": SITE_A, "b": SITE_B, "c": OTHER}


def run(served: Served, site: str, function: Any = plan_and_preprocess, **options: Any) -> Any:
    seat = served.seat(site, "planning", **options)
    return function(seat, served.study, DATASETS[site], None, 1)


@pytest.fixture
def three(raw: Path, instant: list[list[str]]) -> None:
    write_dataset(raw, SITE_A, (0, 1))
    write_dataset(raw, SITE_B, (1, 2, 4))
    write_dataset(raw, OTHER, (0,))


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("geometry", ["private", "lists"])
def test_a_site_that_joins_later(serve: Serve, tmp_path: Path, geometry: str) -> None:
    first = serve(make_study("ab", geometry=geometry))
    together(lambda: run(first, "a"), lambda: run(first, "b"))
    first.stop()
    before = read(SITE_A, "nnUNetFedPlans.json")

    dataset_json = Path(nnUNet_raw) / "Dataset021_Test" / "dataset.json"
    content = {**json.loads(dataset_json.read_text()), "overwrite_image_reader_writer": "NibabelIO"}
    dataset_json.write_text(json.dumps(content))
    second = serve(make_study("abc", geometry=geometry))
    with pytest.raises(RoundClosedError, match="planned without site 'c'.*--join"):
        run(second, "c")
    with pytest.raises(ConfigurationError, match="Site 'a' has planned with the others.*without --join"):
        run(second, "a", join_and_preprocess)
    log = tmp_path / "outgoing.jsonl"
    result = run(second, "c", join_and_preprocess, outgoing=OutgoingLog(log))
    plans = read(OTHER, "nnUNetFedPlans.json")
    assert plans["federation"]["joined"] is True
    assert (
        plans["federation"]["small_lesions"] == before["federation"]["small_lesions"] == {"lesion": None, "organ": 2.5}
    )
    assert "joined" not in before["federation"]
    assert plans["federation"]["plans_digest"] == before["federation"]["plans_digest"] == result.plans_digest
    assert (plans["dataset_name"], plans["image_reader_writer"]) == ("Dataset021_Test", "NibabelIO")
    assert (result.total_cases, result.local_cases) == (5, 1)
    assert read(OTHER, COMMON) == read(SITE_A, COMMON)
    assert read(OTHER, "dataset_fingerprint.json")["spacings"] == [[1.0, 1.0, 1.0]] * 2, "its own"
    assert read(OTHER, "dataset.json") == content
    identifier = plans["configurations"]["3d_fullres"]["data_identifier"]
    assert identifier != before["configurations"]["3d_fullres"]["data_identifier"]
    assert (preprocessed(OTHER) / identifier).is_dir()

    assert [entry["what"] for entry in lines(log)] == ["join", "note"], "nothing of its data was sent"
    events = [event for event in second.coordinator.status(record=True)["events"] if event["site"] == "c"]
    assert events[-1]["text"] == "joined after planning, with 1 cases: the plans are those of a, b"
    assert run(second, "b").plans_digest == result.plans_digest, "the others may preprocess again"


@pytest.mark.usefixtures("three")
def test_nothing_to_join_yet(serve: Serve) -> None:
    served = serve(make_study("abc"))
    with pytest.raises(ConfigurationError, match="have not planned yet.*without --join"):
        run(served, "c", join_and_preprocess)


def test_a_site_that_does_not_fit(serve: Serve, raw: Path, instant: list[list[str]]) -> None:
    write_dataset(raw, SITE_A, (0, 1))
    write_dataset(raw, SITE_B, (1, 2))
    write_dataset(raw, OTHER, (0,), channels=("MRI", "CT"))
    first = serve(make_study("ab"))
    together(lambda: run(first, "a"), lambda: run(first, "b"))
    first.stop()
    calls = len(instant)
    with pytest.raises(
        DisagreementError, match=r"differ in channels(.|\n)*CT, MRI +CT, MRI +MRI, CT \*(.|\n)*join again"
    ):
        run(serve(make_study("abc")), "c", join_and_preprocess)
    assert len(instant) == calls
    assert not (preprocessed(OTHER) / "nnUNetFedPlans.json").exists()


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize("geometry", ["private", "lists"])
def test_a_rehearsal_shows_what_a_site_alone_would_send(serve: Serve, tmp_path: Path, geometry: str) -> None:
    study = make_study("a", geometry=geometry)
    told: list[str] = []
    before = str(nnUNet_preprocessed)
    dry_run_planning(Site(name="a", coordinator="127.0.0.1:9", insecure=True), study, SITE_A, 1, told.append)
    assert str(nnUNet_preprocessed) == before
    assert not list(Path(before).iterdir())
    assert "Nothing is sent now" in told[0]
    assert [text.startswith("{") for text in told[1:4]] == [True, False, True]
    assert "depends on the others' answers" in told[2]

    log = tmp_path / "outgoing.jsonl"
    run(serve(study), "a", outgoing=OutgoingLog(log))
    names = ("key", "verb", "bytes", "dtype", "shape", "value", "nonzero")
    sent = [{name: entry[name] for name in names if name in entry} for entry in lines(log, "upload")]
    assert [json.loads(text) for text in told if text.startswith("{")] == sent
    assert {"planning/dataset", "planning/lesions/present", "planning/lesions/counts", "planning/plans", PUBLISHED} < {
        entry["key"] for entry in sent
    }
    (published,) = [entry["value"] for entry in sent if entry["key"] == PUBLISHED]
    assert published["small_lesions"] == read(SITE_A, "nnUNetFedPlans.json")["federation"]["small_lesions"]


@pytest.mark.usefixtures("three")
def test_plans_from_before_there_were_thresholds_are_joined_without(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = serve(make_study("ab"))
    together(lambda: run(first, "a"), lambda: run(first, "b"))
    first.stop()
    second = serve(make_study("abc"))
    seat = second.seat("c", "planning")
    gathered = seat.gathered

    def without(key: str) -> Any:
        answers = gathered(key)
        for answer in answers.values() if key == PUBLISHED else ():
            if answer is not None:
                del answer["small_lesions"]
        return answers

    monkeypatch.setattr(seat, "gathered", without)
    join_and_preprocess(seat, second.study, OTHER, None, 1)
    assert "small_lesions" not in read(OTHER, "nnUNetFedPlans.json")["federation"]
