"""Options that several commands have: each is declared here, with its help and its default, and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from nnunet_fed.cli.option_values import named_folders, named_labels, whole_number
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.simulation.devices import cuda_devices
from nnunet_fed.study.federation import STOCK_TRAINER, Federation


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options: a parameter of a dataclass stands for the options that its fields are.

    All parameters are given by name, so a group has no default: its fields have theirs.
    """
    groups: dict[str, type[Any]] = {}
    parameters: list[Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        group = hints[name]
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=group))
            continue
        assert isinstance(group, type)
        groups[name] = group
        of_group = get_type_hints(group, include_extras=True)
        for field in fields(group):
            default = Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=of_group[field.name])
            )

    @wraps(command)
    def of_options(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **made)

    of_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    of_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return of_options


def _of_a_study(name: str) -> Any:
    return Federation.model_fields[name].default


def _default_with(name: str) -> str:
    return f"{_of_a_study(name)}, or the named trainer's own"


@dataclass(frozen=True)
class StudyOptions:
    """What makes a study, by the names of ``federation.toml``; the defaults suit a trial."""

    rounds: Annotated[int, typer.Option(help="Exchanges in all.")] = 10
    local_epochs: Annotated[int, typer.Option(help="nnU-Net epochs between two exchanges.")] = _of_a_study(
        "local_epochs"
    )
    iterations_per_epoch: Annotated[int, typer.Option("--iterations", help="Steps of an epoch.")] = _of_a_study(
        "iterations_per_epoch"
    )
    val_iterations_per_epoch: Annotated[
        int, typer.Option("--val-iterations", help="Steps of an epoch's online validation.")
    ] = 10
    configuration: Annotated[str, typer.Option("--config", help="nnU-Net configuration.")] = _of_a_study(
        "configuration"
    )
    planner: Annotated[str, typer.Option(help="Planner; the small one suits a CPU.")] = "nnUNetPlannerFedSmall"
    gpu_memory_target_in_gb: Annotated[
        float | None, typer.Option("--gpu-memory", metavar="GB", help="What the planner may fill; default: its own.")
    ] = None
    trainer: Annotated[
        str, typer.Option(metavar="CLASS", help="Base trainer: nnU-Net's own, or a variant of it (nnUNetTrainerDA5).")
    ] = _of_a_study("trainer")
    initial_lr: Annotated[
        float | None, typer.Option("--lr", help=f"Initial learning rate; default: {_default_with('initial_lr')}.")
    ] = None
    momentum: Annotated[float | None, typer.Option(help=f"Momentum; default: {_default_with('momentum')}.")] = None
    fold: Annotated[
        str, typer.Option(metavar="FOLD[,FOLD...]", help="Cross-validation folds; simulate takes all, too.")
    ] = "0"
    weighting: Annotated[str, typer.Option(help="Weight of a site in a mean: cases or uniform.")] = _of_a_study(
        "weighting"
    )
    deadline_minutes: Annotated[float, typer.Option(help="Deadline of a round.")] = 60.0
    cross_site: Annotated[
        bool, typer.Option("--cross-site", help="Evaluate each site's model at each site, too; not with gcml.")
    ] = _of_a_study("cross_site")
    pretrained: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from the weights of this checkpoint of nnU-Net.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """For ``federation.toml``; a bad fold, or a file that is no checkpoint, raises :class:`ConfigurationError`."""
        folds = [fold if fold == "all" else whole_number("--fold", fold) for fold in self.fold.split(",")]
        several = {"folds": folds} if len(folds) > 1 else {}
        deadline = {"planning_deadline_minutes": self.deadline_minutes}
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.trainer == STOCK_TRAINER:
            given = {**{name: _of_a_study(name) for name in ("initial_lr", "momentum")}, **given}
        return {**given, **deadline, "fold": folds[0], **several, "pretrained": self._digest()}

    def _digest(self) -> str | None:
        if self.pretrained is None:
            return None
        from nnunet_fed.trainers.parts.pretrained_weights import read_weights  # with PyTorch, which others spare

        return read_weights(self.pretrained).digest


@dataclass(frozen=True)
class SiteOptions:
    """Sites on this machine."""

    site: Annotated[list[str], typer.Option(metavar="NAME=FOLDER", help="A site and its raw data; repeat for more.")]
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SITE:]LABEL=OWN,...", help="Which labels of the sites, or of one, become LABEL; repeat for more."
        ),
    ] = None

    def folders(self) -> dict[str, Path]:
        """The sites' raw data, by name; raises :class:`ConfigurationError`."""
        return named_folders(self.site)

    def label_maps(self) -> dict[str, dict[str, tuple[int | str, ...]]]:
        """Label maps by site; raises :class:`ConfigurationError`."""
        return named_labels(self.labels or [], self.folders())


@dataclass(frozen=True)
class MachineOptions:
    """What sites on this machine may take of it."""

    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu"
    devices: Annotated[
        str | None,
        typer.Option(metavar="cuda:0,cuda:1", help="GPUs that the sites take in turn, in place of --device."),
    ] = None
    threads: Annotated[int | None, typer.Option(help="Threads of each site; default: its share of the cores.")] = None

    @property
    def kind(self) -> str:
        """As nnU-Net names it; raises :class:`ConfigurationError`."""
        if self.device not in ("cpu", "cuda", "mps"):
            raise ConfigurationError(f"--device {self.device}: cpu, cuda or mps. A GPU's number goes into --devices.")
        return "cuda" if self.gpus else self.device

    @property
    def gpus(self) -> tuple[int, ...]:
        """Their numbers, if the sites take them in turn; raises :class:`ConfigurationError`."""
        return cuda_devices(self.devices) if self.devices is not None else ()


@dataclass(frozen=True)
class KeyOptions:
    """The files for TLS: all three, or none."""

    cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate (PEM), for TLS.")] = None
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key.")] = None
    ca: Annotated[Path | None, typer.Option(metavar="FILE", help="Authorities whose certificates are accepted.")] = None
