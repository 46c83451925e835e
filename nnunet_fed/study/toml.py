"""TOML: files that people write, read into tables, with a sentence for each mistake; and writing it. Source: ours."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.methods import METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOMLDecodeError = tomllib.TOMLDecodeError
_T = TypeVar("_T", bound=BaseModel)


def read_table(cls: type[_T], path: Path) -> _T:
    """Read and check a file; raises :class:`ConfigurationError` that names file, key and remedy."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error}. 'nnunet_fed init' writes one to start from."
        ) from None
    try:
        return cls.model_validate(from_toml(text))
    except TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is no valid TOML: {error}.") from None
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {explain(error, cls)}") from None


def explain(error: ValidationError, cls: type[BaseModel]) -> str:
    """All of pydantic's complaints as a sentence each, with the nearest known key for a typo."""
    sentences = []
    for problem in error.errors(include_url=False):
        path, table = list(problem["loc"]), cls
        if path[:1] == ["method"] and len(path) > 1:
            table = METHODS[str(path.pop(1))]  # pydantic names the chosen table in between
        place = ".".join(str(part) for part in path) or "the file"
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(path[-1]), list(table.model_fields), n=1)
            sentences.append(f"unknown key '{place}'" + (f", did you mean '{near[0]}'?" if near else "."))
        elif problem["type"] == "union_tag_not_found":
            sentences.append(f"the key '{place}.name' is missing.")
        elif problem["type"] == "missing":
            sentences.append(f"the key '{place}' is missing.")
        elif problem["type"] in ("literal_error", "union_tag_invalid"):
            context = problem["ctx"]
            given = context.get("tag", problem["input"])
            known = context.get("expected_tags") or context["expected"]
            sentences.append(f"{place}: there is no {given!r}; known: {known}.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
            sentences.append(f"{place}: {message[0].lower() + message[1:]}{found}.")
    return " ".join(sentences)


def from_toml(text: str) -> dict[str, Any]:
    """The tables in a text; raises :class:`TOMLDecodeError`."""
    return tomllib.loads(text)


def to_toml(values: Mapping[str, Any]) -> str:
    """JSON values as TOML; ``None``, which TOML does not know, is left out of tables."""
    return tomli_w.dumps(_without_none(values))


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value is not None
    }
