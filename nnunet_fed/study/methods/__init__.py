"""The methods: a module each, found here and listed nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import Field

from nnunet_fed.study.method_table import MethodTable


def _discover() -> dict[str, type[MethodTable]]:
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    tables = [
        table
        for module in modules
        for table in vars(module).values()
        if isinstance(table, type) and issubclass(table, MethodTable) and table.__module__ == module.__name__
    ]
    return {get_args(table.model_fields["name"].annotation)[0]: table for table in tables}


METHODS: dict[str, type[MethodTable]] = _discover()
"""Table of each method, by its name."""

if TYPE_CHECKING:
    Method = MethodTable
else:
    Method = Annotated[Union[tuple(METHODS.values())], Field(discriminator="name")]  # noqa: UP007 (found at runtime)
"""The method's table: ``name`` and the options of that method."""


def method_settings(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``[method]``, of what a command line says.

    Args:
        name: of a method, or of a trainer of the user's.
        options: of that method.
    """
    if name not in METHODS and name.startswith("nnUNetTrainer"):
        return {"name": "custom", "trainer": name, "options": dict(options)}
    return {"name": name, **options}
