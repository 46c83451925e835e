"""The house: which room may import which, what a light process loads, and that an install has every room.

A room is a folder of the package; ``nnunet_fed``'s own modules are the base. All imports count, also those within a
function, which only makes a command start faster. Those under ``TYPE_CHECKING`` load nothing: they must not point up
either, but a function may name the class of the trainer that calls it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FOLDERS = {
    "nnunet_fed": "nnunet_fed",
    "nnunet_fed.transport": "transport",
    "nnunet_fed.planners": "planners",
    "nnunet_fed.trainers": "trainers",
}
"""Where the packages stand in a checkout, as in pyproject.toml."""

ROOMS = (
    "base", "exchange", "study", "methods", "agreement", "coordinator", "certificates", "gossip", "prediction",
    "datasets", "evaluation", "inspection", "preflight", "transport", "planners", "trainers", "report", "simulation",
    "comparison", "selftest", "cli",
)  # fmt: skip
"""From the ground up: each imports from rooms below it only."""

ONLY = {
    "base": set(),
    "exchange": {"base"},
    "study": {"base", "exchange"},
    "methods": {"base", "exchange"},
    "coordinator": {"base", "exchange", "study"},
    "certificates": {"base", "study"},
    "gossip": {"base", "exchange", "study"},
    "transport": {"base", "exchange", "study", "coordinator", "certificates", "gossip", "preflight"},
    "planners": {"base", "exchange", "study", "agreement", "datasets", "evaluation", "inspection"},
}
"""Rooms that may not even import all below them: methods know no study, and who carries bytes knows no method."""

WITHIN = {
    "transport": (("proto",), ("channel",), ("coordinator", "site", "peers")),
    "trainers": (("parts",), ("fedgs", "fedsm", "gossip"), ("",)),
}
"""Folders of an adapter, from the ground up; those of one floor do not import each other. "": its own modules."""

LIGHT = {
    "base", "exchange", "study", "agreement", "coordinator", "certificates", "gossip", "datasets", "transport", "report"
}  # fmt: skip
"""Rooms that reach neither PyTorch nor nnU-Net, not even from within a function."""
HEAVY = {"torch", "nnunetv2", "batchgenerators", "batchgeneratorsv2", "dynamic_network_architectures"}


@dataclass(frozen=True)
class Import:
    """One name that a module imports."""

    target: str
    """A module of ours by its full name; of another package whatever stands there."""
    for_types: bool
    """It stands under ``TYPE_CHECKING``."""
    within_function: bool


@cache
def modules() -> dict[str, Path]:
    """All modules of the package by name; generated ones and the plug-in folder, which is no package, left out."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if "plugin" not in parts:
                found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def room(module: str) -> str:
    if module == "nnunet_fed.__main__":
        return "cli"
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "base"


def inner_folder(module: str) -> str:
    """Of a module in an adapter: the folder in which it stands, ``""`` without one."""
    parts = module.split(".")
    is_package = modules()[module].name == "__init__.py"
    return parts[2] if len(parts) > 3 or (is_package and len(parts) == 3) else ""


@cache
def imports(module: str) -> tuple[Import, ...]:
    def found(node: ast.AST, for_types: bool, within: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, for_types, within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} imports by a relative name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(full if full in modules() else node.module, for_types, within)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from found(child, True, within)
        else:
            within = within or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.iter_child_nodes(node):
                yield from found(child, for_types, within)

    return tuple(found(ast.parse(modules()[module].read_text(encoding="utf-8")), False, False))


def arrows(counts: Callable[[Import], bool] = lambda _: True) -> Iterator[tuple[str, str]]:
    """Who imports whom, of our modules."""
    for module in modules():
        for one in imports(module):
            if one.target in modules() and one.target != module and counts(one):
                yield module, one.target


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle in a graph, as the names on it; empty: there is none."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node not in done:
            for other in sorted(graph.get(node, ())):
                if round_trip := search(other, [*path, node]):
                    return round_trip
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_every_folder_of_the_package_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "nnunet_fed").iterdir() if (path / "__init__.py").is_file()}
    assert folders | {"base", "transport", "planners", "trainers"} == set(ROOMS)
    assert {path.stem for path in (ROOT / "nnunet_fed").glob("*.py")} == {
        "__init__", "__main__", "errors", "files", "leases", "logs", "processes", "strict_json",
    }, "a module of its own stands in a room"  # fmt: skip


def test_no_arrow_points_up() -> None:
    up = [pair for pair in arrows() if ROOMS.index(room(pair[1])) > ROOMS.index(room(pair[0]))]
    assert up == []


@pytest.mark.parametrize("name", sorted(ONLY))
def test_a_room_imports_only_what_it_may(name: str) -> None:
    beyond = [pair for pair in arrows() if room(pair[0]) == name and room(pair[1]) not in ONLY[name] | {name}]
    assert beyond == []


@pytest.mark.parametrize("name", sorted(WITHIN))
def test_within_an_adapter_no_arrow_points_up_or_aside(name: str) -> None:
    floors = {folder: number for number, floor in enumerate(WITHIN[name]) for folder in floor}
    odd = []
    for one, other in arrows(lambda found: not found.for_types):
        if room(one) == room(other) == name:
            here, there = inner_folder(one), inner_folder(other)
            if here != there and floors[there] >= floors[here]:
                odd.append((one, other))
    assert odd == []


def test_no_circle() -> None:
    of_modules: dict[str, set[str]] = {}
    for one, other in arrows(lambda found: not found.for_types):
        of_modules.setdefault(one, set()).add(other)
    assert circle(of_modules) == []
    of_rooms: dict[str, set[str]] = {}
    for one, other in arrows():
        if room(one) != room(other):
            of_rooms.setdefault(room(one), set()).add(room(other))
    assert circle(of_rooms) == []


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_a_light_room_reaches_neither_torch_nor_nnunet(name: str) -> None:
    @cache
    def heavy(module: str) -> frozenset[str]:
        """Modules that import something heavy, of those that this one reaches."""
        found: set[str] = set()
        for one in imports(module):
            if one.target.split(".")[0] in HEAVY and not one.for_types:
                found.add(module)
            elif one.target in modules() and one.target != module and not one.for_types:
                found |= heavy(one.target)
        return frozenset(found)

    assert {module: sorted(heavy(module)) for module in modules() if room(module) == name and heavy(module)} == {}


@pytest.mark.parametrize(
    ("process", "unwanted"),
    [
        (
            "nnunet_fed.cli.app nnunet_fed.coordinator.coordinator nnunet_fed.coordinator.tracking "
            "nnunet_fed.transport.coordinator.server nnunet_fed.transport.coordinator.http",
            HEAVY,
        ),
        ("nnunet_fed.transport.peers.peer", HEAVY),
        ("nnunet_fed.transport.site.client nnunet_fed.transport.site.connection_checks", HEAVY | {"sqlite3"}),
    ],
    ids=["coordinator", "peer", "site"],
)
def test_what_a_light_process_loads(process: str, unwanted: set[str]) -> None:
    code = f"import sys, {', '.join(process.split())}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert set(loaded) & unwanted == set()


def test_no_basename_twice() -> None:
    names = Counter(path.stem for path in modules().values() if path.stem != "__init__")
    assert [name for name, times in names.items() if times > 1] == []


def test_an_install_has_every_module(tmp_path: Path) -> None:
    """What pip installs has all modules and all else that a checkout has, and each can be imported alone there."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *FOLDERS.values()):  # a copy: a build writes beside it
        (project / name).symlink_to(ROOT / name)
    installed = tmp_path / "installed"
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"  # as pip does, offline
    subprocess.run([sys.executable, "-c", build], check=True, cwd=project, stdout=subprocess.DEVNULL)
    [wheel] = tmp_path.glob("*.whl")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    subprocess.run([*pip, "--target", installed, wheel], check=True)

    def content(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder).as_posix() for path in found}

    expected = {
        f"{package.replace('.', '/')}/{file}" for package, folder in FOLDERS.items() for file in content(ROOT / folder)
    }
    assert {f"nnunet_fed/{file}" for file in content(installed / "nnunet_fed")} == expected
    code = (
        f"import importlib, sys; sys.path.insert(0, {str(installed)!r})\n"
        f"for name in {sorted(modules())!r}:\n"
        "    assert importlib.import_module(name).__file__.startswith(sys.path[0]), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
