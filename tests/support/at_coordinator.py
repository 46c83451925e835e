"""Tiny sites in one process, as in :mod:`in_process`, at a real coordinator, with its journal and its rules."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from in_process import CPU, InProcess, Killed
from left_behind import take_turns
from serving import Served
from tiny import DESCRIPTION, tiny_plans

from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.trainers.parts import connected_trainer, coordinator_session
from nnunet_fed.transport.site.client import GrpcCommunicator


class AtCoordinator(InProcess):
    """Trains tiny sites at a coordinator, whose state outlives each of its starts.

    Args:
        folder: of everything that is written.
        monkeypatch: sets nnU-Net's variables.
        cases: of each site.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, cases: dict[str, int] | None = None):
        super().__init__(folder, monkeypatch, cases)
        self.state = folder / "state"
        monkeypatch.setattr(connected_trainer, "CoordinatorSession", coordinator_session.CoordinatorSession)
        monkeypatch.setenv("nnUNet_fed_debug", "1")

    def results(self, site: str) -> Path:
        """The folder of the fold."""
        return next((self._folder / site / "results").glob("*/*/fold_0"))

    def command(self, trainer: type[Any], study: Federation, site: str, continues: bool) -> Any:
        """What ``nnUNetv2_train`` makes at a site, with ``--c`` or without."""
        self._patch.setenv("nnUNet_preprocessed", str(self._folder / site / "preprocessed"))
        self._patch.setenv("nnUNet_results", str(self._folder / site / "results"))
        plans = {**tiny_plans(study), "continue_training": continues}
        made = trainer(plans, "2d", 0, DESCRIPTION, CPU)
        for name in ("final", "latest") if continues else ():
            checkpoint = Path(made.output_folder) / f"checkpoint_{name}.pth"
            if checkpoint.is_file():
                made.load_checkpoint(str(checkpoint))
                break
        return made

    def go(
        self, trainer: type[Any], planned: Federation, served: Federation | None = None, continues: bool = False,
        sites: Iterable[str] | None = None, dying: dict[str, str] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Start the coordinator, and train at the sites to the end; returns the coordinator's record.

        Args:
            trainer: the class.
            planned: the study in the sites' plans.
            served: the one in ``federation.toml``; ``None``: the same.
            continues: the sites' commands say ``--c``.
            sites: that train; ``None``: all.
            dying: by site: the key before whose collective its process is killed.
        """
        turn, errors = threading.Lock(), list[BaseException]()
        with ExitStack() as stack:
            at = Served(served or planned, self.state, stack)
            patch = stack.enter_context(self._patch.context())
            patch.setattr(Site, "from_environment", lambda: at.settings(self._here.site))
            self._let_die(patch, dying or {})
            take_turns(patch, turn)

            def train(site: str) -> None:
                self._here.site = site
                with turn:
                    made = self.command(trainer, planned, site, continues)
                    made.run_training()
                    made.perform_actual_validation()

            chosen = list(self.cases if sites is None else sites)
            with ThreadPoolExecutor(len(chosen)) as pool:
                errors = [error for f in [pool.submit(train, site) for site in chosen] if (error := f.exception())]
            watcher = GrpcCommunicator(at.settings("watcher"))
            stack.callback(watcher.close)
            record = watcher.status(record=True)
        for error in errors:
            if not isinstance(error, Killed):
                raise error
        return record

    def _let_die(self, patch: pytest.MonkeyPatch, dying: dict[str, str]) -> None:
        collective = GrpcCommunicator._collective

        def killed(communicator: GrpcCommunicator, key: str, *given: Any) -> Any:
            if dying.get(communicator.site) == key:
                raise Killed
            return collective(communicator, key, *given)

        patch.setattr(GrpcCommunicator, "_collective", killed)

    def record(self, site: str) -> dict[str, Any]:
        """``federation.json``."""
        content: dict[str, Any] = json.loads((self.results(site) / "federation.json").read_text(encoding="utf-8"))
        return content
