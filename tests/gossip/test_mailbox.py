"""The folders between a training and its peer process: nobody sees half a letter, whoever dies when."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.exchange.payload import digest_of_file, encode, measure, open_payload
from nnunet_fed.gossip import mailbox as mailbox_module
from nnunet_fed.gossip.mailbox import Letter, Mailbox, State, described
from nnunet_fed.gossip.schedule import Version


def tensors_of(value: float) -> dict[str, Any]:
    return {"w": np.full((3, 5), value, np.float32), "b": np.arange(4, dtype=np.float32)}


def post(mailbox: Mailbox, counter: int = 1, candidates: tuple[str, ...] = ("b",), value: float = 1) -> Letter:
    version = Version("a", {"a": counter, "z": 2}, epoch=7)
    facts: dict[str, Any] = {"run": "r", "training_cases": 9, "initial": "i"}
    return mailbox.post(version=version, tensors=tensors_of(value), candidates=candidates, **facts)


def deliver(mailbox: Mailbox, site: str, counter: int) -> Letter:
    payload = mailbox.arriving / "payload"
    payload.write_bytes(b"".join(encode(tensors_of(counter))))
    digest, size = measure(encode(tensors_of(counter)))
    letter = Letter("r", Version(site, {site: counter}, 3), 4, "i", described(tensors_of(0))[0], digest, size)
    mailbox.deliver(letter, payload)
    return letter


def files(mailbox: Mailbox) -> list[str]:
    return sorted(
        str(path.relative_to(mailbox.folder))
        for path in mailbox.folder.rglob("*")
        if path.is_file() and path.name != "lock"
    )


def test_a_post_is_found_by_the_other_process_bit_for_bit(tmp_path: Path) -> None:
    letter = post(Mailbox(tmp_path))
    found = Mailbox(tmp_path).outgoing()
    assert found is not None
    assert (found[0], found[2]) == (letter, ("b",))
    assert digest_of_file(found[1]) == letter.digest
    assert found[1].stat().st_size == letter.size == described(tensors_of(0))[1]
    assert open_payload(found[1])["w"].tobytes() == tensors_of(1)["w"].tobytes()


def test_a_newer_post_replaces_one_that_was_not_sent_and_a_served_one_is_not_sent_again(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    assert mailbox.outgoing() is None
    post(mailbox, 9)
    letter = post(mailbox, 10, ("c", "b"))
    assert files(mailbox) == ["outbox/a@10/letter.json", "outbox/a@10/payload.safetensors"]
    mailbox.served(letter)
    found = mailbox.outgoing()
    assert found is not None
    assert found[::2] == (letter, ()), "it still answers pulls"
    post(mailbox, 11)
    again = mailbox.outgoing()
    assert again is not None
    assert again[2] == ("b",), "the same weights, but another version"


def test_a_training_that_went_on_from_an_older_checkpoint_posts_the_same_counter_again(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    post(mailbox, 3)
    post(mailbox, 3, ("c",))
    found = mailbox.outgoing()
    assert found is not None
    assert found[2] == ("c",)


def test_the_newest_of_each_peer_is_delivered(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    deliver(mailbox, "b", 9)
    newest = deliver(mailbox, "b", 10)
    other = deliver(mailbox, "b.2", 3)
    assert mailbox.deliveries() == {"b": newest, "b.2": other}
    deliver(mailbox, "b", 8)
    assert mailbox.deliveries()["b"] == newest
    assert mailbox.received() == {"b": 10, "b.2": 3}


def test_what_was_taken_is_found_again_until_it_is_discarded(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    assert mailbox.taken() is None
    letter = deliver(mailbox, "b", 1)
    assert mailbox.take("b") == mailbox.taken() == Mailbox(tmp_path).taken()
    found = mailbox.taken()
    assert found is not None
    assert found[0] == letter
    assert mailbox.deliveries() == {}
    assert mailbox.received() == {"b": 1}, "not wanted again meanwhile"
    tensors = open_payload(found[1])
    mailbox.discard_taken()
    assert mailbox.taken() is None
    assert files(mailbox) == []
    assert tensors["w"].tobytes() == tensors_of(1)["w"].tobytes()
    with pytest.raises(KeyError):
        mailbox.take("b")


def test_letters_are_whole_while_others_come_in_their_place(tmp_path: Path) -> None:
    mailbox, done = Mailbox(tmp_path), threading.Event()

    def keep_delivering() -> None:
        for counter in range(1, 150):
            deliver(mailbox, "b", counter)
        done.set()

    thread = threading.Thread(target=keep_delivering)
    thread.start()
    last = 0
    while not done.is_set() or mailbox.deliveries():
        if mailbox.deliveries():
            letter, path = mailbox.take("b")
            assert digest_of_file(path) == letter.digest
            assert letter.version.counter > last
            last = letter.version.counter
    thread.join()
    assert last == 149


def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox(tmp_path)
    post(mailbox, 1)
    deliver(mailbox, "b", 1)
    before, flush = files(mailbox), mailbox_module.flush

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mailbox_module, "flush", full)
    with pytest.raises(OSError, match="No space"):
        deliver(mailbox, "b", 2)
    assert files(mailbox) == before
    monkeypatch.setattr(mailbox_module, "flush", flush)

    def breaking(tensors: Any) -> Any:
        yield b"some"
        full(tmp_path)

    monkeypatch.setattr(mailbox_module, "encode", breaking)
    with pytest.raises(OSError, match="No space"):
        post(mailbox, 2)
    assert files(mailbox) == before


def test_what_a_dead_process_left_unfinished_goes_at_the_next_start(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    deliver(mailbox, "b", 1)
    before = files(mailbox)
    (mailbox.arriving / "x.part").write_bytes(b"half")
    (tmp_path / "inbox" / ".half").mkdir()
    (tmp_path / "inbox" / ".half" / "payload.safetensors").write_bytes(b"half")
    assert mailbox.deliveries().keys() == {"b"}
    mailbox.sweep()
    assert files(mailbox) == before


def test_state_contacts_and_history_are_what_was_written(tmp_path: Path) -> None:
    mailbox = Mailbox(tmp_path)
    assert (mailbox.state(), mailbox.contacts(), mailbox.members(), mailbox.history()) == (None, {}, {}, [])
    state = State("r", Version("a", {"a": 3}, 2), {"b": 4}, 9, "i", "s", 100, max_epoch_distance=5, leaving=True)
    mailbox.publish_state(state)
    mailbox.publish_contacts({"b": 2, "c": 0}, {"b": 7})
    mailbox.note_event(event="missed", peer="b")
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"at"')
    assert mailbox.state() == state
    assert mailbox.received() == {"b": 4}
    assert mailbox.contacts() == {"b": 2}
    assert mailbox.members() == {"b": 7}
    (entry,) = mailbox.history()
    assert entry["event"] == "missed"
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"state.json is damaged"):
        mailbox.state()


def test_neither_torch_nor_grpc() -> None:
    code = "import sys, nnunet_fed.gossip.mailbox; assert not {'torch', 'nnunetv2', 'grpc'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
