"""Files that are read in processes, one of which dies."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from deadly import die_of_c1
from faulty_data import make

from nnunet_fed.datasets.findings import Finding
from nnunet_fed.inspection import workers
from nnunet_fed.inspection.look import look_at


def test_a_process_that_dies_costs_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "data")
    monkeypatch.setattr(workers, "ProcessPoolExecutor", ProcessPoolExecutor)
    monkeypatch.setattr(workers, "read_facts", die_of_c1)
    monkeypatch.setattr(workers, "FILES_A_PROCESS", 3)
    report = look_at(folder, "own").report
    (finding,) = report.findings
    assert isinstance(finding, Finding)
    assert (finding.case, finding.file, finding.kind) == ("c1", "imagesTr/c1_0000.nii.gz", "unreadable files")
    assert "the process that read it died" in finding.found


@pytest.mark.parametrize(("files", "told", "processes"), [(1, 8, 1), (8, 8, 1), (9, 8, 2), (1000, 3, 3), (1000, 1, 1)])
def test_as_many_processes_as_nnunet_def_n_proc_says(
    files: int, told: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "default_num_processes", told)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert workers._processes(files) == processes
