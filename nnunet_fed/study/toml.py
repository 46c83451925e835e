"""TOML: files that people write, read into tables, with a sentence for each mistake; and writing it. Source: ours."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study.methods import METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
        return cls.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
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


def to_toml(values: Mapping[str, Any], within: str = "") -> str:
    """JSON values as TOML: flat ones, then a table for each mapping; ``None`` is left out.

    Args:
        values: by key.
        within: name of the table that they are in.
    """
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    # TOML reads JSON's numbers, strings and lists of them, but no pair of surrogates
    lines = [
        f"{_toml_key(key)} = {json.dumps(value, ensure_ascii=False)}\n"
        for key, value in values.items()
        if value is not None and key not in tables
    ]
    for key, table in tables.items():
        name = within + _toml_key(key)
        lines.append(f"\n[{name}]\n{to_toml(table, name + '.')}")
    return "".join(lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)
