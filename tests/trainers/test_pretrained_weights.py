"""Pretrained weights: what a file holds, its digest, and what a network takes of it."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from nnunet_fed.cli.app import app
from nnunet_fed.cli.shared_options import StudyOptions
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.trainers.parts.pretrained_weights import read_weights, take_weights


class Network(nn.Module):
    """With the names that count: a stem, which stands there twice, and heads."""

    def __init__(self, channels: int = 1, classes: int = 3):
        super().__init__()
        self.encoder = nn.Conv2d(channels, 4, 3)
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder
        self.decoder.norm = nn.BatchNorm2d(4)
        self.decoder.seg_layers = nn.ModuleList([nn.Conv2d(4, classes, 1)])


def saved(path: Path, weights: Any = None, **further: Any) -> Path:
    torch.save({"network_weights": Network().state_dict() if weights is None else weights, **further}, path)
    return path


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------------- the digest


def test_the_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    """Whatever else stands in the file, whoever has wrapped the network, and in whichever order the names stand."""
    weights = Network().state_dict()
    plain = read_weights(saved(tmp_path / "plain.pth", weights))
    assert re.fullmatch("[0-9a-f]{64}", plain.digest)
    for number, prefix in enumerate(("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")):
        wrapped = {prefix + name: tensor for name, tensor in reversed(weights.items())}
        found = read_weights(saved(tmp_path / f"{number}.pth", wrapped, optimizer_state={"a": torch.ones(3)}))
        assert found.digest == plain.digest
        network = Network()
        take_weights(network, found)
        assert torch.equal(network.encoder.weight, weights["encoder.weight"])
    for changed in ({"encoder.bias": weights["encoder.bias"] + 1}, {"encoder.bias": weights["encoder.bias"].double()}):
        assert read_weights(saved(tmp_path / "changed.pth", {**weights, **changed})).digest != plain.digest
    half = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    assert read_weights(saved(tmp_path / "half.pth", half)).digest != plain.digest


def test_the_command_prints_it(tmp_path: Path) -> None:
    file = saved(tmp_path / "plain.pth")
    result = CliRunner().invoke(app, ["digest", str(file)])
    assert result.output == read_weights(file).digest + "\n"
    assert StudyOptions(pretrained=file).settings()["pretrained"] == result.output.strip()


# ------------------------------------------------------------------------------------------------------------- the rule


def test_all_but_the_heads_are_taken_and_classes_may_differ(tmp_path: Path) -> None:
    """With running statistics, and with the counter of a normalisation; in place, so that an optimizer sees it."""
    given = Network(classes=5).state_dict()
    given["decoder.norm.running_mean"].fill_(3)
    given["decoder.norm.num_batches_tracked"].fill_(7)
    network = Network()
    heads, stem = network.decoder.seg_layers[0].weight.clone(), network.encoder.weight
    assert take_weights(network, read_weights(saved(tmp_path / "a.pth", {**given, "further": torch.ones(1)}))) == ()
    assert network.encoder.weight is stem
    assert torch.equal(network.decoder.seg_layers[0].weight, heads)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, given[name]) or ".seg_layers." in name


@pytest.mark.parametrize("core", ["core", "_core"])
def test_a_checkpoint_of_nnunet_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: str) -> None:
    """Its log holds NumPy's numbers, as NumPy 1 and NumPy 2 name them; ours holds random states."""
    makers = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    log = {"mean_fg_dice": [np.float32(0.5), np.float64(0.25)], "dice_per_class_or_region": [[np.float32(0.5)]]}
    further = {"logging": log, "_best_ema": np.float64(0.3), "init_args": {"device": torch.device("cuda"), "fold": 0}}
    states = {"federation": {"random": {"numpy": np.random.get_state()}, "held": ("start/model", "0")}}
    file = tmp_path / "x.pth"
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy 2 would have its older name forgotten
        for maker in makers:
            patch.setattr(maker, "__module__", f"numpy.{core}.multiarray")
        saved(file, None, **further, **states)
    assert f"numpy.{core}.multiarray".encode() in file.read_bytes()
    assert read_weights(file).tensors.keys() == Network().state_dict().keys()


# ------------------------------------------------------------------------------------------------------------ bad input


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def half_of(path: Path) -> Path:
    content = saved(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def raw(path: Path) -> Path:
    torch.save(Network().state_dict(), path)
    return path


NO_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path, "x.pth cannot be read: No such file or directory"),
    "folder": (lambda path: path.parent, "cannot be read: Is a directory"),
    "empty": (lambda path: written(path, b""), "x.pth is no checkpoint of nnU-Net"),
    "text": (lambda path: written(path, b"weights\n" * 99), "x.pth is no checkpoint of nnU-Net"),
    "half": (half_of, "x.pth is no checkpoint of nnU-Net"),
    "weights alone": (raw, "it has no 'network_weights'"),
    "no weights": (lambda path: saved(path, {}), "it has no 'network_weights'"),
    "no tensors": (lambda path: saved(path, {"a": 1}), "its 'network_weights' are not tensors by name"),
    "a command": (lambda path: saved(path, None, x=Command(path.with_name("made"))), "plain values: posix.mkdir"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    make, told = NO_FILES[kind]
    with pytest.raises(ConfigurationError) as refused:
        read_weights(make(tmp_path / "x.pth"))
    assert told in str(refused.value)
    assert re.search(r"Name a (file such as checkpoint_final\.pth|checkpoint of nnU-Net)\.$", str(refused.value))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "made").exists(), "nothing that stands in it was run"


def test_a_file_that_nobody_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ConfigurationError, match=r"x\.pth cannot be read: Permission denied"):
        read_weights(saved(tmp_path / "x.pth"))


def not_finite(weights: dict[str, Any]) -> None:
    weights["decoder.norm.weight"][1] = torch.nan


def missing(weights: dict[str, Any]) -> None:
    del weights["decoder.norm.weight"], weights["decoder.norm.bias"]


def channels(weights: dict[str, Any]) -> None:
    weights.update(Network(channels=2).state_dict())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (not_finite, r"x\.pth are of a training that diverged: 'decoder\.norm\.weight' holds a number that is not fin"),
        (missing, r"of another network than .*: 'decoder\.norm\.weight' is missing there \(and 1 further tensors do"),
        (channels, r"'encoder\.weight' has the shape \(4, 2, 3, 3\) there and \(4, 1, 3, 3\) here .* input channels"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str) -> None:
    network, weights = Network(), Network().state_dict()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    change(weights)
    with pytest.raises(ConfigurationError, match=told):
        take_weights(network, read_weights(saved(tmp_path / "x.pth", weights)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
