"""The example in docs/new_method.md, as nnU-Net finds and trains it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import InProcess, same_arrays, same_training, weights
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.simulation.simulate import plugin_folder
from nnunet_fed.trainers.nnUNetTrainerFedAvg import nnUNetTrainerFedAvg
from nnunet_fed.trainers.parts.named_trainers import check_named_trainers

PAGE = Path(__file__).parents[1] / "docs" / "new_method.md"
NAME = "nnUNetTrainerFedClip"


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert f"`{NAME}.py`" in text
    folder = tmp_path / "my_trainers"
    folder.mkdir()
    (folder / f"{NAME}.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(plugin_folder()), str(folder)]))
    found: type[Any] = recursive_find_trainer_class_by_name(NAME)
    return found


def method(**options: Any) -> dict[str, Any]:
    return {"name": "custom", "trainer": NAME, "options": options}


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    return InProcess(tmp_path, monkeypatch)


def length(arrays: dict[str, Any]) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values())))


def test_no_site_moves_the_model_further_than_the_median_site(sites: InProcess, trainer: type[Any]) -> None:
    trained = sites.train(trainer, sites.study(method=method()))
    assert same_arrays(weights(trained["a"].network), weights(trained["b"].network))
    told = {site: one.diagnostics["length"] for site, one in trained.items()}
    assert told["a"] != told["b"]
    middle = float(np.median(list(told.values())))
    start = sites.rooms.means["round-0000/model"]
    expected = {name: array.astype(np.float64) for name, array in start.items()}
    shares = {"a": 3 / 8, "b": 5 / 8}  # training cases
    for site, share in shares.items():
        sent = sites.rooms.sent["round-0001/model", site]
        update = {name: array - start[name] for name, array in sent.items()}
        assert length(update) == pytest.approx(min(middle, told[site]), rel=1e-4)
        assert trained[site].diagnostics["factor"] == pytest.approx(min(1, middle / told[site]))
        for name, part in update.items():
            expected[name] = expected[name] + share * part
    for name, array in weights(trained["a"].network).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6)


def test_with_nobody_to_compare_it_is_federated_averaging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[Any]
) -> None:
    alone = InProcess(tmp_path, monkeypatch, {"a": 4})
    clipped = alone.train(trainer, alone.study(method=method()))["a"]
    plain = alone.train(nnUNetTrainerFedAvg, alone.study(method={"name": "fedavg"}))["a"]
    assert same_training(clipped, plain)


@pytest.mark.parametrize("key", ["length", "model"])
def test_a_killed_training_goes_on_to_the_same_bits(sites: InProcess, trainer: type[Any], key: str) -> None:
    study = sites.study(method=method())
    calm = sites.train(trainer, study)
    for site, killed in sites.train_killed(trainer, study, f"round-0001/{key}").items():
        assert same_training(killed, calm[site])


def test_the_options_are_the_trainers(sites: InProcess, trainer: type[Any]) -> None:
    trained = sites.train(trainer, sites.study(method=method(quantile=0.0)))
    lengths = [one.diagnostics["length"] for one in trained.values()]
    assert [one.diagnostics["factor"] for one in trained.values()] == pytest.approx(
        [min(lengths) / length for length in lengths]
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"quantile": 2}, r"quantile: input should be less than or equal to 1 \(found 2\)"),
        ({"quantil": 0.5}, "unknown key 'quantil', did you mean 'quantile'"),
        ({"quantile": "half"}, "quantile: input should be a valid number"),
    ],
)
def test_options_that_the_trainer_does_not_take(
    sites: InProcess, trainer: type[Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"options of '{NAME}'.*{sentence}"):
        check_named_trainers(sites.study(method=method(**options)))


def test_a_trainer_that_is_not_there(sites: InProcess, trainer: type[Any]) -> None:
    wanted = {"name": "custom", "trainer": "nnUNetTrainerFedClap"}
    with pytest.raises(ConfigurationError, match="no trainer 'nnUNetTrainerFedClap' in the folders of nnUNet_ext"):
        check_named_trainers(sites.study(method=wanted))
    with pytest.raises(ConfigurationError, match="'nnUNetTrainerFedAvg' does the method 'fedavg'"):
        check_named_trainers(sites.study(method={**wanted, "trainer": "nnUNetTrainerFedAvg"}))


def test_a_file_of_the_users_that_cannot_be_imported(sites: InProcess, tmp_path: Path, trainer: type[Any]) -> None:
    (tmp_path / "my_trainers" / f"{NAME}.py").write_text("class nnUNetTrainerFedClip(", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=f"Looking for the trainer '{NAME}' .* ended in SyntaxError"):
        check_named_trainers(sites.study(method=method()))
