"""Folds of a study: several in one, and which of them a site's command trains."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from serving import make_study

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.study.table import OLDEST_PROTOCOL
from nnunet_fed.study.trained_fold import trained_fold

FIVE = (0, 1, 2, 3, 4)


def test_a_study_of_one_fold_is_as_it_was() -> None:
    for fold in (0, 2, "all"):
        study = make_study(fold=fold)
        assert study.trained_folds == (fold,)
        assert "folds" not in study.stored()


def test_folds_are_told_to_those_who_know_them() -> None:
    """A site of version 0.1 trains the first one."""
    study = make_study(folds=[2, 0, "all"])
    assert (study.fold, study.trained_folds) == (2, (2, 0, "all"))
    assert study.stored()["folds"] == [2, 0, "all"]
    assert Federation.restore(study.stored()) == study == study.with_defaults({"fold": 0})
    assert study.stored(OLDEST_PROTOCOL) == make_study(fold=2).stored()
    assert study.digest == make_study().digest


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"folds": [0, 1, 0]}, "name each fold once"),
        ({"folds": []}, "at least 1 item"),
        ({"folds": [0, -1]}, "use a whole number from 0 on, or 'all'"),
        ({"fold": 3, "folds": [0, 1]}, "fold is 3, which is none of folds"),
    ],
)
def test_folds_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        make_study(**settings)


def site(**settings: Any) -> Site:
    return Site(name="a", coordinator="127.0.0.1:1", insecure=True, **settings)


@pytest.mark.parametrize(
    ("settings", "folds", "command", "trained"),
    [
        # as in version 0.1
        ({}, None, 0, (0, False)),
        ({}, None, "all", (0, False)),
        ({"fold": 3}, None, 3, (0, False)),
        ({"fold": 3}, None, 0, (0, False)),
        ({"fold": 3}, None, "all", (0, False)),
        ({"fold": "all"}, None, "all", (0, False)),
        # several folds, whether the plans say so or the coordinator only
        ({}, None, 4, (4, False)),
        ({}, FIVE, 4, (4, False)),
        ({}, (0, "all"), "all", ("all", False)),
        ({"fold": "all"}, FIVE, 4, (4, True)),
        ({"fold": "all"}, None, 4, (4, True)),
        ({"folds": {"0": 1, "1": 0}}, FIVE, 0, (1, False)),
        ({"folds": {"0": 1, "1": 0}}, FIVE, 2, (2, False)),
        ({"folds": {"0": 5, "1": 6}}, (0, 1), 6, (1, False)),
        ({"folds": {"0": "all", "1": "all"}}, (0, 1), 1, (1, True)),
        ({"folds": {"all": 2}}, ("all", 0), 2, ("all", False)),
        ({"fold": "all", "folds": {"0": 3}}, FIVE, 3, (0, False)),
        ({"fold": "all", "folds": {"0": 0}}, FIVE, 1, (1, True)),
    ],
)
def test_which_fold_a_command_trains(settings: Any, folds: Any, command: Any, trained: Any) -> None:
    assert trained_fold(command, make_study(folds=folds), site(**settings)) == trained


@pytest.mark.parametrize(
    ("settings", "folds", "command", "sentence"),
    [
        (
            {"fold": 1},
            None,
            2,
            "The study trains fold 0, which is this site's fold 1, this command fold 2. Train fold 1",
        ),
        (
            {"fold": 1},
            FIVE,
            0,
            "The folds 0 and 1 of the study would both be this site's fold 1",
        ),
        ({}, FIVE, "all", "The study trains the folds 0, 1, 2, 3, 4, and the results of 'all' have one folder only."),
        ({"fold": "all"}, FIVE, "all", "set 'fold = \"all\"' in site.toml, and name the study's fold in the command."),
        ({"folds": {"0": 7}}, FIVE, 0, "Fold 0 of the study is this site's fold 7"),
        ({"folds": {"0": 1}}, FIVE, 1, "The folds 0 and 1 of the study would both be this site's fold 1"),
    ],
)
def test_a_command_that_trains_none(settings: Any, folds: Any, command: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        trained_fold(command, make_study(folds=folds), site(**settings))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"folds": {"0": 1, "2": 1}}, "two folds of the study are one fold of this site"),
        ({"folds": {"first": 1}}, "'first' is no fold of the study"),
    ],
)
def test_maps_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        site(**settings)
