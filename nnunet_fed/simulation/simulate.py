"""A federation of real processes on one machine: a coordinator, and nnU-Net's own commands at every site.

Source: ours. PyTorch is not imported here; each process imports what it needs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from nnunet_fed.agreement.stages import stages_of
from nnunet_fed.coordinator.watch import watch
from nnunet_fed.datasets.findings import FILE
from nnunet_fed.datasets.folds import has_folds
from nnunet_fed.errors import ConfigurationError, FederationError, UnreachableError
from nnunet_fed.evaluation.across_folds import summary_across_folds
from nnunet_fed.evaluation.summary import lesion_table, result_table, site_summary, summarise
from nnunet_fed.files import write_json, write_text
from nnunet_fed.processes import Process, Step, Worker, raise_first, signals_interrupt, stop, stop_workers
from nnunet_fed.simulation.devices import visible_devices
from nnunet_fed.simulation.first_look import (
    PLANNING_LOG,
    SITES,
    count_cases,
    look_at_sites,
    take,
    tell_odd_plans,
)
from nnunet_fed.simulation.reuse_plans import DATASET, adopt, check_same_planning
from nnunet_fed.study.address import Address
from nnunet_fed.study.federation import Federation, Fold
from nnunet_fed.study.labels import LabelMap, Sources
from nnunet_fed.study.methods.custom_options import EXTERNAL_TRAINERS, Custom
from nnunet_fed.study.site import SITE_FILE_VARIABLE, Site
from nnunet_fed.study.toml import to_toml
from nnunet_fed.transport.site.client import GrpcCommunicator

__all__ = ["Simulation", "lesion_table", "plugin_folder", "result_table", "simulate"]

HOST = "127.0.0.1"
PLANNING = "Planning"
"""What a site does first."""
MAPPED_DATASET = 2
"""nnU-Net's number of the data set with the federation's labels, where a site has a map."""
STARTUP_SECONDS = 60.0
NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
AUGMENTATION_VARIABLE = "nnUNet_n_proc_DA"
THREAD_VARIABLES = ("nnUNet_fed_threads", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Simulation:
    """What to simulate."""

    sites: dict[str, Path]
    """Raw data set (the folder with ``imagesTr``) of each site."""
    out: Path
    """A new or empty folder for everything that is written."""
    study: Federation
    until: Literal["plan", "train", "validate"] = "validate"
    device: str = "cpu"
    threads: int | None = None
    """Threads of each site; ``None``: its share of the cores."""
    planned: Path | None = None
    """Folder of an earlier simulation of these sites, whose plans and preprocessed data are taken over."""
    labels: Mapping[str, Sources] = field(default_factory=dict)
    """By site: ``labels`` of its ``site.toml``. A site that is not named has the federation's labels already."""
    looks: Path | None = None
    """Folder that keeps what is found in the sites' data, a folder for each; ``None``: that of the sites in ``out``."""
    pretrained: Path | None = None
    """The checkpoint whose digest the study names, from whose weights all sites start."""
    devices: tuple[int, ...] = ()
    """GPUs that the sites take in turn (:mod:`nnunet_fed.simulation.devices`); none: all sites see all."""
    training_program: tuple[str, ...] = ()
    """What trains in place of the command ``nnUNetv2_train``, with the same arguments."""
    variables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By site: what its processes have in their environment besides."""


def simulate(simulation: Simulation, console: Console) -> dict[str, Any]:
    """Plan, train and validate at all sites, with the real network between them, and show the progress.

    Writes ``summary.json``, the coordinator's ``record.json`` and a folder for each site below ``simulation.out``.
    No process is left when it returns, fails or is interrupted.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigurationError: a site's data, a label map or ``out`` cannot be used; nothing has started then, and the
            same ``out`` can be given again.
        FederationError: a command failed; with its own words and its log file.
    """
    started = time.monotonic()
    study = simulation.study
    require_trainer(study)
    _check_stages(simulation)
    if simulation.planned is not None:
        check_same_planning(simulation.planned, study, simulation.sites, simulation.labels)
    if study.plans_name is None:
        study = study.model_copy(update={"plans_name": study.planner.replace("Planner", "") + "Plans"})
    _check_sites(simulation)
    out = simulation.out.resolve()
    take(out)
    looks = (
        {}
        if simulation.planned is not None
        else look_at_sites(simulation.sites, _label_maps(simulation), simulation.looks or out / SITES, console)
    )
    places = _places(simulation)
    workers = [Worker(place.name, _steps(simulation, study, place)) for place in places]
    address, *others = (f"{HOST}:{port}" for port in free_ports(1 + len(places)))
    peers = dict(zip(study.sites, others, strict=True)) if study.method.NEEDS_PEERS else {}
    for place in places:
        place.make(address, peers)
        if place.name in looks:  # which spares the site's own look the reading
            looks[place.name].write(place.folder / "nnUNet_preprocessed" / place.dataset / FILE)
        if simulation.planned is not None:
            adopt(simulation.planned / "sites" / place.name, place.folder, study)
    state, study_file = out / "coordinator", out / "federation.toml"
    state.mkdir()
    write_text(study_file, to_toml(study.model_dump(mode="json")))

    command = [sys.executable, "-m", "nnunet_fed", "coordinator", str(study_file)]
    command += ["--listen", address, "--state", str(state), "--insecure"]
    serve = Step("The coordinator", command, os.environ, state / "coordinator.log")
    communicator = GrpcCommunicator(Site(name="watch", coordinator=address, insecure=True, connect_minutes=0.1))
    with signals_interrupt(), ExitStack() as stack:
        coordinator = Process(serve)
        stack.callback(stop, [coordinator])
        stack.callback(stop_workers, workers)
        _await(coordinator, address)

        told: set[str] = set()

        def running() -> bool:
            if coordinator.exit_status() is not None:
                raise FederationError(f"The coordinator has ended. {coordinator.last_words()}\n(log: {serve.log})")
            raise_first([worker for worker in workers if worker.failed()])
            if any(worker.process is not None and worker.process.step.name == PLANNING for worker in workers):
                tell_odd_plans({place.name: place.folder for place in places}, told, console)
            going = [worker.advance() for worker in workers]
            return any(going)

        watch(_patient(communicator.status), running, console)
        write_json(out / "record.json", communicator.status(record=True))
    sites = {place.name: place.summary(study) for place in places}
    summary = summarise(study, sites, time.monotonic() - started)
    write_json(out / "summary.json", summary)
    return summary


def planning_command(study: Federation) -> list[str]:
    """A site's command to plan and preprocess."""
    command = [sys.executable, "-m", "nnunet_fed", "plan_and_preprocess"]
    return [*command, "-d", str(DATASET), "-c", study.configuration, "-np", "1"]


def training_command(study: Federation, fold: Fold, device: str, dataset: int = DATASET) -> list[str]:
    """A site's command to train: nnU-Net's own."""
    trainer = ["-tr", study.method.trainer_name, "-p", str(study.plans_name), "-device", device]
    return [nnunet_command("nnUNetv2_train"), str(dataset), study.configuration, str(fold), *trainer]


def nnunet_command(name: str) -> str:
    """A command of nnU-Net's, of this environment first; raises :class:`ConfigurationError` if there is none."""
    beside = Path(sys.executable).parent / name
    command = str(beside) if beside.is_file() else shutil.which(name)
    if command is None:
        raise ConfigurationError(f"The command {name} is not on the PATH: install nnunetv2 in this environment.")
    return command


def require_trainer(study: Federation) -> str | None:
    """See that the trainers are there that the study names, if it names any; raises :class:`ConfigurationError`.

    Returns:
        What the sites compare of the base trainer; ``None``: it is nnU-Net's own.
    """
    if not isinstance(study.method, Custom) and not study.names_trainer:
        return None
    from nnunet_fed.trainers.parts.named_trainers import check_named_trainers  # with PyTorch, which others spare

    return check_named_trainers(study)


def plugin_folder() -> Path:
    """What ``nnUNet_extTrainer`` must name for nnU-Net to find the federated trainers."""
    spec = importlib.util.find_spec("nnunet_fed.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError("nnunet_fed.trainers is not there: install nnunet_fed again.")
    return Path(spec.submodule_search_locations[0]) / "plugin"


@dataclass(frozen=True)
class Place:
    """A site's place in a simulation."""

    name: str
    source: Path
    folder: Path
    folds: tuple[Fold, ...]
    """What it trains: the study's folds, or ``all`` where there are too few cases for a cross-validation."""
    label_map: LabelMap | None = None
    all_cases: bool = False
    """It trains several folds, each on all its cases, since there are too few for a cross-validation."""

    @property
    def dataset(self) -> str:
        """The data set's name for nnU-Net, which splits names at double underscores."""
        return f"Dataset{DATASET:03d}_" + re.sub(r"[^A-Za-z0-9]+", "_", self.name)

    @property
    def trained_dataset(self) -> str:
        """Name of the data set that is planned and trained with: with a map the one that is built beside."""
        return self.dataset if self.label_map is None else self.label_map.dataset_name(self.dataset)

    def make(self, coordinator: str, peers: Mapping[str, str]) -> None:
        """Make nnU-Net's three folders, with the raw data as a link, and ``site.toml``.

        Args:
            coordinator: its address.
            peers: that of each site, if the method has models go from one to another.
        """
        for name in NNUNET_FOLDERS:
            (self.folder / name).mkdir(parents=True)
        raw = self.folder / "nnUNet_raw" / self.dataset
        try:
            raw.symlink_to(self.source.resolve(), target_is_directory=True)
        except (OSError, NotImplementedError):
            shutil.copytree(self.source, raw)
        site: dict[str, Any] = {"name": self.name, "coordinator": coordinator, "insecure": True}
        if peers:
            site |= {"listen": peers[self.name], "peers": dict(peers)}
        if self.all_cases:
            site["fold"] = "all"
        if self.label_map is not None:
            site |= {"mapped_dataset": self.label_map.dataset, "labels": self.label_map.sources}
        write_text(self.folder / "site.toml", to_toml(site))

    @property
    def labels(self) -> dict[str, Any]:
        """What is trained: the labels of ``dataset.json``, or those of the map."""
        path = self.source / "dataset.json"
        labels: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["labels"]
        return labels if self.label_map is None else self.label_map.resolve(labels, str(path)).labels

    def results(self, study: Federation, fold: Fold) -> Path:
        """The folder of a fold that was trained."""
        model = f"{study.method.trainer_name}__{study.plans_name}__{study.configuration}"
        return self.folder / "nnUNet_results" / self.trained_dataset / model / f"fold_{fold}"

    def summary(self, study: Federation) -> dict[str, Any]:
        """What the trainings left (:mod:`nnunet_fed.evaluation.summary`)."""
        if len(self.folds) == 1:
            return site_summary(self.results(study, self.folds[0]), self.labels, self.folds[0])
        folders = {fold: self.results(study, fold) for fold in self.folds}
        return summary_across_folds(folders, self.labels, self.all_cases)


def _check_sites(simulation: Simulation) -> None:
    names = tuple(sorted(simulation.sites))
    if names != simulation.study.sites:
        raise ConfigurationError(
            f"There are folders for the sites {', '.join(names)}, but the study is of "
            f"{', '.join(simulation.study.sites)}: give a folder for each site of the study."
        )
    # macOS and Windows would put 'A' and 'a' into one folder
    if len({name.casefold() for name in names}) < len(names):
        raise ConfigurationError(f"Two of the sites {', '.join(names)} differ in capitals only: rename one of them.")
    strangers = sorted(set(simulation.labels) - set(names))
    if strangers:
        raise ConfigurationError(f"There is a label map for '{strangers[0]}', but the sites are {', '.join(names)}.")
    for name, folder in sorted(simulation.sites.items()):
        if not (folder / "dataset.json").is_file():
            raise ConfigurationError(
                f"The folder {folder} of site '{name}' has no dataset.json: name a data set in nnU-Net's raw layout."
            )


def _check_stages(simulation: Simulation) -> None:
    *first, last = stages_of(simulation.study.configuration)
    if first and simulation.until != "plan" and simulation.study.trained_folds != ("all",):
        raise ConfigurationError(
            f"{last} trains on what {first[-1]} predicts for every case, and fold {simulation.study.fold} of "
            f"{first[-1]} predicts its validation cases only: simulate {last} with --fold all."
        )


def _places(simulation: Simulation) -> list[Place]:
    places = []
    for name, source in sorted(simulation.sites.items()):
        split = has_folds(count_cases(name, source), source)
        folder = simulation.out.resolve() / SITES / name
        folds, label_map = simulation.study.trained_folds, _label_maps(simulation).get(name)
        too_few = not split and len(folds) > 1
        places.append(Place(name, source, folder, folds if split or too_few else ("all",), label_map, too_few))
    return places


def _label_maps(simulation: Simulation) -> dict[str, LabelMap]:
    return {site: LabelMap(MAPPED_DATASET, sources) for site, sources in simulation.labels.items()}


def _steps(simulation: Simulation, study: Federation, place: Place) -> list[Step]:
    folder = place.folder
    threads = simulation.threads or max(1, (os.cpu_count() or 1) // len(simulation.sites))
    on_device = visible_devices(simulation.sites, simulation.devices, os.environ)[place.name]
    common = {**site_environment(folder, threads), **on_device, **simulation.variables.get(place.name, {})}
    planning = dict(common)
    if planning.get(AUGMENTATION_VARIABLE) == "0":  # stock planning fails with it
        del planning[AUGMENTATION_VARIABLE]
    steps = []
    if simulation.planned is None:
        steps.append(Step(PLANNING, planning_command(study), planning, folder / PLANNING_LOG))
    if simulation.until != "plan":
        dataset = DATASET if place.label_map is None else place.label_map.dataset
        *first, last = stages_of(study.configuration)
        for stage, fold in ((stage, fold) for stage in (*first, last) for fold in place.folds):
            skips = simulation.until == "train" and stage == last  # what a stage predicts is what the next one needs
            # without a GPU to keep busy, processes that augment would only compete with the training
            augmentation = {AUGMENTATION_VARIABLE: "0"} if simulation.device == "cpu" else {}
            training = {**augmentation, **common, "nnUNet_fed_skip_validation": "1" if skips else ""}
            of_stage = study.model_copy(update={"configuration": stage})
            command = training_command(of_stage, fold, simulation.device, dataset)
            if simulation.training_program:
                command[:1] = simulation.training_program
            if simulation.pretrained is not None and stage == last:
                command += ["-pretrained_weights", str(simulation.pretrained.resolve())]
            of = [f"fold {fold}"] if len(place.folds) > 1 else []
            name = " ".join(["Training", *of, *([stage] if stage != last else [])])
            log = "_".join(["train", *([stage] if stage != last else []), *([str(fold)] if of else [])]) + ".log"
            steps.append(Step(name, command, training, folder / log))
    return steps


def site_environment(folder: Path, threads: int) -> dict[str, str]:
    """The environment of a site's commands.

    Args:
        folder: of the site, with nnU-Net's three folders and ``site.toml``.
        threads: of each process.
    """
    theirs = os.environ.get(EXTERNAL_TRAINERS, "").split(os.pathsep)
    folders = dict.fromkeys([str(plugin_folder()), *filter(None, theirs)])
    return {
        "nnUNet_def_n_proc": "2",
        **os.environ,
        **{name: str(folder / name) for name in NNUNET_FOLDERS},
        **dict.fromkeys(THREAD_VARIABLES, str(threads)),
        SITE_FILE_VARIABLE: str(folder / "site.toml"),
        EXTERNAL_TRAINERS: os.pathsep.join(folders),
        "PYTHONUNBUFFERED": "1",
    }


def free_ports(number: int) -> list[int]:
    """Different ports, since all are held until the last is found."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(number)]
        for listener in listeners:
            listener.bind((HOST, 0))
        return [listener.getsockname()[1] for listener in listeners]


def _await(coordinator: Process, address: str) -> None:
    """Return once the coordinator listens."""
    end = time.monotonic() + STARTUP_SECONDS
    while coordinator.exit_status() is None and time.monotonic() < end:
        with suppress(OSError), socket.create_connection(Address.parse(address), timeout=1):
            return
        time.sleep(0.1)
    raise FederationError(f"The coordinator did not start. {coordinator.last_words()}\n(log: {coordinator.step.log})")


def _patient(poll: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Show the last answer while none comes: the coordinator may be busy, and whether it lives is asked elsewhere."""
    latest: dict[str, Any] = poll()

    def patient() -> dict[str, Any]:
        with suppress(UnreachableError):
            latest.update(poll())
        return latest

    return patient
