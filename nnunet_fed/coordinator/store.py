"""The coordinator's memory: a SQLite journal and payload files. Every fact is on disk before it is answered."""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from nnunet_fed.errors import BusyError, ConfigurationError
from nnunet_fed.exchange.keys import MODEL, keys_between, name_of, round_of, scope_of
from nnunet_fed.files import PARTIAL, PRIVATE_FILE, make_durable, move, private_folder, same_file

logger = logging.getLogger(__name__)

FORMAT = 3
"""Version of the state directory's format."""
READABLE_SINCE = 3
"""The oldest format whose readers understand this one: their versions of nnunet_fed go on with such a directory. Format
2, of version 0.1, knows neither the order of collectives but by the clock, nor how long they have waited."""
FORMAT_OF_0_1 = 2

JOURNAL = "journal.sqlite"
SCHEMA = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE study (at REAL NOT NULL, value TEXT NOT NULL);
CREATE TABLE run (id TEXT PRIMARY KEY, value TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE scope (run TEXT, name TEXT, participants TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (run, name));
CREATE TABLE collective (
    run TEXT, key TEXT, verb TEXT NOT NULL, status TEXT NOT NULL, opened REAL NOT NULL, closed REAL,
    schema TEXT, digest TEXT, size INTEGER, error TEXT, waited REAL NOT NULL DEFAULT 0, PRIMARY KEY (run, key));
CREATE TABLE contribution (
    run TEXT, key TEXT, site TEXT, weight REAL NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, file TEXT,
    at REAL NOT NULL, seconds REAL NOT NULL, norm REAL, PRIMARY KEY (run, key, site));
CREATE TABLE agreed (run TEXT, name TEXT, schema TEXT NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (run, name));
CREATE TABLE standing (run TEXT, site TEXT, state TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (run, site));
CREATE TABLE event (at REAL NOT NULL, run TEXT, site TEXT, text TEXT NOT NULL);
"""

_NAME = "substr(key, instr(key, '/') + 1)"  # as name_of
ADDED = f"""
CREATE INDEX IF NOT EXISTS collective_by_status ON collective (status, run);
CREATE INDEX IF NOT EXISTS collective_by_name ON collective ({_NAME}, run);
CREATE INDEX IF NOT EXISTS contribution_with_file ON contribution (run, key) WHERE file IS NOT NULL;
CREATE TABLE IF NOT EXISTS ballot (run TEXT, key TEXT, site TEXT, verb TEXT NOT NULL, schema TEXT,
    PRIMARY KEY (run, key, site));
CREATE TABLE IF NOT EXISTS turned_down (run TEXT, key TEXT, site TEXT, text TEXT NOT NULL,
    PRIMARY KEY (run, key, site));
"""
"""What came to a format without changing it: its older readers do without."""


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """What a state directory cannot do, in a sentence, and whether another start may succeed.

    Raises:
        BusyError: another process has it, or its disk is full.
        ConfigurationError: it cannot be written, or its journal is damaged.
    """
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        sentence = f"The state directory {folder} cannot be opened ({error})"
        if "locked" in str(error):
            raise BusyError(
                f"{sentence}. If another coordinator uses it, stop that one or give this one another --state. If none "
                "does, its file system may have no locks: use a local disk."
            ) from None
        if "full" in str(error) or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise BusyError(f"{sentence}: free space on its disk.") from None
        raise ConfigurationError(
            f"{sentence}. See that this process's user can write it. If its journal is damaged, restore a back-up "
            "(docs/operations.md), or give another --state."
        ) from None


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
    error: str | None
    waited: float = 0.0
    """Seconds for which it has been open, by the last note of it."""

    @property
    def scope(self) -> str:
        """The part of the key before the first slash; its participants are frozen together."""
        return scope_of(self.key)

    @property
    def name(self) -> str:
        """What follows the scope; means of one name have one schema."""
        return name_of(self.key)


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
    seconds: float
    """How long the last connection took to bring it."""
    norm: float | None
    """L2 norm of its difference to the last model (:mod:`nnunet_fed.coordinator.admission`); ``None``: not computed."""


@dataclass(frozen=True)
class Ballot:
    """Of which kind a contribution is: the sites of one collective have to agree on it."""

    verb: str
    schema: str | None
    """As JSON; ``None``: there are no tensors."""


@dataclass
class Agreed:
    """What the first mean of a name that closed in a run has laid down for all later ones: schema as JSON, bytes of a
    payload."""

    schema: str
    size: int


class Store:
    """Journal and files below one folder. Not thread-safe: the coordinator calls it under its lock.

    Args:
        folder: what version 0.1 of nnunet_fed wrote is brought to this version's format, and a copy of it is kept.
        migrate: without it, nothing is changed: for those who only read.

    Raises:
        ConfigurationError: the folder was written by another version of the format, cannot be written, or is damaged.
        BusyError: it is in use, or its disk is full.
    """

    def __init__(self, folder: Path, migrate: bool = True):
        self.folder = folder
        self.spool = folder / "spool"
        self.results = folder / "results"
        for path in (folder, self.spool, self.results):
            private_folder(path)
        with explained(folder):
            (folder / JOURNAL).touch(PRIVATE_FILE)  # its companions get its mode
            self._journal = sqlite3.connect(folder / JOURNAL, check_same_thread=False, timeout=2.0)
            self._journal.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._journal.execute("PRAGMA journal_mode = WAL")
            self._journal.execute("PRAGMA synchronous = FULL")
            with self._journal:
                self._journal.execute("BEGIN IMMEDIATE")
                if not self._journal.execute("SELECT 1 FROM sqlite_master").fetchone():
                    for statement in SCHEMA.split(";"):
                        self._journal.execute(statement)
                    self._set_format()
        if self.fact("format") == FORMAT_OF_0_1:
            if not migrate:
                return
            self._keep_copy(f"format-{FORMAT_OF_0_1}")
            with self.transaction():
                self._number_collectives()
                self._set_format()
        found, readable_since = self.fact("format"), self.fact("readable_since")
        if readable_since is None or not (readable_since <= FORMAT <= found):
            raise ConfigurationError(
                f"The state directory {folder} has format {found}, this version of nnunet_fed reads format {FORMAT}. "
                "Use the version that wrote it, or another --state."
            )
        if migrate:
            with self.transaction():
                for statement in ADDED.split(";"):
                    self._journal.execute(statement)

    def _set_format(self) -> None:
        self.set_fact("format", FORMAT)
        self.set_fact("readable_since", READABLE_SINCE)

    def _number_collectives(self) -> None:
        """Version 0.1 ordered collectives by the clock, and gave a row a new number whenever it wrote it."""
        rows = self._journal.execute("SELECT * FROM collective ORDER BY opened").fetchall()
        self._journal.execute("DELETE FROM collective")
        self._journal.execute("ALTER TABLE collective ADD COLUMN waited REAL NOT NULL DEFAULT 0")
        for row in rows:
            self.put_collective(Collective(*row))

    def _keep_copy(self, name: str) -> None:
        """Copy all that an older version reads into a folder of this one, which that version can be started with."""
        copy = self.folder / name
        part = copy.with_name(name + PARTIAL)
        for leftover in (part, copy):  # of a migration that was interrupted, or undone
            shutil.rmtree(leftover, ignore_errors=True)
        for source in (self.spool, self.results):
            (part / source.name).mkdir(parents=True)
            for file in source.iterdir():
                if file.suffix != PARTIAL:  # what is still arriving is sent again
                    same_file(file, part / source.name / file.name)
        journal = sqlite3.connect(part / "journal.sqlite")
        try:
            self._journal.backup(journal)
        finally:
            journal.close()
        for written in (part / "journal.sqlite", part / self.spool.name, part / self.results.name):
            make_durable(written)
        move(part, copy)
        make_durable(copy)
        logger.warning(
            "The state directory %s was written by version 0.1 of nnunet_fed and is brought to format %d. %s keeps it "
            "as it was: delete that folder once the study no longer needs version 0.1.", self.folder, FORMAT, copy,
        )  # fmt: skip

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
        rows = self._journal.execute("SELECT id, value FROM run ORDER BY rowid")
        return {run: json.loads(value) for run, value in rows}

    def run(self, run: str) -> dict[str, Any]:
        """One run; raises :class:`KeyError` if it is not there."""
        row = self._journal.execute("SELECT value FROM run WHERE id = ?", (run,)).fetchone()
        if row is None:
            raise KeyError(run)
        described: dict[str, Any] = json.loads(row[0])
        return described

    def runs_of(self, attempt: int) -> list[str]:
        """The runs of one attempt, oldest first."""
        return [run for run, described in self.runs().items() if described.get("attempt") == attempt]

    def continue_run(self, run: str, new: str, collectives: Sequence[Collective]) -> None:
        """Journal another run that begins with some of a run's collectives, and with the sites that had joined it."""
        for collective in collectives:
            self.put_collective(replace(collective, run=new))
            for given in self.contributions(run, collective.key).values():
                self.add_contribution(replace(given, run=new, file=None))
        for scope in dict.fromkeys(collective.scope for collective in collectives):
            participants = self.participants(run, scope)
            if participants is not None:
                self.freeze(new, scope, participants)
        self._journal.execute(
            "INSERT INTO agreed (run, name, schema, size) SELECT ?, name, schema, size FROM agreed WHERE run = ?",
            (new, run),
        )
        for site, state in self.standing(run).items():
            self.set_standing(new, site, "active" if state == "left" else state)

    def participants(self, run: str, scope: str) -> list[str] | None:
        """Who was frozen as taking part in a scope, ``None`` as long as nobody is."""
        row = self._journal.execute(
            "SELECT participants FROM scope WHERE run = ? AND name = ?", (run, scope)
        ).fetchone()
        return None if row is None else json.loads(row[0])

    def scopes(self, run: str) -> list[str]:
        """The scopes whose participants are frozen."""
        return [name for (name,) in self._journal.execute("SELECT name FROM scope WHERE run = ?", (run,))]

    def freeze(self, run: str, scope: str, participants: list[str]) -> None:
        """Note who takes part in a scope."""
        self._journal.execute(
            "INSERT OR REPLACE INTO scope VALUES (?, ?, ?, ?)", (run, scope, json.dumps(participants), time.time())
        )

    def collective(self, run: str, key: str) -> Collective | None:
        """One collective, ``None`` when nobody has contributed to it."""
        row = self._journal.execute("SELECT * FROM collective WHERE run = ? AND key = ?", (run, key)).fetchone()
        return None if row is None else Collective(*row)

    def collectives(self, run: str, status: str | None = None) -> list[Collective]:
        """The collectives of a run, oldest first; all of them, or those of one status."""
        if status is None:
            return self._collectives("run = ? ORDER BY rowid", run)
        return self._collectives("status = ? AND run = ? ORDER BY rowid", status, run)

    def open_collectives(self, *further: str) -> list[Collective]:
        """Those of all runs that are open, or of a further status, oldest first."""
        statuses = ("open", *further)
        return self._collectives(f"status IN ({','.join('?' * len(statuses))}) ORDER BY rowid", *statuses)

    def collectives_of_scope(self, run: str, scope: str) -> list[Collective]:
        """The collectives of one scope, oldest first."""
        return self._collectives("run = ? AND key > ? AND key < ? ORDER BY rowid", run, *keys_between(scope))

    def count_contributions(self, run: str, scope: str, site: str) -> int:
        """To how many collectives of one scope a site has contributed."""
        row = self._journal.execute(
            "SELECT count(*) FROM contribution WHERE run = ? AND key > ? AND key < ? AND site = ?",
            (run, *keys_between(scope), site),
        ).fetchone()
        return int(row[0])

    def newest_means(self, run: str, name: str, most: int) -> list[Collective]:
        """The last means of a name that have closed, newest first; whether their results are kept or not."""
        where = f"{_NAME} = ? AND run = ? AND verb = 'mean' AND closed IS NOT NULL ORDER BY rowid DESC LIMIT ?"
        return self._collectives(where, name, run, most)

    def _collectives(self, where: str, *values: object) -> list[Collective]:
        rows = self._journal.execute(f"SELECT * FROM collective WHERE {where}", values)
        return [Collective(*row) for row in rows]

    def count_rounds(self) -> dict[str, int]:
        """How many rounds have closed, by run: each ends with the mean of its models."""
        means = self._journal.execute(
            f"SELECT run, key FROM collective WHERE {_NAME} = ? AND verb = 'mean'"
            " AND status IN ('closed', 'pruned') AND error IS NULL",
            (MODEL,),
        )
        return dict(Counter(run for run, key in means if round_of(key) is not None))

    def collectives_after(self, number: int, most: int) -> dict[int, Collective]:
        """The next ones of all runs after the so manyth in the journal's order, by their numbers in it."""
        rows = self._journal.execute(
            "SELECT rowid, * FROM collective WHERE rowid > ? ORDER BY rowid LIMIT ?", (number, most)
        )
        return {row[0]: Collective(*row[1:]) for row in rows}

    def put_collective(self, collective: Collective) -> None:
        """Write a collective's present state; it keeps its number, the journal's, by which collectives are ordered."""
        values = vars(collective)
        marks = ",".join("?" * len(values))
        changed = ",".join(f"{name} = excluded.{name}" for name in values)
        self._journal.execute(
            f"INSERT INTO collective VALUES ({marks}) ON CONFLICT (run, key) DO UPDATE SET {changed}",
            tuple(values.values()),
        )

    def set_waited(self, run: str, key: str, seconds: float) -> None:
        """Note how long a collective has been open."""
        self._journal.execute("UPDATE collective SET waited = ? WHERE run = ? AND key = ?", (seconds, run, key))

    def contributions(self, run: str, key: str) -> dict[str, Contribution]:
        """Accepted contributions by site, in the order of the names."""
        rows = self._journal.execute("SELECT * FROM contribution WHERE run = ? AND key = ? ORDER BY site", (run, key))
        return {row[2]: Contribution(*row) for row in rows}

    def add_contribution(self, contribution: Contribution) -> None:
        """Journal an accepted contribution."""
        values = tuple(vars(contribution).values())
        self._journal.execute(f"INSERT INTO contribution VALUES ({','.join('?' * len(values))})", values)

    def withdraw(self, contribution: Contribution) -> None:
        """Journal that a contribution is no longer there."""
        for table in ("contribution", "ballot"):
            self._journal.execute(
                f"DELETE FROM {table} WHERE run = ? AND key = ? AND site = ?",
                (contribution.run, contribution.key, contribution.site),
            )

    def cast(self, run: str, key: str, site: str, ballot: Ballot) -> None:
        """Note of which kind a contribution is; an earlier one of the site that was turned down is forgotten."""
        self._journal.execute("DELETE FROM turned_down WHERE run = ? AND key = ? AND site = ?", (run, key, site))
        self._journal.execute(
            "INSERT OR REPLACE INTO ballot VALUES (?, ?, ?, ?, ?)", (run, key, site, ballot.verb, ballot.schema)
        )

    def ballots(self, collective: Collective) -> dict[str, Ballot]:
        """Of which kind each contribution is, by site; what was contributed before this was noted is as the first."""
        rows = self._journal.execute(
            "SELECT site, verb, schema FROM ballot WHERE run = ? AND key = ?", (collective.run, collective.key)
        )
        cast = {site: Ballot(verb, schema) for site, verb, schema in rows}
        given = self.contributions(collective.run, collective.key)
        first = {site: Ballot(collective.verb, collective.schema if c.file else None) for site, c in given.items()}
        return {site: cast.get(site, ballot) for site, ballot in first.items()}

    def turn_down(self, run: str, key: str, site: str, text: str) -> None:
        """Note why a contribution is in no result, for its site."""
        self._journal.execute("INSERT OR REPLACE INTO turned_down VALUES (?, ?, ?, ?)", (run, key, site, text))

    def turned_down(self, run: str, key: str, site: str) -> str | None:
        """Why a site's contribution is not in a result; ``None``: none of its was turned down."""
        row = self._journal.execute(
            "SELECT text FROM turned_down WHERE run = ? AND key = ? AND site = ?", (run, key, site)
        ).fetchone()
        return None if row is None else str(row[0])

    def has_contributed(self, run: str, site: str) -> bool:
        """Whether a site has given anything to a run."""
        row = self._journal.execute("SELECT 1 FROM contribution WHERE run = ? AND site = ?", (run, site)).fetchone()
        return row is not None

    def standing(self, run: str) -> dict[str, str]:
        """``active``, ``absent`` or ``left``, by site; a site that never came is not in it."""
        return dict(self._journal.execute("SELECT site, state FROM standing WHERE run = ?", (run,)).fetchall())

    def latest_standing(self) -> dict[str, str]:
        """That of the newest run."""
        row = self._journal.execute("SELECT id FROM run ORDER BY rowid DESC LIMIT 1").fetchone()
        return {} if row is None else self.standing(row[0])

    def set_standing(self, run: str, site: str, state: str) -> None:
        """Note a site's standing in a run."""
        self._journal.execute("INSERT OR REPLACE INTO standing VALUES (?, ?, ?, ?)", (run, site, state, time.time()))

    def add_event(self, run: str | None, site: str | None, text: str) -> None:
        """Journal what happened, in words for the record."""
        self._journal.execute("INSERT INTO event VALUES (?, ?, ?, ?)", (time.time(), run, site, text))

    def events(self) -> list[dict[str, Any]]:
        """What happened, oldest first."""
        return list(self.events_after(0, -1).values())

    def events_after(self, number: int, most: int) -> dict[int, dict[str, Any]]:
        """What happened next after the so manyth event of the journal, by its number in it; -1: all of it."""
        rows = self._journal.execute(
            "SELECT rowid, at, run, site, text FROM event WHERE rowid > ? ORDER BY rowid LIMIT ?", (number, most)
        )
        return {row: {"at": at, "run": run, "site": site, "text": text} for row, at, run, site, text in rows}

    def agreed(self, run: str, name: str) -> Agreed | None:
        """What means of this name hold in this run, ``None`` before the first one."""
        row = self._journal.execute(
            "SELECT schema, size FROM agreed WHERE run = ? AND name = ?", (run, name)
        ).fetchone()
        return None if row is None else Agreed(*row)

    def agree(self, run: str, name: str, agreed: Agreed) -> None:
        """Note it."""
        self._journal.execute("INSERT INTO agreed VALUES (?, ?, ?, ?)", (run, name, agreed.schema, agreed.size))

    def norms(self, run: str, keys: Sequence[str]) -> list[float]:
        """The known norms of the accepted contributions to some collectives."""
        marks = ",".join("?" * len(keys))
        rows = self._journal.execute(
            f"SELECT norm FROM contribution WHERE run = ? AND key IN ({marks}) AND norm IS NOT NULL", (run, *keys)
        )
        return [norm for (norm,) in rows]

    def spooled(self) -> dict[str, tuple[str, str]]:
        """Run and key by the name of each payload file that is still needed."""
        rows = self._journal.execute("SELECT file, run, key FROM contribution WHERE file IS NOT NULL ORDER BY rowid")
        return {file: (run, key) for file, run, key in rows}

    def release(self, run: str, key: str) -> list[Path]:
        """Note that a collective's payload files are not needed any more, and return them."""
        files = [self.spool / given.file for given in self.contributions(run, key).values() if given.file is not None]
        self._journal.execute("UPDATE contribution SET file = NULL WHERE run = ? AND key = ?", (run, key))
        self._journal.execute("DELETE FROM ballot WHERE run = ? AND key = ?", (run, key))
        return files

    def release_run(self, run: str) -> list[Path]:
        """Note that none of a run's payload files is needed any more, and return them."""
        rows = self._journal.execute("SELECT file FROM contribution WHERE run = ? AND file IS NOT NULL", (run,))
        files = [self.spool / file for (file,) in rows]
        self._journal.execute("UPDATE contribution SET file = NULL WHERE run = ? AND file IS NOT NULL", (run,))
        for table in ("ballot", "turned_down"):
            self._journal.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
        return files

    def result_path(self, run: str, key: str) -> Path:
        """Where the result of a collective stands."""
        readable = re.sub(r"[^A-Za-z0-9_-]", "_", key)[:100]
        return self.results / f"{readable}.{xxhash.xxh3_64_hexdigest(json.dumps([run, key]).encode())}"
