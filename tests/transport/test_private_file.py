"""A private key that others can read is refused, with a remedy that can be followed where it lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_fed.certificates.authority import Authority
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.transport.channel.private_file import require_private
from nnunet_fed.transport.channel.tls import KeyFiles

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files have no such modes here")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    folder = tmp_path / "its folder"
    folder.mkdir()
    path = folder / "key.pem"
    path.write_text("secret")
    path.chmod(0o444)
    return path


def refusal(key: Path) -> str:
    with pytest.raises(ConfigurationError, match=r"key.pem has the mode 444: whoever can read it") as refused:
        require_private(key)
    return str(refused.value)


def test_where_chmod_helps(key: Path) -> None:
    told = refusal(key)
    command = f"chmod 600 '{key}'"
    assert f"Close it with '{command}'." in told
    assert "install" not in told
    subprocess.run(command, shell=True, check=True)
    require_private(key)


def test_a_key_that_belongs_to_another_user(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = key.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1000)
    told = refusal(key)
    assert f"Only its owner (user {owner}) can close it, with 'chmod 600" in told
    follow(told, key)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "install" not in refusal(key), "root can"


def test_a_read_only_file_system(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.statvfs(key)
    read_only = os.statvfs_result((*found[:8], found.f_flag | os.ST_RDONLY, *found[9:]))
    monkeypatch.setattr(os, "statvfs", lambda path: read_only)
    told = refusal(key)
    assert "mounted read-only, where chmod cannot close it" in told
    for part in ("defaultMode: 0400", "fsGroup", "mode: 0400"):
        assert part in told
    assert "chmod 600" not in told
    follow(told, key)


def follow(told: str, key: Path) -> None:
    """The copy that is recommended is accepted."""
    _, command = told.split("'install")
    mine = key.parent.parent / "mine"
    mine.mkdir()
    command = "install" + command.partition(" FOLDER'")[0]
    assert command == f"install -m 600 '{key}'"
    subprocess.run(f"{command} '{mine}'", shell=True, check=True)
    require_private(mine / "key.pem")


@pytest.mark.parametrize("bits", [0o400, 0o440, 0o600, 0o640])
def test_what_kubernetes_and_docker_make_of_the_recommended_modes(key: Path, bits: int) -> None:
    key.chmod(bits)
    require_private(key)


def test_a_mount_as_containers_have_it(tmp_path: Path) -> None:
    """A real one, in a mount namespace of its own."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace may be made here")
    files = Authority.create(tmp_path / "authority", "study").site("a")
    KeyFiles(files / "certificate.pem", files / "key.pem", files / "ca.pem").read()
    (files / "key.pem").chmod(0o444)
    read = (
        "import sys; from pathlib import Path; from nnunet_fed.transport.channel.tls import KeyFiles; "
        "KeyFiles(*(Path(sys.argv[1]) / f'{name}.pem' for name in ('certificate', 'key', 'ca'))).read()"
    )
    steps = (
        'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && ! chmod 600 "$1/key.pem" 2>/dev/null && '
        'exec "$2" -c "$3" "$1"'
    )
    command = [*unshare, "sh", "-c", steps, "sh", str(files), sys.executable, read]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "ConfigurationError" not in tried.stderr:
        pytest.skip(f"nothing can be mounted here: {tried.stderr[-200:]}")
    assert "key.pem has the mode 444" in tried.stderr
    assert "mounted read-only, where chmod cannot close it" in tried.stderr
