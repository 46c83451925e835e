from __future__ import annotations

import ast
import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nnunet_fed import files

ROOT = Path(__file__).parents[1]
FOLDERS = ("nnunet_fed", "planners", "trainers", "transport")
OTHERS = {"replace", "rename", "renames", "fsync", "mkstemp", "NamedTemporaryFile"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is brought to the disk, and what is renamed, in this order."""
    done: list[str] = []
    flush, move = files.flush, files.move

    def note_flush(path: Path) -> None:
        done.append(path.name)
        flush(path)

    def note_move(source: Path, target: Path) -> None:
        done.append(f"{source.name} -> {target.name}")
        move(source, target)

    monkeypatch.setattr(files, "flush", note_flush)
    monkeypatch.setattr(files, "move", note_move)
    return done


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, flushed: list[str]) -> None:
    files.write_text(tmp_path / "a", "new")
    assert flushed == ["a.part", "a.part -> a", tmp_path.name]
    flushed.clear()
    files.write_text(tmp_path / "a", "newer", durable=False)
    assert flushed == ["a.part -> a"]


def test_text_is_utf_8_with_its_own_line_ends(tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "Läsion\r\n1 \N{MICRO SIGN}m\n")
    assert (tmp_path / "text").read_bytes() == "Läsion\r\n1 \N{MICRO SIGN}m\n".encode()
    child = "import sys, pathlib; from nnunet_fed import files; files.write_text(pathlib.Path(sys.argv[1]), '\\xe4')"
    subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", child, str(tmp_path / "elsewhere")],
        check=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    )
    assert (tmp_path / "elsewhere").read_bytes() == "ä".encode()


def test_json_ends_with_a_line_end_and_has_null_for_what_is_undefined(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": [1]}, indent=None)
    assert path.read_text() == '{"a": [1]}\n'
    files.write_json(path, {"a": [float("nan"), {"b": float("inf")}, (1.5, -float("inf"))]}, indent=None)
    assert path.read_text() == '{"a": [null, {"b": null}, [1.5, null]]}\n'


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with files.replacing(path) as part:
            part.write_text("ne")
            raise error

    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)):
        interrupted()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("failing", ["flush", "move"])
def test_an_error_at_the_end_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: Path) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "a"
    path.write_text("old")
    monkeypatch.setattr(files, failing, fail)
    with pytest.raises(OSError, match="Input/output"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_process_that_is_killed_leaves_the_old_file_whole_and_the_next_one_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    child = """
import sys, time, pathlib
from nnunet_fed import files
with files.replacing(pathlib.Path(sys.argv[1])) as part, part.open("w") as file:
    file.write("ne")
    file.flush()
    print("within", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"within\n"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a", "a.part"]
    files.write_text(path, "newer")
    assert path.read_text() == "newer"
    assert names(tmp_path) == ["a"]


@pytest.mark.usefixtures("umask")
def test_permissions_are_those_asked_for_or_of_before_or_what_the_umask_says(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_text(path, "new")
    assert mode(path) == 0o640
    for kept in (0o600, 0o400, 0o666):
        path.chmod(kept)
        with files.replacing(path) as part:
            assert mode(part) & ~(kept | stat.S_IWUSR) == 0, "no more than the old file's, at any time"
            part.write_text("newer")
        assert mode(path) == kept
    files.write_bytes(path, b"key", mode=0o600)
    assert mode(path) == 0o600


def test_a_secret_is_private_from_the_first_byte(tmp_path: Path) -> None:
    path = tmp_path / "key"
    left = tmp_path / "key.part"
    left.touch(0o666)  # of a process that was killed
    with files.replacing(path, mode=0o600) as part:
        assert (part, mode(part)) == (left, 0o600)


class Disk:
    """What the system is told to bring to the disk, as a system that is none of this kind would be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refused: Callable[[bool], int | None]):
        self.flushed: list[str] = []
        fsync = os.fsync

        def fake(descriptor: int) -> None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if (code := refused(is_folder)) is not None:
                raise OSError(code, os.strerror(code))
            self.flushed.append("folder" if is_folder else "file")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fake)


def test_windows_flushes_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, lambda is_folder: errno.EACCES if is_folder else None)
    monkeypatch.setattr(files, "WINDOWS", True)
    files.write_text(tmp_path / "a", "new")
    files.make_durable(tmp_path / "a")
    assert disk.flushed == ["file", "file"]


def test_windows_is_asked_again_while_another_process_has_the_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, tries = Path.replace, []

    def busy(self: Path, target: Path) -> Path:
        tries.append(target.name)
        if len(tries) < 3:
            raise PermissionError(13, "Access is denied")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(PermissionError):
        files.write_text(tmp_path / "a", "new")
    assert names(tmp_path) == [], "elsewhere it is final"
    monkeypatch.setattr(files, "WINDOWS", True)
    tries.clear()
    files.write_text(tmp_path / "a", "new")
    assert tries == ["a"] * 3
    assert (tmp_path / "a").read_text() == "new"
    monkeypatch.setattr(files, "PATIENCE", -1.0)
    tries.clear()
    with pytest.raises(PermissionError):
        files.write_text(tmp_path / "a", "newer")


def test_a_share_that_cannot_flush_a_folder_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(monkeypatch, lambda is_folder: errno.EINVAL if is_folder else None)
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    Disk(monkeypatch, lambda is_folder: None if is_folder else errno.EINVAL)
    with pytest.raises(OSError, match="Invalid argument"):
        files.write_text(tmp_path / "a", "newer")
    assert (tmp_path / "a").read_text() == "new"


def own_ways(text: str) -> list[str]:
    """What replaces, renames or flushes a file in a module's text, or names a partial file."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in OTHERS:
            of_a_text_or_time = node.func.attr == "replace" and (len(node.args) != 1 or node.keywords)
            if ast.unparse(node.func) == "os.replace" or not of_a_text_or_time:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "tempfile"):
            found += [alias.name for alias in node.names if alias.name in OTHERS]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith((".part", ".tmp")):
            found.append(node.value)
    return found


def test_one_module_replaces_files() -> None:
    assert len(own_ways("os.replace(a, b)\na.rename(b)\na.replace(b)\nos.fsync(1)\nf'{name}.part'")) == 5
    assert own_ways("a.replace('b', 'c'); when.replace(hour=1); dataclasses.replace(a, b=1)") == []
    found = {
        str(path.relative_to(ROOT)): ways
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (ways := own_ways(path.read_text(encoding="utf-8")))
    }
    assert list(found) == ["nnunet_fed/files.py"]
