"""A site runs where nnU-Net does, on Windows too: nothing that it imports is POSIX's alone."""

from __future__ import annotations

import ast
import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.gossip.mailbox import Mailbox

ROOT = Path(__file__).parents[1]
POSIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios", "syslog", "posix", "pty", "crypt", "spwd")
WITHOUT = f"""
import sys
for name in {POSIX_ONLY[:5]}:
    sys.modules[name] = None  # as on Windows: it cannot be imported
"""
TRAINERS = """
import importlib.util, pathlib, tempfile
import numpy as np
import nnunet_fed.trainers
from nnunet_fed.gossip.mailbox import Mailbox
from nnunet_fed.gossip.schedule import Version
from nnunet_fed.transport.peers.peer import PeerProcess
from nnunet_fed.transport.site.client import GrpcCommunicator
import nnunet_fed.cli.app
path = pathlib.Path(nnunet_fed.trainers.__path__[0]) / "plugin" / "nnunet_fed_trainers.py"
found = importlib.util.spec_from_file_location("nnunet_fed_trainers", path)
plugin = importlib.util.module_from_spec(found)
found.loader.exec_module(plugin)
assert plugin.nnUNetTrainerFedAvg and plugin.nnUNetTrainerGCML
with tempfile.TemporaryDirectory() as folder:
    mailbox = Mailbox(pathlib.Path(folder) / "mailbox")
    facts = dict(run="r", training_cases=1, initial="i", tensors={"w": np.ones(3, np.float32)}, candidates=["b"])
    mailbox.post(version=Version("a", {"a": 1}, 1), **facts)
    assert mailbox.outgoing()[2] == ("b",)
print("fine")
"""


def test_trainers_and_mailbox_work_without_what_windows_lacks() -> None:
    """The mailbox imported fcntl and the plugin GCML's trainer: not even FedAvg could be found on Windows."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT + TRAINERS], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "fine\n", done.stderr


def test_modules_that_windows_lacks_are_imported_where_their_lack_is_caught() -> None:
    for folder in ("nnunet_fed", "trainers", "planners", "transport"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            caught = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in caught:
                    names = [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                    assert not {*names} & {*POSIX_ONLY}, path


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_mailbox_on_a_file_system_without_locks_is_told_when_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(number, "there are none")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigurationError, match="is on a file system without locks .* Use a folder on a local disk"):
        Mailbox(tmp_path / "mailbox")
