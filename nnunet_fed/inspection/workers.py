"""Read many files at the same time, in processes that may die of one of them. Source: ours."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes

from nnunet_fed.inspection.reading import FileFacts, read_facts

Job = tuple[str, bool]
"""A file, and whether it is a label."""
FILES_A_PROCESS = 8
"""A process takes a second to start, which fewer files do not need."""
DIED = "the process that read it died, most likely for want of memory: is the file what it should be?"


class Readers:
    """Processes that read files, for one data set after another; they are started when they are needed.

    As many as ``nnUNet_def_n_proc`` says, at most one a core. One that dies costs the files that were read at that
    moment a second try, each in a process of its own; which of them it was stands in the answer.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def read_all(self, jobs: Sequence[Job], reader: str, done: Callable[[], None]) -> dict[Job, FileFacts]:
        """Read files.

        Args:
            jobs: files to be read.
            reader: name of nnU-Net's class.
            done: called for each file that is read.
        """
        facts: dict[Job, FileFacts] = {}
        suspects: list[Job] = []
        waiting = list(reversed(jobs))
        while waiting:
            suspects += self._read_some(waiting, reader, facts, done)
        for job in suspects:
            if self._read_some([job], reader, facts, done):
                facts[job] = FileFacts(problem=DIED)
                done()
        return facts

    def _read_some(
        self, waiting: list[Job], reader: str, facts: dict[Job, FileFacts], done: Callable[[], None]
    ) -> list[Job]:
        """Read files until none is left or a process dies; returns those that were being read then."""
        running: dict[Future[FileFacts], Job] = {}
        processes = _processes(len(waiting))
        if self._pool is None:
            # spawn: a forked copy of a process with threads, an open channel among them, may hang
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(_processes(sys.maxsize), context, _be_silent)
        try:
            while waiting or running:
                # one more than there are processes, so that none waits for this one
                while waiting and len(running) < processes + (processes > 1):
                    job = waiting.pop()
                    running[self._pool.submit(read_facts, Path(job[0]), reader, job[1])] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    facts[running[future]] = future.result()
                    del running[future]
                    done()
        except BrokenProcessPool:
            self._end()
            return list(running.values())
        except BaseException:
            self._end()
            raise
        return []

    def _end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _processes(files: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(int(default_num_processes), cores, -(-files // FILES_A_PROCESS)))


def _be_silent() -> None:
    """For what nnU-Net's readers print, which the facts tell."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
