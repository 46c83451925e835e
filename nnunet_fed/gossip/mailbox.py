"""The folders through which a training and its peer process talk (GCML's notes, 5.5). Source: ours.

Neither process waits for the other, and either may die at any instant. A letter with its payload is one folder, which
appears and moves by a rename: nobody ever sees half of one. A lock that dies with its holder covers those renames and
the listings, never a payload's bytes.

What the training does::

    mailbox = Mailbox(folder)
    mailbox.publish_state(State(...))                        # at the start and whenever something of it changes
    letter = mailbox.post(run=..., version=version.published(epoch), training_cases=..., initial=..., tensors=arrays,
                          candidates=schedule.candidates(...))
    at_hand = mailbox.deliveries()                           # newest letter of each peer, without a wait
    letter, path = mailbox.take(site)                        # open_payload(path) gives the tensors
    ...                                                      # the mutual phase
    mailbox.discard_taken()                                  # once a checkpoint no longer needs it

* Until :meth:`publish_state` has been called, the peer process declines every offer as ``busy``. Publish what was
  ``received`` before :meth:`discard_taken`, lest the same model is let in again.
* A taken letter stays in ``used`` until :meth:`discard_taken` or the next :meth:`take`: a training that is started
  again asks :meth:`taken` before it takes another.
* Tensors travel as they are given: for a 16-bit wire, :func:`nnunet_fed.exchange.precision.narrow` them before, and
  :func:`nnunet_fed.exchange.precision.widen` what comes. ``State.schema`` and ``State.size`` are those of the narrowed
  tensors (:func:`described`).
* ``candidates`` are whom the peer process tries, in this order, until one has been served (``push``) or has served it
  (``pull``). Without any, the letter only answers others' pulls.
* :meth:`members` has the training cases of each peer heard of that has not left: with the site's own, the ``cases`` of
  :meth:`nnunet_fed.gossip.schedule.Schedule.candidates`, whose ``failures`` are :meth:`contacts`.

Folders: ``outbox``, ``inbox`` and ``used`` hold letters, each a folder ``SITE@COUNTER`` with ``letter.json`` and
``payload.safetensors``; ``arriving`` holds what has not arrived in full. Files: ``state.json``, ``contacts.json``,
``members.json``, ``served.json``, ``history.jsonl``,
``lock``. No torch, no grpc.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.payload import Tensors, encode, header_of, layout_of, measure, schema_of
from nnunet_fed.files import flush, locked, move, private_folder, write_json
from nnunet_fed.gossip.schedule import Version
from nnunet_fed.logs import JsonLog
from nnunet_fed.strict_json import to_json
from nnunet_fed.study.federation import digest_of

HISTORY, LARGEST_HISTORY = "history.jsonl", 1 << 24
LETTER, PAYLOAD = "letter.json", "payload.safetensors"


@dataclass(frozen=True)
class Letter:
    """What travels beside a payload."""

    run: str
    """Digest of what makes two trainings comparable: study, configuration, attempt."""
    version: Version
    """Of the model; its site is the sender."""
    training_cases: int
    """Of the sender."""
    initial: str
    """Digest of the weights that the sender started from."""
    schema: str
    """Digest of the tensors' names, dtypes and shapes (:func:`described`)."""
    digest: str
    """Of the payload (:func:`nnunet_fed.exchange.payload.measure`)."""
    size: int
    """Bytes of the payload."""

    @property
    def name(self) -> str:
        """Of the letter's folder."""
        return f"{self.version.site}@{self.version.counter}"


@dataclass(frozen=True)
class State:
    """What the peer process answers offers with."""

    run: str
    """See :class:`Letter`, as for ``training_cases``, ``initial``, ``schema``."""
    version: Version
    """Of the training's own model, what it has learnt from others included."""
    received: Mapping[str, int]
    """Counter of the newest model of each peer that the training has used or given up."""
    training_cases: int
    initial: str
    schema: str
    size: int
    """Bytes of this site's own payload, which a peer's cannot exceed."""
    max_epoch_distance: int | None = None
    """See :func:`nnunet_fed.gossip.schedule.judge`."""
    busy: bool = False
    """Decline all offers for now."""
    leaving: bool = False
    """The training is over: decline all offers, and tell the peers."""
    lockstep: bool = False
    """Take no model of an epoch that this training has not come to, and try a candidate until it has decided."""


def described(tensors: Tensors) -> tuple[str, int]:
    """Digest of the schema, and bytes of the payload, of these tensors."""
    layout = layout_of(tensors)
    return digest_of(schema_of(layout)), len(header_of(layout)) + sum(array.nbytes for array in tensors.values())


class Mailbox:
    """Both sides of the folders; what only the peer process calls stands below.

    Args:
        folder: where they are, or will be made.

    Raises:
        ConfigurationError: the folder's file system has no locks.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._outbox, self._inbox, self._used, self.arriving = (
            folder / name for name in ("outbox", "inbox", "used", "arriving")
        )
        private_folder(folder)
        self._history = JsonLog(folder / HISTORY, LARGEST_HISTORY, 1)
        for path in (self._outbox, self._inbox, self._used, self.arriving):
            path.mkdir(parents=True, exist_ok=True)
        with self._locked():  # where there are no locks, this is the time to say so
            pass

    # ------------------------------------------------------------------------------------------------ for the training

    def post(
        self, *, run: str, version: Version, training_cases: int, initial: str, tensors: Tensors,
        candidates: Sequence[str],
    ) -> Letter:  # fmt: skip
        """Let the peer process send a model; one that has not been sent yet is replaced.

        Args:
            run: see :class:`Letter`, as for the next three.
            version: its counter is larger than that of any earlier post.
            training_cases: at least 1.
            initial: see :class:`Letter`.
            tensors: written at once; the arrays may change afterwards.
            candidates: peers to try, in order.

        Raises:
            OSError: the disk is full, or broken; the earlier letter is still there.
        """
        parts = self._outbox / f".{secrets.token_hex(4)}"
        parts.mkdir()
        try:
            with (parts / PAYLOAD).open("wb") as file:

                def written() -> Iterator[bytes | memoryview]:
                    for piece in encode(tensors):
                        file.write(piece)
                        yield piece

                digest, size = measure(written())
            letter = Letter(run, version, training_cases, initial, described(tensors)[0], digest, size)
            facts = {**asdict(letter), "candidates": list(candidates)}
            (parts / LETTER).write_text(to_json(facts), encoding="utf-8")
        except BaseException:
            shutil.rmtree(parts)
            raise
        with self._locked():
            old = [_hidden(path) for path in self._outbox.iterdir() if path != parts]
            move(parts, self._outbox / letter.name)
        _delete(old)
        return letter

    def deliveries(self) -> dict[str, Letter]:
        """The newest letter in the inbox of each peer, by name."""
        with self._locked():
            return {site: _letter(path)[0] for site, path in self._newest().items()}

    def take(self, site: str) -> tuple[Letter, Path]:
        """Move a peer's newest letter to ``used``, in place of one that is there; the letter and its payload's file.

        Raises:
            KeyError: there is none of that peer.
        """
        with self._locked():
            path = self._newest()[site]
            old = [_hidden(other) for other in self._used.iterdir()]
            taken = self._used / path.name
            move(path, taken)
        _delete(old)
        return _letter(taken)[0], taken / PAYLOAD

    def taken(self) -> tuple[Letter, Path] | None:
        """What :meth:`take` has given last, also to an earlier process; ``None`` after :meth:`discard_taken`."""
        for path in self._used.iterdir():
            if _counter(path) is not None:
                return _letter(path)[0], path / PAYLOAD
        return None

    def discard_taken(self) -> None:
        """Delete what was taken. Memory-mapped tensors of it stay valid."""
        with self._locked():
            old = [_hidden(path) for path in self._used.iterdir()]
        _delete(old)

    def contacts(self) -> dict[str, int]:
        """Attempts in a row that failed to reach a peer, by name; those without any are left out."""
        return dict(_read(self.folder / "contacts.json") or {})

    def members(self) -> dict[str, int]:
        """Training cases of each peer that has been heard of and has not left, by name."""
        return dict(_read(self.folder / "members.json") or {})

    def history(self) -> list[dict[str, Any]]:
        """What was sent, received, declined or missed, oldest first.

        Each entry has ``at`` (time), ``event`` (``sent``, ``received``: the payload went over; ``declined``: a peer
        did not want it; ``refused``: this site did not; ``missed``: the peer was not reached, or the transfer broke),
        ``peer``, ``site`` and ``counter`` (of the model; ``None`` if unknown), ``bytes`` (of payload that moved),
        ``seconds``, and ``verdict`` (the receiver's) or ``reason`` (a sentence). ``repeated``: so many of the same kind
        were left out before it. Of a very long training the oldest entries are no longer there.
        """
        entries, lines = [], []
        for path in (self.folder / f"{HISTORY}.1", self.folder / HISTORY):
            with suppress(FileNotFoundError):
                lines += path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            with suppress(ValueError):  # half a line of a process that was killed
                entries.append(json.loads(line))
        return entries

    def publish_state(self, state: State) -> None:
        """Tell the peer process how to answer, from its next answer on."""
        self._write("state.json", asdict(state))

    # -------------------------------------------------------------------------------------------- for the peer process

    def state(self) -> State | None:
        """What the training has published last."""
        found = _read(self.folder / "state.json")
        return None if found is None else State(**{**found, "version": Version(**found["version"])})

    def outgoing(self) -> tuple[Letter, Path, tuple[str, ...]] | None:
        """The newest letter of this site, its payload's file, and who remains to be tried."""
        with self._locked():
            for path in self._outbox.iterdir():
                if _counter(path) is not None:
                    letter, candidates = _letter(path)
                    served = _read(self.folder / "served.json") == [letter.name, letter.digest]
                    return letter, path / PAYLOAD, () if served else candidates
        return None

    def served(self, letter: Letter) -> None:
        """The candidates of a letter have been tried."""
        self._write("served.json", [letter.name, letter.digest])

    def received(self) -> dict[str, int]:
        """Counter of the newest model of each peer that is in ``inbox`` or ``used``, or that the state names."""
        state = self.state()
        counters = dict(state.received) if state is not None else {}
        with self._locked():
            paths = [*self._inbox.iterdir(), *self._used.iterdir()]
        for path in paths:
            counter, site = _counter(path), path.name.rpartition("@")[0]
            if counter is not None:
                counters[site] = max(counter, counters.get(site, 0))
        return counters

    def deliver(self, letter: Letter, payload: Path) -> None:
        """Put a letter into the inbox, in place of an older one of its site; the payload's file is moved.

        It is on the disk before it is seen. Of two versions the newer stays.

        Raises:
            OSError: the disk is full, or broken; the inbox is as before.
        """
        parts = self._inbox / f".{secrets.token_hex(4)}"
        parts.mkdir()
        try:
            move(payload, parts / PAYLOAD)
            (parts / LETTER).write_text(to_json(asdict(letter)), encoding="utf-8")
            for path in (parts / PAYLOAD, parts / LETTER, parts):
                flush(path)
        except BaseException:
            shutil.rmtree(parts)
            raise
        with self._locked():
            newest = self._newest().get(letter.version.site)
            wanted = newest is None or (_counter(newest) or 0) < letter.version.counter
            old = [] if newest is None or not wanted else [_hidden(newest)]
            if wanted:
                move(parts, self._inbox / letter.name)
        _delete(old if wanted else [parts])
        flush(self._inbox)

    def sweep(self) -> None:
        """At the start of the peer process: delete what an earlier one left behind unfinished."""
        _delete([*self.arriving.iterdir(), *self._inbox.glob(".*")])

    def publish_contacts(self, failures: Mapping[str, int], members: Mapping[str, int]) -> None:
        """Tell the training what :meth:`contacts` and :meth:`members` say."""
        self._write("contacts.json", {peer: number for peer, number in failures.items() if number})
        self._write("members.json", dict(members))

    def note_event(self, **entry: Any) -> None:
        """Add to :meth:`history`, with the time; what repeats soon without a byte moved is counted instead."""
        idle = not entry.get("bytes")  # what moved no byte costs nothing, and may come again and again
        kind = (entry.get("event"), entry.get("peer"), entry.get("verdict")) if idle else None
        self._history.write(entry, kind)

    def _write(self, name: str, value: Any) -> None:
        with self._locked():  # a peer process that its training has outlived may write, too
            write_json(self.folder / name, value, indent=None)

    def _locked(self) -> AbstractContextManager[None]:
        """Let no other thread or process move letters meanwhile."""
        return locked(self.folder / "lock")

    def _newest(self) -> dict[str, Path]:
        """Of the inbox, by site; each has one, but for a process that died in between."""
        found = sorted((counter, path) for path in self._inbox.iterdir() if (counter := _counter(path)) is not None)
        return {path.name.rpartition("@")[0]: path for _, path in found}


def _counter(path: Path) -> int | None:
    """Of a letter's folder; ``None`` for what is none."""
    site, separator, counter = path.name.rpartition("@")
    return int(counter) if separator and site[:1] != "." and counter.isdecimal() else None


def _letter(path: Path) -> tuple[Letter, tuple[str, ...]]:
    """Of a letter's folder, and the candidates."""
    found = _read(path / LETTER)
    candidates = tuple(found.pop("candidates", ()))
    return Letter(**{**found, "version": Version(**found["version"])}), candidates


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:  # ours are written by a rename: someone else's hand
        raise ConfigurationError(f"{path} is damaged ({error}). Delete it, and start the training with --c.") from None


def _hidden(path: Path) -> Path:
    """Give a folder a name under which it is no letter."""
    hidden = path.with_name(f".{secrets.token_hex(4)}")
    move(path, hidden)
    return hidden


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
