"""A site's labels in the words of the federation: ``labels`` in ``site.toml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_fed.errors import ConfigurationError

BACKGROUND, IGNORE = "background", "ignore"
"""nnU-Net's names for 0 and for voxels that nobody has labelled."""

Sources = Mapping[str, tuple[int | str, ...]]
"""By the federation's label, the names or values of the site's labels that become it; none: the site has none."""


def in_numbers(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of a ``dataset.json`` with whole numbers, where nnU-Net takes ``"1"`` and ``1.0`` for 1 as well.

    Lists of numbers, and what is no whole number, stay as they are.
    """
    return {name: _in_number(value) for name, value in labels.items()}


def _in_number(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value


@dataclass(frozen=True)
class LabelMap:
    """Which of a site's labels become which of the federation's. Source: ours."""

    dataset: int
    """nnU-Net's number of the data set with the federation's labels, which is built beside the site's own."""
    sources: Sources

    def dataset_name(self, own: str) -> str:
        """nnU-Net's name of the data set that is built, out of the site's own, ``Dataset001_Liver``."""
        return f"Dataset{self.dataset:03d}_{own.partition('_')[2]}_mapped"

    def resolve(self, own: Mapping[str, Any], where: str) -> ResolvedMap:
        """Apply the map to a site's labels.

        The federation's labels are numbered 1, 2, ... in the order of the map. What the map does not name becomes
        background, but ``ignore`` stays ``ignore``, which has the highest value, as nnU-Net wants it.

        Args:
            own: ``labels`` of the site's dataset.json.
            where: that file, for the errors.

        Raises:
            ConfigurationError: region-based labels, or a map that names an unknown label, one label twice, or none.
        """
        own = in_numbers(own)
        if any(isinstance(value, list) for value in own.values()):
            raise ConfigurationError(
                f"{where} has region-based labels (lists of values), which 'labels' in site.toml cannot map. Give each "
                "label one value, or remove 'labels'."
            )
        sources = dict(self.sources)
        named = {value for wanted in sources.values() for value in wanted}
        if IGNORE in own and IGNORE not in sources and named.isdisjoint((IGNORE, own[IGNORE])):
            sources[IGNORE] = (IGNORE,)
        foreground = [label for label in sources if label not in (BACKGROUND, IGNORE)]
        names = [BACKGROUND, *foreground, *([IGNORE] if IGNORE in sources else [])]
        labels = {label: number for number, label in enumerate(names)}
        target: dict[int, str] = {}
        for label, wanted in sources.items():
            for source in wanted:
                value = _value(source, label, own, where)
                if target.setdefault(value, label) != label:
                    raise ConfigurationError(
                        f"'labels' in site.toml lets {source!r} become both '{target[value]}' and '{label}'. "
                        "Name it once."
                    )
        if not any(label in foreground for label in target.values()):
            raise ConfigurationError(
                f"'labels' in site.toml leaves none of the labels in {where} but background. Name at least one of "
                f"{_known(own)}."
            )
        return ResolvedMap(labels, {value: labels[target.get(value, BACKGROUND)] for value in own.values()})


@dataclass(frozen=True)
class ResolvedMap:
    """A label map in numbers."""

    labels: dict[str, int]
    """The federation's labels."""
    values: dict[int, int]
    """The federation's value for each of the site's values."""


def _value(source: int | str, label: str, own: Mapping[str, Any], where: str) -> int:
    """The site's value that a name or a number stands for."""
    value = own.get(source) if isinstance(source, str) else source
    if value is None or value not in own.values():
        raise ConfigurationError(
            f"'labels' in site.toml: '{label}' names {source!r}, which {where} does not have. Use {_known(own)}."
        )
    if value == 0 and label != BACKGROUND:
        raise ConfigurationError(
            f"'labels' in site.toml: '{label}' names {source!r}, but background stays background. Remove it there."
        )
    return int(value)


def _known(own: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({value})" for name, value in own.items() if value != 0)
