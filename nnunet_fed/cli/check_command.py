"""``nnunet_fed check``: at a site, before a study of weeks."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nnunet_fed.agreement.stages import to_preprocess
from nnunet_fed.datasets.description import NAME, read_description
from nnunet_fed.datasets.listing import list_cases
from nnunet_fed.errors import ConfigurationError, FederationError
from nnunet_fed.exchange.keys import PLANS
from nnunet_fed.preflight import folder_checks
from nnunet_fed.preflight import site_checks as checks
from nnunet_fed.preflight.site_checks import Finding, Outcome
from nnunet_fed.strict_json import to_json
from nnunet_fed.study.federation import Federation, study_in
from nnunet_fed.study.site import SITE_FILE_VARIABLE, Site


class TrainingDevice(str, Enum):
    """Where the training will run."""

    cpu = "cpu"
    cuda = "cuda"


def check(
    dataset: Annotated[
        int | None, typer.Option("-d", metavar="ID", help="This site's data set: check its plans too.")
    ] = None,
    plans_name: Annotated[str | None, typer.Option("-p", metavar="PLANS", help="Its plans; default: found.")] = None,
    configuration: Annotated[str | None, typer.Option("-c", metavar="CONFIG", help="Default: the study's.")] = None,
    trainer: Annotated[str | None, typer.Option("-tr", metavar="TRAINER", help="The trainer you will name.")] = None,
    device: Annotated[
        TrainingDevice, typer.Option("-device", help="Where the training will run.")
    ] = TrainingDevice.cuda,
    megabytes: Annotated[float, typer.Option(min=0.01, max=60, help="So much is sent and received, for its time.")] = 8,
    data: Annotated[
        bool, typer.Option("--data", help="With -d: read all of its files, and show all that is wrong with them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """At a site: is everything ready for the study? A line each; exit status 0 fine, 1 something failed, 3 warnings."""
    if data and dataset is None:
        raise ConfigurationError("--data: name the data set with -d.")
    findings, package = [], logging.getLogger("nnunet_fed")
    with ExitStack() as stack:
        stack.callback(package.setLevel, package.level)
        package.setLevel(logging.ERROR)  # what the log would tell, the findings tell
        size = int(megabytes * 1e6)
        checks_of_site = _Check(stack, dataset, plans_name, configuration, trainer, device.value, size, data)
        for finding in checks_of_site.findings():
            findings.append(finding)
            if not as_json:
                typer.echo(finding.line)
    if as_json:
        typer.echo(to_json([asdict(finding) for finding in findings], indent=2))
    elif checks_of_site.look is not None:
        checks_of_site.look.report.show(Console())
    raise typer.Exit(checks.exit_status(findings))


@dataclass
class _Check:
    """All checks, one after the other; what builds on one that failed is skipped."""

    stack: ExitStack
    dataset: int | None
    plans_name: str | None
    configuration: str | None
    trainer: str | None
    device: str
    size: int
    data: bool
    site: Site | None = None
    study: Federation | None = None
    published: dict[str, Any] | None = None
    plans: dict[str, Any] | None = None
    footprint: Any = None
    probe: Any = None
    look: Any = None

    def findings(self) -> Iterator[Finding]:
        """Do them."""
        yield self._try("site.toml", self._read_site)
        yield from self._way()
        yield self._try("nnU-Net paths", self._check_paths)
        if self.data:
            yield self._try("data", self._check_data)
        yield self._try("fold", self._check_fold)
        yield self._try("trainer", self._check_trainer)
        yield self._try("plans", self._check_plans)
        yield self._try("memory", self._check_memory)
        yield self._try("disk", self._check_disk)
        if self.probe is None:
            yield Finding("transfer", Outcome.skipped, "the coordinator cannot be asked")
        else:
            payload = self.footprint.payload_bytes if self.footprint else None
            yield self._try("transfer", lambda: self.probe.time_transfer(self.size, payload))

    @staticmethod
    def _try(about: str, look: Callable[[], Finding]) -> Finding:
        try:
            with redirect_stdout(sys.stderr):  # for what nnU-Net prints
                return look()
        except (FederationError, OSError) as error:
            return Finding(about, Outcome.failed, str(error))

    def _read_site(self) -> Finding:
        self.site = Site.from_environment()
        text = f"{os.environ[SITE_FILE_VARIABLE]}: site '{self.site.name}', coordinator {self.site.coordinator}"
        return Finding("site.toml", Outcome.ok, text)

    def _way(self) -> Iterator[Finding]:
        """To the coordinator, and what it tells."""
        from nnunet_fed.transport.site import connection_checks

        site = self.site
        if site is None:
            yield Finding("coordinator", Outcome.skipped, "without site.toml it is not known")
            return
        steps = {
            "certificates": connection_checks.check_keys,
            "name": connection_checks.check_name_resolution,
            "port": connection_checks.check_port,
            "TLS": connection_checks.check_handshake,
        }
        for about, look in steps.items():
            finding = self._try(about, lambda look=look: look(site))  # type: ignore[misc]
            yield finding
            if finding.state is Outcome.failed:
                yield Finding("coordinator", Outcome.skipped, f"it cannot be asked before '{about}' is put right")
                return
        try:
            yield from self._ask(site)
        except (FederationError, OSError) as error:
            yield Finding("coordinator", Outcome.failed, str(error))

    def _ask(self, site: Site) -> Iterator[Finding]:
        from nnunet_fed.exchange.outgoing_log import FILE, OutgoingLog
        from nnunet_fed.transport.site.client import GrpcCommunicator
        from nnunet_fed.transport.site.connection_checks import Probe

        outgoing = OutgoingLog(Path(os.environ[SITE_FILE_VARIABLE]).parent / FILE)
        probe = Probe(site, outgoing)
        self.stack.callback(probe.close)
        introduction = probe.introduce(checks.own_versions())
        self.probe = probe
        communicator = GrpcCommunicator(site)
        self.stack.callback(communicator.close)
        self.study = study = Federation.restore(communicator.status()["study"])
        if introduction.reply.planning_run:
            communicator.run = introduction.reply.planning_run
            self.published = communicator.gathered(PLANS)
        reply = introduction.reply
        text = f"'{study.name}', nnunet_fed {reply.version}, protocol {reply.protocol}, sites {', '.join(study.sites)}"
        yield Finding("coordinator", Outcome.ok, text)
        yield checks.check_clock(introduction.halfway, reply.now, introduction.trip)
        told = {**introduction.versions, "the coordinator": {"nnunet-fed": reply.version}}
        yield checks.check_versions(site.name, told)

    def _check_data(self) -> Finding:
        from nnunet_fed.planners.dataset import look_at_dataset

        assert self.dataset is not None
        self.look, kept = look_at_dataset(self.dataset, self.site.label_map if self.site else None)
        report = self.look.report
        text = f"{report.name}: {report.summary}; all of it stands in {kept}"
        if report.errors:
            return Finding("data", Outcome.failed, f"{text}.", "The table at the end says what to do.")
        return Finding("data", Outcome.warning if report.findings else Outcome.ok, text)

    def _datasets(self) -> list[int]:
        """Numbers of the site's own data set, and of the one with mapped labels."""
        label_map = self.site.label_map if self.site else None
        numbers = [self.dataset, None if label_map is None else label_map.dataset]
        return [number for number in numbers if number is not None]

    def _check_paths(self) -> Finding:
        trainer = self.trainer or (self.study.method.trainer_name if self.study else None)
        return folder_checks.check_paths(self._datasets(), trainer)

    def _check_fold(self) -> Finding:
        raw = None if self.dataset is None else folder_checks.dataset_folder(folder_checks.RAW, self.dataset)
        if raw is None or self.study is None:
            return Finding("fold", Outcome.skipped, "needs a data set (-d) and the study")
        content, _ = read_description(raw / NAME)
        if not content or "file_ending" not in content:
            return Finding("fold", Outcome.skipped, f"{raw / NAME} cannot be used; 'check --data' tells more")
        return folder_checks.check_fold(self.study, list_cases(raw, content).cases, raw, self._preprocessed())

    def _check_trainer(self) -> Finding:
        from nnunet_fed.simulation.simulate import plugin_folder, require_trainer

        expected = self.study.method.trainer_name if self.study else None
        finding = checks.check_trainer(plugin_folder(), self.trainer, expected)
        if finding.state is Outcome.ok and self.study:
            require_trainer(self.study)
        return finding

    def _preprocessed(self) -> Path | None:
        """Folder of the data set in which the site will train: the mapped one, if its labels are mapped."""
        label_map = self.site.label_map if self.site else None
        number = label_map.dataset if label_map else self.dataset
        return None if number is None else folder_checks.dataset_folder(folder_checks.PREPROCESSED, number)

    def _check_plans(self) -> Finding:
        if self.dataset is None:
            return Finding("plans", Outcome.skipped, "name a data set with -d to check its plans")
        folder = self._preprocessed()
        if folder is None:
            text = f"data set {self.dataset} is not planned yet: 'nnunet_fed plan_and_preprocess' does it"
            return Finding("plans", Outcome.skipped, text)
        plans = checks.find_plans(folder, self.plans_name, self.study)
        if isinstance(plans, Finding):
            return plans
        self.plans = plans
        if self.study is None:
            return Finding("plans", Outcome.skipped, "the coordinator cannot be asked whether they are its study's")
        return checks.check_plans(plans, self.study, self.published, self._wanted())

    def _wanted(self) -> str:
        return self.configuration or (self.study.configuration if self.study else "3d_fullres")

    def _check_memory(self) -> Finding:
        from nnunet_fed.preflight.resources import check_memory, footprint

        folder = self._preprocessed()
        if not (self.plans and folder and self._wanted() in self.plans["configurations"]):
            return check_memory(None, self.device)
        from nnunet_fed.trainers.parts.named_trainers import network_builder

        dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        study, trained, remark = study_in(self.plans), None, ""
        build = network_builder(study) if study.names_trainer else None
        try:
            trained = self._really_trained(study, dataset)
        except FederationError as error:
            remark = f"; by nnU-Net's own reckoning of the plans, since: {error}"
        self.footprint = footprint(self.plans, self._wanted(), dataset, study, build, trained)
        return check_memory(self.footprint, self.device, study.gpu_memory_target_in_gb, remark)

    def _really_trained(self, study: Federation, dataset: dict[str, Any]) -> Any:
        from nnunet_fed.trainers.parts.base_trainer import find_trainer
        from nnunet_fed.trainers.parts.named_trainers import method_trainer
        from nnunet_fed.trainers.parts.step_memory import reckon

        assert self.plans is not None
        named: Any = find_trainer(self.trainer) if self.trainer else None
        return reckon(named or method_trainer(study), self.plans, self._wanted(), dataset, self.device)

    def _check_disk(self) -> Finding:
        raw = None if self.dataset is None else folder_checks.dataset_folder(folder_checks.RAW, self.dataset)
        folder, known, done = self._preprocessed(), (self.plans or {}).get("configurations", {}), None
        if self.plans and folder and self._wanted() in known:
            done = folder / known[to_preprocess(self.plans, self._wanted())[-1]]["data_identifier"]
        results = self.footprint.results_bytes if self.footprint else 0.0
        looked = (
            None if self.dataset is None else folder_checks.dataset_folder(folder_checks.PREPROCESSED, self.dataset)
        )
        needed = folder_checks.preprocessed_bytes(raw, done, folder_checks.voxels_of_images(looked))
        return folder_checks.check_disk(needed, results)
