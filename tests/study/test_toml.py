from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from serving import make_study

from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import Site
from nnunet_fed.study.toml import from_toml, to_toml


def test_toml_comes_back_as_it_was(tmp_path: Path) -> None:
    method = {
        "name": "fedgs",
        "threshold": {"Läsion 1": 150, "cyst": 2.5},
        "log_base": 10,
        "classes": ("Läsion 1", "cyst"),
    }
    study = make_study(("a", "b-2"), name='"Übung" \\ 😀\n', initial_lr=1e-7, min_sites=1, fold="all", method=method)
    path = tmp_path / "federation.toml"
    path.write_text(to_toml(study.model_dump(mode="json")), encoding="utf-8")
    assert Federation.read(path) == study


def test_a_label_map_is_a_table_that_keeps_its_order(tmp_path: Path) -> None:
    labels = {"lesion": ("Zyste 1", 3), "edge": (), "core": ("a",)}
    path = tmp_path / "site.toml"
    path.write_text(
        to_toml({"name": "a", "coordinator": "127.0.0.1:1", "mapped_dataset": 2, "labels": labels}), encoding="utf-8"
    )
    read = Site.read(path).labels
    assert read is not None
    assert list(read.items()) == list(labels.items())


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.one_of(
    st.booleans(), TEXTS, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.none()
)  # fmt: skip
LISTS = st.lists(PLAIN.filter(lambda value: value is not None), max_size=3)
TABLES: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(TEXTS, PLAIN | LISTS, max_size=5), lambda inner: st.dictionaries(TEXTS, PLAIN | inner, max_size=3)
)


def without_none(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: without_none(inner) for key, inner in value.items() if inner is not None}


@given(TABLES)
def test_any_table_comes_back_but_for_what_is_none(values: dict[str, Any]) -> None:
    assert from_toml(to_toml(values)) == without_none(values)
