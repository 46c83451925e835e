"""Keys of collectives, and that nothing but their module makes or reads one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_fed.exchange.cross_site_matrix import DICE, model_key
from nnunet_fed.exchange.keys import (
    LONGEST_KEY,
    MODEL,
    PLANNING,
    PLANS,
    VALIDATION,
    is_key,
    key_of,
    keys_between,
    last_round,
    name_of,
    round_of,
    scope_of,
    scope_of_round,
    source_key,
    start_scope,
)

ROOT = Path(__file__).parents[2]
HOME = "nnunet_fed/exchange/keys.py"
PARTS = st.text("abcXYZ019_.-", min_size=1, max_size=20)


def test_keys_are_what_version_0_1_wrote() -> None:
    """They stand in journals and on the wire."""
    assert key_of(scope_of_round(3), MODEL) == "round-0003/model"
    assert key_of(scope_of_round(12345), "state-0") == "round-12345/state-0"
    assert [key_of(start_scope(source), MODEL) for source in (0, 1, 12)] == [
        "start/model", "start-1/model", "start-12/model",
    ]  # fmt: skip
    assert key_of(PLANNING, "dataset") == "planning/dataset"
    assert (PLANS, key_of(PLANS, "full")) == ("planning/plans", "planning/plans/full")
    assert (DICE, model_key("site_a")) == ("cross-site/dice", "cross-site-site_a/deployed")
    assert key_of(VALIDATION, "dice") == "validation/dice"


@given(PARTS, PARTS, st.lists(PARTS.filter(lambda part: not part.isdecimal()), max_size=2))
def test_scope_and_name_are_read_from_a_key(scope: str, name: str, more: list[str]) -> None:
    key = key_of(scope, "/".join([name, *more]))
    assert is_key(key)
    assert (scope_of(key), name_of(key)) == (scope, "/".join([name, *more]))
    assert scope_of(scope) == scope


def test_what_further_sources_give_has_the_name_and_the_scope_of_the_first_one() -> None:
    keys = [source_key("round-0003/model", number) for number in range(3)]
    assert keys == ["round-0003/model", "round-0003/model/1", "round-0003/model/2"]
    assert {name_of(key) for key in keys} == {MODEL}
    assert {round_of(key) for key in keys} == {3}


@given(st.integers(0, 100_000))
def test_a_round_is_read_from_its_key_or_scope(number: int) -> None:
    for text in (scope_of_round(number), key_of(scope_of_round(number), MODEL), key_of(scope_of_round(number), "a/b")):
        assert round_of(text) == last_round(text) == number


@pytest.mark.parametrize("scope", [start_scope(0), start_scope(12), PLANNING, "round-", "round-x", "around-0001", ""])
def test_what_is_of_no_round(scope: str) -> None:
    assert round_of(scope) is None
    assert round_of(key_of(scope, "round-0001")) is None
    assert last_round(scope) == -1


@pytest.mark.parametrize(
    "text", ["", "model", "/model", "r/", "r//m", "r/m ", "r/m\n", "r\\m", "r/ä", "r/" + LONGEST_KEY * "m"]
)
def test_what_cannot_name_a_collective(text: str) -> None:
    assert not is_key(text)


# ------------------------------------------------------------------------------------------------- the only home

SCOPE_NAMES = re.compile(r"\b(?:\w*_)?(?:scope|key|SCOPE|KEY)(?:\b|_of\w*\(|_scope\()|\b(?:scope|start_scope)")
"""Of an expression: it holds a scope or a key."""
A_KEY = re.compile(r"(?:round-|start(?:-\d+)?/|planning/|validation/|calibration/|cross-site[-/])[\w./-]*")
"""Of a whole text in quotes: a key, or the beginning of one."""
VERBS = {"mean", "sum", "gather", "gathered", "fetch"}
CUTS = {"partition", "rpartition", "split", "rsplit", "removeprefix", "startswith", "match", "fullmatch"}


def found(source: str) -> list[str]:
    """Expressions that make or read a key by hand."""
    tree = ast.parse(source)
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    odd = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            odd += [node] if A_KEY.fullmatch(node.value) or "'round-" in node.value else []
        elif isinstance(node, ast.JoinedStr):
            odd += [node] if _joins_a_key(node) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            first = node.args[0] if node.args else None
            spelled = (
                isinstance(first, ast.JoinedStr)
                or _adds_text(first)
                or (isinstance(first, ast.Constant) and isinstance(first.value, str))
            )
            of_key = SCOPE_NAMES.search(ast.unparse(node.func.value)) is not None
            cut = isinstance(first, ast.Constant) and first.value in ("/", "start", "round-")
            odd += [node] if spelled and node.func.attr in VERBS else []
            odd += [node] if cut and of_key and node.func.attr in CUTS else []
    return [ast.unparse(node) for node in odd]


def _adds_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.BinOp) and any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) for part in ast.walk(node)
    )


def _joins_a_key(node: ast.JoinedStr) -> bool:
    for before, after in zip(node.values, node.values[1:], strict=False):
        holds = isinstance(before, ast.FormattedValue) and SCOPE_NAMES.search(ast.unparse(before.value))
        if holds and isinstance(after, ast.Constant) and str(after.value).startswith("/"):
            return True
    return False


@pytest.mark.parametrize(
    "source",
    [
        'f"{scope}/model"', 'f"{self._scope}/{name}"', 'f"{scope_of_round(3)}/model"', 'f"{key}/counts"',
        'f"{start_scope(0)}/model"', 'x = "round-0001/model"', 'f"round-{number:04d}"', 'x = "round-"',
        'scope.startswith("start")', '''x = "GLOB 'round-*/model'"''', 'x = "cross-site-"', 'x = "planning/dataset"',
        'collective["key"].partition("/")', 'key.split("/")[0]', 'communicator.sum("own-scope/x", array)',
        'communicator.mean(f"{a}/b", {}, 1.0)', 'seat.fetch(where + "/model")',
    ],
)  # fmt: skip
def test_what_makes_or_reads_a_key_is_found(source: str) -> None:
    assert found(source)


@pytest.mark.parametrize(
    "source",
    [
        '"""Such as round-0003/model."""', 'key_of(scope, f"selector-{number}")', 'np.sum(values, axis=0)',
        'communicator.sum(key, array)', 'f"{folder}/{site}"', 'path.partition("/")', 'x = "--cross-site"',
        'x = "cross-site"',
        'f"{monkey}/x"', 'np.mean(left / right)',
    ],
)  # fmt: skip
def test_what_does_not_is_left_alone(source: str) -> None:
    assert not found(source)


def modules() -> Iterator[Path]:
    for folder in ("nnunet_fed", "trainers", "planners", "transport"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_a_key_is_made_and_read_in_one_place() -> None:
    places = {
        path.relative_to(ROOT).as_posix(): odd for path in modules() if (odd := found(path.read_text(encoding="utf-8")))
    }
    assert list(places) == [HOME], places


def test_the_keys_of_a_scope_lie_together() -> None:
    first, last = keys_between("start")
    scopes = ["start", "start-1", "start.1", "start0", "start_", "starts", "star", "round-0000"]
    keys = [key_of(scope, name) for scope in scopes for name in ("-", "model", "zz/9")]
    assert [key for key in keys if first < key < last] == [key for key in keys if scope_of(key) == "start"]
