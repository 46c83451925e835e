"""How a fuzz target with seeds starts. Folders on the command line are corpora, files are inputs to run once more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris


def fuzz(one_input: Callable[[bytes], None], folder: Path, seeds: Iterable[bytes], options: Iterable[str]) -> None:
    """Fuzz until libFuzzer's options say enough, or something is found; ends the process with libFuzzer's status.

    Args:
        one_input: the target.
        folder: for the seeds, and for the corpus if the command line names none.
        seeds: first inputs.
        options: libFuzzer's, before those of the command line.
    """
    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if not any(Path(name).is_file() for name in given):
        corpora = [Path(name) for name in given] or [folder / "corpus"]  # new inputs go into the first one
        corpora.append(folder / "seeds")
        for corpus in corpora:
            corpus.mkdir(exist_ok=True)
        for number, seed in enumerate(seeds):
            (corpora[-1] / str(number)).write_bytes(seed)
        given = [str(corpus) for corpus in corpora]
    options = [*options, *(argument for argument in sys.argv[1:] if argument.startswith("-"))]
    child = os.fork()  # libFuzzer leaves at once, and what must be tidied up is tidied up by the parent
    if child == 0:
        atheris.Setup([sys.argv[0], *options, *given], one_input)
        atheris.Fuzz()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
