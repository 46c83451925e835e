"""A study means the same in every version of nnunet_fed: its digest, its defaults, later fields, state directories."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import ValidationError
from serving import Served, make_study

from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.store import FORMAT, FORMAT_OF_0_1, Store
from nnunet_fed.errors import ConfigurationError, RefusedError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.methods import METHODS
from nnunet_fed.study.table import NEWEST_PROTOCOL, OLDEST_PROTOCOL, Neutral, neutral_of
from nnunet_fed.study.toml import explain
from nnunet_fed.transport.proto import federation_pb2 as pb

Serve = Callable[..., Served]

OF_0_1: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data/v0.1/digests.json").read_text())
"""Studies as version 0.1 wrote them, with its digests."""


def name_of(entry: dict[str, Any]) -> str:
    return f"{entry['settings']['method']['name']}-{entry['settings'].get('fold', 0)}"


@pytest.mark.parametrize("entry", OF_0_1, ids=name_of)
def test_a_study_of_0_1_is_the_same_study(entry: dict[str, Any]) -> None:
    for study in (Federation.restore(entry["stored"]), Federation.model_validate(entry["settings"])):
        assert study.digest_of_fold(study.fold) == entry["digest"]
        assert study.stored() == study.stored(OLDEST_PROTOCOL) == entry["stored"], "0.1 reads it"
        assert study.with_defaults({}) == study


def test_neutral_values_of_0_1_are_frozen() -> None:
    """Whoever changes a default marks the field with the old one; see :mod:`nnunet_fed.study.table`."""
    tables = {"study": Federation, **METHODS}
    for entry in OF_0_1:
        method = entry["stored"]["method"]
        for table, stored, given in (
            ("study", entry["stored"], entry["settings"]), (method["name"], method, entry["settings"]["method"])
        ):  # fmt: skip
            for name in stored.keys() - given.keys():
                neutral = neutral_of(tables[table].model_fields[name])
                assert (neutral.value, neutral.since) == (stored[name], OLDEST_PROTOCOL), f"{table}.{name}"


@pytest.fixture
def other_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A later version, whose defaults are others."""
    fields = (Federation.model_fields["local_epochs"], Federation.model_fields["deadline_minutes"])
    option = METHODS["fedprox"].model_fields["mu"]
    with monkeypatch.context() as patch:
        patch.setattr(fields[0], "metadata", [*fields[0].metadata, Neutral(1)])
        patch.setattr(fields[0], "default", 2)
        patch.setattr(fields[1], "metadata", [*fields[1].metadata, Neutral(720.0)])
        patch.setattr(fields[1], "default", 60.0)
        patch.setattr(option, "metadata", [*option.metadata, Neutral(0.01)])
        patch.setattr(option, "default", 0.5)
        for table in (METHODS["fedprox"], Federation):
            table.model_rebuild(force=True)
        yield
    for table in (METHODS["fedprox"], Federation):
        table.model_rebuild(force=True)


TOML = 'name = "study"\nsites = ["a", "b"]\nrounds = 3\n[method]\nname = "fedprox"\n'


def read(folder: Path) -> Federation:
    (folder / "federation.toml").write_text(TOML)
    return Federation.read(folder / "federation.toml")


def start(folder: Path) -> tuple[Federation, dict[str, Any], str]:
    """Start a coordinator; its study, its record and the run that a site joins with the plans of the first start."""
    coordinator = Coordinator(read(folder), Store(folder / "state"))
    try:
        digest = Federation.restore(json.loads((folder / "plans.json").read_text())).digest_of_fold(0)
        run = coordinator.join("a", "training", digest, "3d_fullres", "T")
        return coordinator.study, coordinator.status(record=True), run
    finally:
        coordinator.close()


def test_another_default_changes_nothing_in_a_known_study(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "plans.json").write_text(json.dumps(read(tmp_path).stored()))
    study, _, run = start(tmp_path)
    request.getfixturevalue("other_default")
    again, record, run_again = start(tmp_path)
    assert (again, run_again) == (study, run)
    assert (again.local_epochs, again.deadline_minutes, again.method.mu) == (1, 720.0, 0.01)  # type: ignore[union-attr]
    assert record["study"] == study.stored()
    fresh = read(tmp_path)
    assert (fresh.local_epochs, fresh.deadline_minutes, fresh.method.mu) == (2, 60.0, 0.5)  # type: ignore[union-attr]
    assert fresh.digest != study.digest, "a new study has the new defaults"


def test_a_study_keeps_the_defaults_of_the_version_that_opened_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("other_default")
    (tmp_path / "plans.json").write_text(json.dumps(read(tmp_path).stored()))
    study, _, run = start(tmp_path)
    assert study.local_epochs == 2
    again, _, run_again = start(tmp_path)
    assert (again, run_again) == (study, run)
    assert Federation.restore(json.loads((tmp_path / "plans.json").read_text())) == study


@pytest.mark.parametrize(
    ("edited", "named"),
    [
        ({"local_epochs": 7, "initial_lr": 0.5, "min_sites": 1}, "initial_lr, local_epochs"),
        ({"method": {"name": "fedavg", "finetune_epochs": 1}}, "method.finetune_epochs"),
    ],
)
def test_what_was_edited_is_named(tmp_path: Path, edited: dict[str, Any], named: str) -> None:
    Coordinator(make_study("ab"), Store(tmp_path)).close()
    with pytest.raises(ConfigurationError, match=rf"was edited since \({re.escape(named)}\)"):
        Coordinator(make_study("ab", **edited), Store(tmp_path))


class NewerFederation(Federation):
    """What a version with two more fields would know."""

    OPERATIONAL: ClassVar[frozenset[str]] = Federation.OPERATIONAL | {"watchers"}
    sampling: Annotated[str, Neutral("nnU-Net", since=NEWEST_PROTOCOL)] = "nnU-Net"
    watchers: Annotated[int, Neutral(0, since=NEWEST_PROTOCOL)] = 0


def newer(**settings: Any) -> NewerFederation:
    return NewerFederation.model_validate({**OF_0_1[0]["settings"], **settings})


def test_a_new_field_with_its_neutral_value_changes_nothing() -> None:
    older = Federation.model_validate(OF_0_1[0]["settings"])
    assert newer().digest == older.digest
    assert newer().stored() == older.stored()
    assert Federation.restore(newer().stored()) == older
    assert NewerFederation.restore(older.stored()) == newer()


def test_a_new_field_that_is_used_is_told_to_those_who_know_it() -> None:
    study = newer(sampling="lesions", watchers=3)
    assert study.digest == newer(sampling="lesions").digest != newer().digest
    assert NewerFederation.restore(study.stored()) == study
    with pytest.raises(RefusedError, match=r"sets 'sampling', which nnunet_fed knows since version 0\.2\. Install"):
        study.stored(OLDEST_PROTOCOL)
    assert newer(watchers=3).stored(OLDEST_PROTOCOL) == newer().stored(), (
        "a reader of 0.1 refuses what it does not know"
    )


def test_a_method_that_came_later_is_told_to_those_who_know_it() -> None:
    study = make_study(method={"name": "custom", "trainer": "nnUNetTrainerMine", "options": {"clip": 1.0}})
    assert Federation.restore(study.stored()) == study
    assert study.digest != make_study(method={"name": "custom", "trainer": "nnUNetTrainerMine"}).digest
    with pytest.raises(RefusedError, match=r"is of the method 'custom', which nnunet_fed knows since version 0\.2\."):
        study.stored(OLDEST_PROTOCOL)


def test_an_older_version_ignores_what_is_safe_and_names_what_is_not() -> None:
    assert Federation.restore(newer(watchers=3).stored()) == Federation.restore(newer().stored())
    with pytest.raises(ConfigurationError, match=r"newer version of nnunet_fed: this one does not know 'sampling'\."):
        Federation.restore(newer(sampling="lesions", watchers=3).stored())
    with pytest.raises(ConfigurationError, match="does not know 'pull'"):
        Federation.restore({**newer().stored(), "method": {"name": "fedavg", "pull": 1}})
    with pytest.raises(ConfigurationError, match=r"another version .*there is no 'fednew'; known: "):
        Federation.restore({**newer().stored(), "method": {"name": "fednew"}})
    with pytest.raises(ConfigurationError, match=r"another version .*wire_dtype: there is no 'delta'"):
        Federation.restore({**newer().stored(), "wire_dtype": "delta"})


def make_old(folder: Path) -> None:
    """Give a state directory the format of version 0.1."""
    journal = sqlite3.connect(folder / "journal.sqlite")
    with journal:
        journal.execute("ALTER TABLE collective DROP COLUMN waited")
        journal.execute("DELETE FROM fact WHERE name IN ('readable_since', 'defaults')")
        journal.execute("UPDATE fact SET value = ? WHERE name = 'format'", (json.dumps(FORMAT_OF_0_1),))
    journal.close()


def facts(folder: Path) -> dict[str, Any]:
    journal = sqlite3.connect(folder / "journal.sqlite")
    found = {name: json.loads(value) for name, value in journal.execute("SELECT name, value FROM fact")}
    journal.close()
    return found


def test_a_state_directory_of_0_1_is_migrated_and_kept(tmp_path: Path) -> None:
    Coordinator(make_study("ab"), Store(tmp_path)).close()
    (tmp_path / "results" / "model").write_bytes(b"mean")
    (tmp_path / "spool" / "given.01234567").write_bytes(b"given")
    (tmp_path / "spool" / "coming.part").write_bytes(b"com")
    make_old(tmp_path)
    reading = Store(tmp_path, migrate=False)
    assert reading.latest_study() == make_study("ab").stored()
    reading.close()
    assert facts(tmp_path)["format"] == FORMAT_OF_0_1, "who only reads changes nothing"

    Store(tmp_path).close()
    assert facts(tmp_path)["format"] == FORMAT
    copy = tmp_path / "format-2"
    assert facts(copy)["format"] == FORMAT_OF_0_1
    kept = {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    del kept["journal.sqlite"]
    assert kept == {"results/model": b"mean", "spool/given.01234567": b"given"}
    Store(tmp_path).close()
    (tmp_path / "results" / "model").unlink()
    assert (copy / "results" / "model").read_bytes() == b"mean"


def test_a_migration_that_was_interrupted_begins_anew(tmp_path: Path) -> None:
    Coordinator(make_study("ab"), Store(tmp_path)).close()
    make_old(tmp_path)
    for leftover in ("format-2.part", "format-2"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale").touch()
    Store(tmp_path).close()
    assert {path.name for path in (tmp_path / "format-2").iterdir()} == {"journal.sqlite", "results", "spool"}
    assert not (tmp_path / "format-2.part").exists()


def test_an_older_version_goes_on_with_the_state_of_a_newer_one(tmp_path: Path) -> None:
    Coordinator(make_study("ab"), Store(tmp_path)).close()

    def written_by_newer(readable_since: int) -> None:
        store = Store(tmp_path)
        with store.transaction():
            store.set_fact("format", FORMAT + 2)
            store.set_fact("readable_since", readable_since)
        store.close()

    written_by_newer(FORMAT)
    Coordinator(make_study("ab"), Store(tmp_path)).close()
    written_by_newer(FORMAT + 1)
    with pytest.raises(ConfigurationError, match=r"has format 5, this version of nnunet_fed reads format 3"):
        Store(tmp_path)


def test_a_site_of_0_1_joins(serve: Serve) -> None:
    """It names one version of the protocol and no fold, and its replies refuse unknown fields."""
    served = serve(make_study("ab", folds=[2, 1]))
    study = served.study
    stub = served.seat("b")._stub
    old = pb.JoinRequest(
        protocol=OLDEST_PROTOCOL, site="a", purpose="training", digest=study.digest_of_fold(2),
        configuration="3d_fullres", trainer="T", fresh=True,
    )  # fmt: skip
    reply = stub.Join(old, timeout=10)
    assert reply.run == f"{study.digest_of_fold(2)[:12]}-3d_fullres-T-fold_2-1"
    assert reply.protocol == OLDEST_PROTOCOL
    assert json.loads(reply.study) == study.stored(OLDEST_PROTOCOL)
    new = pb.JoinRequest(newest_protocol=NEWEST_PROTOCOL + 5, fold="1")
    new.MergeFrom(old)
    new.digest = study.digest_of_fold(1)
    reply = stub.Join(new, timeout=10)
    assert (reply.protocol, reply.run) == (NEWEST_PROTOCOL, f"{new.digest[:12]}-3d_fullres-T-fold_1-1")
    old.digest = new.digest  # its plans are of the time when the study's fold was this one
    assert stub.Join(old, timeout=10).run == reply.run


def test_the_fold_is_edited_while_the_sites_plan(tmp_path: Path) -> None:
    first = Coordinator(make_study("ab"), Store(tmp_path))
    run = first.join("a", "planning")
    first.close()
    second = Coordinator(make_study("ab", fold=3), Store(tmp_path))
    assert second.join("a", "planning") == second.join("b", "planning") == run
    second.close()


def test_a_study_of_fedgs_that_does_not_fine_tune_is_the_one_of_0_1() -> None:
    """``finetune_epochs`` and ``finetune_lr_factor`` came to FedGS later than to the other methods."""
    study, tuned = make_study(method={"name": "fedgs"}), make_study(method={"name": "fedgs", "finetune_epochs": 2})
    assert not {"finetune_epochs", "finetune_lr_factor"} & study.stored(OLDEST_PROTOCOL)["method"].keys()
    assert Federation.restore(study.stored(OLDEST_PROTOCOL)) == study
    assert Federation.restore(tuned.stored()) == tuned
    assert study.digest != tuned.digest
    with pytest.raises(RefusedError, match=r"'finetune_epochs', which nnunet_fed knows since version 0\.2"):
        tuned.stored(OLDEST_PROTOCOL)


def test_a_study_that_names_no_base_trainer_is_the_one_of_0_1() -> None:
    study = make_study(trainer="nnUNetTrainer")
    assert study == make_study()
    assert study.digest == make_study().digest
    assert "trainer" not in study.stored()


def test_a_base_trainer_brings_its_own_learning_rate_and_momentum() -> None:
    study = make_study(trainer="nnUNetTrainerDA5")
    assert (study.initial_lr, study.momentum) == (None, None)
    assert study.digest not in (make_study().digest, make_study(trainer="nnUNetTrainerBN").digest)
    assert study.digest != make_study(trainer="nnUNetTrainerDA5", initial_lr=0.01).digest
    assert Federation.restore(study.stored()) == study
    assert study.with_defaults(make_study().defaults()) == study, "they are no defaults of a version's"
    with pytest.raises(RefusedError, match=r"sets 'trainer', which nnunet_fed knows since version 0\.2"):
        study.stored(OLDEST_PROTOCOL)
    said = make_study(trainer="nnUNetTrainerDA5", initial_lr=0.5)
    assert (said.initial_lr, said.momentum) == (0.5, None)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"trainer": "my trainer.py"}, "trainer: use the name of a class of nnU-Net's trainers"),
        ({"initial_lr": None}, "initial_lr may be left to a trainer that the study names only"),
    ],
)
def test_a_base_trainer_that_is_written_wrongly(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as told:
        make_study(**settings)
    assert sentence in explain(told.value, Federation)
