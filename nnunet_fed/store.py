"""The coordinator's memory: a SQLite journal and payload files. Every fact is on disk before it is answered."""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError

FORMAT = 1
"""Version of the state directory's format."""

SCHEMA = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE study (at REAL NOT NULL, value TEXT NOT NULL);
CREATE TABLE run (id TEXT PRIMARY KEY, value TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE scope (run TEXT, name TEXT, participants TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (run, name));
CREATE TABLE collective (
    run TEXT, key TEXT, verb TEXT NOT NULL, status TEXT NOT NULL, opened REAL NOT NULL, closed REAL,
    schema TEXT, digest TEXT, size INTEGER, file TEXT, error TEXT, PRIMARY KEY (run, key));
CREATE TABLE contribution (
    run TEXT, key TEXT, site TEXT, weight REAL NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, file TEXT,
    at REAL NOT NULL, PRIMARY KEY (run, key, site));
CREATE TABLE standing (run TEXT, site TEXT, state TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (run, site));
CREATE TABLE event (at REAL NOT NULL, run TEXT, site TEXT, text TEXT NOT NULL);
"""


@dataclass
class Collective:
    """One use of one verb in one run."""

    run: str
    key: str
    verb: str
    status: str
    """``open``, ``closed``, ``failed`` (deadline), ``empty`` (no contribution) or ``pruned`` (result deleted)."""
    opened: float
    closed: float | None
    schema: str | None
    digest: str | None
    size: int | None
    file: str | None
    error: str | None

    @property
    def scope(self) -> str:
        """The part of the key before the first slash; its participants are frozen together."""
        return scope_of(self.key)


@dataclass
class Contribution:
    """What one site gave to one collective."""

    run: str
    key: str
    site: str
    weight: float
    digest: str
    size: int
    file: str | None
    at: float


def scope_of(key: str) -> str:
    """The part of a key before the first slash."""
    return key.partition("/")[0]


class Store:
    """Journal and files below one folder. Not thread-safe: the coordinator calls it under its lock.

    Raises:
        ConfigurationError: the folder was written by another version of the format, or is in use.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.spool = folder / "spool"
        self.results = folder / "results"
        for path in (self.spool, self.results):
            path.mkdir(parents=True, exist_ok=True)
        self._journal = sqlite3.connect(folder / "journal.sqlite", check_same_thread=False, timeout=2.0)
        try:
            self._journal.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._journal.execute("PRAGMA journal_mode = WAL")
            self._journal.execute("PRAGMA synchronous = FULL")
            with self._journal:
                self._journal.execute("BEGIN IMMEDIATE")
                if not self._journal.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in SCHEMA.split(";"):
                        self._journal.execute(statement)
                    self.set_fact("format", FORMAT)
        except sqlite3.OperationalError as error:
            raise ConfigurationError(
                f"The state directory {folder} cannot be opened ({error}). If another coordinator uses it, "
                "stop that one or give this one another --state."
            ) from None
        if (found := self.fact("format")) != FORMAT:
            raise ConfigurationError(
                f"The state directory {folder} has format {found}, this version of nnunet_fed reads format {FORMAT}. "
                "Use the version that wrote it, or another --state."
            )
        for leftover in self.spool.glob("*.part"):
            leftover.unlink()

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes within are on disk when it ends, or none of them."""
        with self._journal:
            yield

    def fact(self, name: str) -> Any:
        """A single fact, ``None`` when unknown."""
        row = self._journal.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_fact(self, name: str, value: Any) -> None:
        """Note a single fact."""
        self._journal.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, json.dumps(value)))

    def latest_study(self) -> dict[str, Any] | None:
        """The study as it was last started, ``None`` in a new folder."""
        row = self._journal.execute("SELECT value FROM study ORDER BY rowid DESC LIMIT 1").fetchone()
        return None if row is None else json.loads(row[0])

    def add_study(self, study: dict[str, Any]) -> None:
        """Journal a version of the study."""
        self._journal.execute("INSERT INTO study VALUES (?, ?)", (time.time(), json.dumps(study)))

    def add_run(self, run: str, described: dict[str, Any]) -> None:
        """Journal a run; the same again is harmless."""
        self._journal.execute("INSERT OR IGNORE INTO run VALUES (?, ?, ?)", (run, json.dumps(described), time.time()))

    def runs(self) -> dict[str, dict[str, Any]]:
        """All runs, oldest first, by id."""
        return {run: json.loads(value) for run, value in self._journal.execute("SELECT id, value FROM run ORDER BY at")}

    def participants(self, run: str, scope: str) -> list[str] | None:
        """Who was frozen as taking part in a scope, ``None`` as long as nobody is."""
        row = self._journal.execute(
            "SELECT participants FROM scope WHERE run = ? AND name = ?", (run, scope)
        ).fetchone()
        return None if row is None else json.loads(row[0])

    def freeze(self, run: str, scope: str, participants: list[str]) -> None:
        """Note who takes part in a scope."""
        self._journal.execute(
            "INSERT INTO scope VALUES (?, ?, ?, ?)", (run, scope, json.dumps(participants), time.time())
        )

    def collective(self, run: str, key: str) -> Collective | None:
        """One collective, ``None`` when nobody has contributed to it."""
        row = self._journal.execute("SELECT * FROM collective WHERE run = ? AND key = ?", (run, key)).fetchone()
        return None if row is None else Collective(*row)

    def collectives(self, run: str) -> list[Collective]:
        """All collectives of a run, oldest first."""
        rows = self._journal.execute("SELECT * FROM collective WHERE run = ? ORDER BY opened", (run,))
        return [Collective(*row) for row in rows]

    def count_rounds(self) -> dict[str, int]:
        """How many rounds have closed, by run: each ends with the mean ``round-N/model``."""
        rows = self._journal.execute(
            "SELECT run, COUNT(*) FROM collective WHERE verb = 'mean' AND key GLOB 'round-*/model' "
            "AND status IN ('closed', 'pruned') GROUP BY run"
        )
        return dict(rows.fetchall())

    def put_collective(self, collective: Collective) -> None:
        """Write a collective's present state."""
        values = tuple(vars(collective).values())
        self._journal.execute(f"INSERT OR REPLACE INTO collective VALUES ({','.join('?' * len(values))})", values)

    def contributions(self, run: str, key: str) -> dict[str, Contribution]:
        """Accepted contributions by site, in the order of the names."""
        rows = self._journal.execute("SELECT * FROM contribution WHERE run = ? AND key = ? ORDER BY site", (run, key))
        return {row[2]: Contribution(*row) for row in rows}

    def add_contribution(self, contribution: Contribution) -> None:
        """Journal an accepted contribution."""
        values = tuple(vars(contribution).values())
        self._journal.execute(f"INSERT INTO contribution VALUES ({','.join('?' * len(values))})", values)

    def has_contributed(self, run: str, site: str) -> bool:
        """Whether a site has given anything to a run."""
        row = self._journal.execute("SELECT 1 FROM contribution WHERE run = ? AND site = ?", (run, site)).fetchone()
        return row is not None

    def standing(self, run: str) -> dict[str, str]:
        """``active``, ``absent`` or ``left``, by site; a site that never came is not in it."""
        return dict(self._journal.execute("SELECT site, state FROM standing WHERE run = ?", (run,)).fetchall())

    def set_standing(self, run: str, site: str, state: str) -> None:
        """Note a site's standing in a run."""
        self._journal.execute("INSERT OR REPLACE INTO standing VALUES (?, ?, ?, ?)", (run, site, state, time.time()))

    def add_event(self, run: str | None, site: str | None, text: str) -> None:
        """Journal what happened, in words for the record."""
        self._journal.execute("INSERT INTO event VALUES (?, ?, ?, ?)", (time.time(), run, site, text))

    def events(self) -> list[dict[str, Any]]:
        """What happened, oldest first."""
        rows = self._journal.execute("SELECT at, run, site, text FROM event ORDER BY rowid")
        return [{"at": at, "run": run, "site": site, "text": text} for at, run, site, text in rows]

    def upload_path(self, run: str, key: str, site: str) -> Path:
        """Where an upload is spooled until it is complete and accepted; another try is spooled elsewhere."""
        return self.spool / f"{_file_name(run, key)}.{site}.{secrets.token_hex(4)}.part"

    def keep_upload(self, part: Path) -> str:
        """Make a complete upload durable; returns the name under which a contribution refers to it."""
        kept = part.with_suffix("")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(kept)
        return kept.name

    def result_path(self, run: str, key: str) -> Path:
        """Where the result of a collective stands."""
        return self.results / _file_name(run, key)

    def discard_contributions(self, run: str, key: str) -> None:
        """Delete the payload files of a collective whose result is on disk; the journal keeps digests and sizes."""
        for contribution in self.contributions(run, key).values():
            if contribution.file is not None:
                (self.spool / contribution.file).unlink(missing_ok=True)


def _file_name(run: str, key: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{run}.{key}")
