"""Tables of a study, which other versions of nnunet_fed read too: what each field means where it is not written.

Every field has a *neutral* value: what a study means that does not name it. It is frozen when the field comes into
being, so that no later version, and no later default, redefines a study. A field of version 0.1 has the default of 0.1.
Source: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from nnunet_fed.errors import ConfigurationError, RefusedError

OLDEST_PROTOCOL, NEWEST_PROTOCOL = 2, 3
"""Versions of the protocol that this version of nnunet_fed speaks."""
SPOKEN_SINCE = {2: "0.1", 3: "0.2"}
"""The first version of nnunet_fed that speaks a version of the protocol."""


@dataclass(frozen=True)
class Neutral:
    """Marks a field, as in ``Annotated[str, Neutral("nnUNetTrainer", since=3)]``; without it, its default is neutral.

    A field that came after 0.1 needs it, and so does one whose default was changed.
    """

    value: Any
    """As JSON has it. Never to be changed."""
    since: int = OLDEST_PROTOCOL
    """Version of the protocol with which the field came."""


def neutral_of(field: FieldInfo) -> Neutral:
    """The neutral value of a field; an ellipsis for a field that every study names."""
    for mark in field.metadata:
        if isinstance(mark, Neutral):
            return mark
    return Neutral(... if field.is_required() else _default_of(field))


def _default_of(field: FieldInfo) -> Any:
    return to_jsonable_python(field.get_default(call_default_factory=True))


class Table(BaseModel):
    """A table of a file that people write: no unknown keys, nothing infinite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    SINCE: ClassVar[int] = OLDEST_PROTOCOL
    """Version of the protocol with which the table came."""
    OPERATIONAL: ClassVar[frozenset[str]] = frozenset()
    """Fields that do not change the mathematics."""

    def stored(self, protocol: int = NEWEST_PROTOCOL) -> dict[str, Any]:
        """As JSON for journal, plans and wire: fields that came after 0.1 are left out where they are neutral.

        Args:
            protocol: version of the protocol that the reader speaks; operational fields that it does not know are left
                out too.

        Raises:
            RefusedError: the reader does not know a field that changes the mathematics.
        """
        if protocol < self.SINCE:
            raise RefusedError(_too_new(f"is of the method '{getattr(self, 'name', '')}'", self.SINCE))
        content: dict[str, Any] = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            neutral, value = neutral_of(field), getattr(self, name)
            if isinstance(value, Table):
                content[name] = value.stored(protocol)
                continue
            is_neutral = neutral.since > OLDEST_PROTOCOL and content[name] == neutral.value
            is_unknown = neutral.since > protocol
            if is_unknown and not is_neutral and name not in self.OPERATIONAL:
                raise RefusedError(_too_new(f"sets '{name}'", neutral.since))
            if is_unknown or is_neutral:
                del content[name]
        return content

    @classmethod
    def complete(cls, stored: Mapping[str, Any]) -> dict[str, Any]:
        """What another version has stored, with the neutral value of each field that it did not name.

        Raises:
            ConfigurationError: it names a field that this version does not know.
        """
        unknown = sorted(stored.keys() - cls.model_fields.keys())
        if unknown:
            raise ConfigurationError(
                f"The study was made by a newer version of nnunet_fed: this one does not know "
                f"{', '.join(map(repr, unknown))}. Install the version that the coordinator has."
            )
        neutral = {name: neutral_of(field).value for name, field in cls.model_fields.items()}
        return {**{name: value for name, value in neutral.items() if value is not ...}, **stored}

    def defaults(self) -> dict[str, Any]:
        """This version's default of each field that has one, as JSON; those of a table within it in a table."""
        found = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Table):
                found[name] = value.defaults()
            elif not field.is_required():
                found[name] = _default_of(field)
        return found

    def filled(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """As JSON, with other defaults than this version's for what was not set.

        Args:
            defaults: as :meth:`defaults` gave them in another version; what is not in it is neutral.
        """
        content: dict[str, Any] = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Table):
                content[name] = value.filled(defaults.get(name, {}))
            elif name not in self.model_fields_set:
                content[name] = defaults.get(name, neutral_of(field).value)
        return content


def _too_new(what: str, since: int) -> str:
    return (
        f"The study {what}, which nnunet_fed knows since version {SPOKEN_SINCE[since]}. Install that version or a "
        "newer one at every site."
    )
