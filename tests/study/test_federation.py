"""The study: what belongs to its mathematics, and the sentence that a mistake in a file ends in."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from serving import make_study

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.study import toml
from nnunet_fed.study.federation import Federation, canonical_json, digest_of
from nnunet_fed.study.methods import METHODS
from nnunet_fed.study.site import SITE_FILE_VARIABLE, Site
from nnunet_fed.study.toml import explain

OTHER_VALUES: dict[str, tuple[Any, bool]] = {
    # another value, and whether it changes the mathematics
    "name": ("other", False),
    "sites": (("a", "b", "c"), False),
    "planner": ("nnUNetPlannerFedSmall", True),
    "geometry": ("lists", True),
    "overwrite_target_spacing": ((3.0, 1.0, 1.0), True),
    "gpu_memory_target_in_gb": (4.0, True),
    "preprocessor_name": ("OtherPreprocessor", True),
    "min_cases": (5, False),
    "plans_name": ("OtherPlans", False),
    "configuration": ("2d", False),
    "fold": ("all", False),
    "folds": ((0, 3), False),
    "rounds": (3, True),
    "local_epochs": (2, True),
    "iterations_per_epoch": (251, True),
    "val_iterations_per_epoch": (51, True),
    "trainer": ("nnUNetTrainerDA5", True),
    "initial_lr": (0.02, True),
    "momentum": (0.9, True),
    "momentum_on_round": ("reset", True),
    "weighting": ("uniform", True),
    "best": ("federation", True),
    "wire_dtype": ("bfloat16", True),
    "seed": (1, True),
    "pretrained": ("0123456789abcdef" * 4, True),
    "min_sites": (1, False),
    "deadline_minutes": (1.0, False),
    "planning_deadline_minutes": (1.0, False),
    "keep_rounds": (4, False),
    "keep_every": (10, False),
    "max_update_norm": (10.0, False),
    "cross_site": (True, False),
    "more_rounds": (2, False),
}
CANDIDATES: tuple[Any, ...] = (
    True, False, "best", 0, 1, 2, 3, 0.5, 0.25, 0.1, 0.9, 150.0, ("lesion",), {"lesion": 3.0}, "nnUNetTrainerOther",
)  # fmt: skip


def least_table(method: str) -> dict[str, Any]:
    """The table of a method that sets nothing it need not."""
    return {"name": method, **({"trainer": "nnUNetTrainerMine"} if method == "custom" else {})}


def another_value(method: str, option: str) -> Any:
    """A value of the option that is allowed beside the others' defaults, and is not its default."""
    table = METHODS[method]
    usual = table.model_validate(least_table(method))
    for value in (*get_args(table.model_fields[option].annotation), *CANDIDATES):
        try:
            changed = table.model_validate({**least_table(method), option: value})
        except ValidationError:
            continue
        if getattr(changed, option) != getattr(usual, option) and type(value) is not type:
            return value
    raise AssertionError(f"{method}.{option} has no other value among the candidates")


def test_every_field_is_decided_upon() -> None:
    """A new field fails here until somebody says whether it changes the mathematics."""
    assert {*OTHER_VALUES, "method"} == set(Federation.model_fields)
    assert {name for name, (_, mathematics) in OTHER_VALUES.items() if not mathematics} == Federation.OPERATIONAL


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_the_digest_covers_the_mathematics_and_nothing_else(name: str) -> None:
    value, mathematics = OTHER_VALUES[name]
    study, changed = make_study(), make_study(**({} if name == "sites" else {name: value}))
    if name == "sites":
        changed = make_study(value)
    assert getattr(study, name) != getattr(changed, name)
    assert (study.digest != changed.digest) == mathematics


def test_the_method_and_its_options_belong_to_the_mathematics() -> None:
    for name, table in METHODS.items():
        study = make_study(rounds=50, method=least_table(name))
        stored = study.stored()
        mathematics = {key: stored[key] for key in stored if key not in Federation.OPERATIONAL}
        assert study.digest == digest_of({**mathematics, "fold": 0})
        assert stored["method"]["name"] == name
        for option in table.model_fields.keys() - {"name"}:
            changed = {**least_table(name), option: another_value(name, option)}
            assert make_study(rounds=50, method=changed).digest != study.digest, f"{name}.{option}"


@given(st.permutations(["a", "b", "c", "B"]))
def test_the_order_of_sites_is_irrelevant(sites: list[str]) -> None:
    study = make_study(sites)
    assert study.sites == ("B", "a", "b", "c")
    assert study == make_study(("a", "b", "c", "B"))


def test_the_digest_is_that_of_the_study_that_travelled_in_the_plans() -> None:
    study = make_study(initial_lr=1, fold="all", min_sites=1)
    travelled = Federation.model_validate(json.loads(json.dumps(study.model_dump(mode="json"))))
    assert travelled == study
    assert travelled.digest == study.digest == make_study(initial_lr=1.0, fold="all", min_sites=1).digest


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3)), st.randoms())
def test_equal_values_have_equal_digests(value: dict[str, Any], shuffle: Any) -> None:
    items = list(value.items())
    shuffle.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)
    assert digest_of({**value, "one more": 1}) != digest_of(value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_cannot_say_has_no_digest(number: float) -> None:
    with pytest.raises(ValueError):
        digest_of({"x": number})


def test_quorum_and_epochs() -> None:
    study = make_study("abc", rounds=7, local_epochs=3)
    assert (study.quorum, study.epochs) == (3, 21)
    assert make_study("abc", min_sites=2).quorum == 2


# ------------------------------------------------------------------------------------------------------------- mistakes

GOOD: dict[str, dict[str, Any]] = {
    "federation": {"name": "s", "sites": ["a", "b"], "method": {"name": "fedavg"}, "rounds": 2},
    "site": {"name": "a", "coordinator": "127.0.0.1:7464"},
}


def sentence(model: type[Federation] | type[Site], **changes: Any) -> str:
    settings = {**GOOD["federation" if model is Federation else "site"], **changes}
    with pytest.raises(ValidationError) as refused:
        model.model_validate({key: value for key, value in settings.items() if value is not ...})
    return explain(refused.value, model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"roundz": 3}, "unknown key 'roundz', did you mean 'rounds'?"),
        ({"local_epoch": 3}, "unknown key 'local_epoch', did you mean 'local_epochs'?"),
        ({"zzz": 3}, "unknown key 'zzz'."),
        ({"method": {"name": "fedavg", "rounds": 3}}, "unknown key 'method.rounds'"),
        ({"rounds": ...}, "the key 'rounds' is missing."),
        ({"method": {}}, "the key 'method.name' is missing."),
        ({"sites": ["a", "b", "a"]}, "sites: site name given twice: a"),
        ({"sites": []}, "sites: "),
        ({"sites": ["a", "b/c"]}, "site name 'b/c': use letters, digits"),
        ({"sites": ["a", "../b"]}, "site name '../b'"),
        ({"sites": ["a" * 64]}, "at most 63"),
        ({"min_sites": 3}, "min_sites is 3, but the study has only 2 sites."),
        ({"min_sites": 0}, "min_sites: input should be greater than or equal to 1 (found 0)."),
        ({"rounds": 0}, "rounds: input should be greater than or equal to 1 (found 0)."),
        ({"rounds": "many"}, "rounds: input should be a valid integer"),
        ({"momentum": 1.0}, "momentum: input should be less than 1 (found 1.0)."),
        ({"weighting": "case"}, "weighting: there is no 'case'; known: 'cases' or 'uniform'."),
        ({"fold": "al"}, "fold: use a whole number from 0 on, or 'all' (found 'al')."),
        ({"fold": -1}, "fold: use a whole number from 0 on, or 'all' (found -1)."),
        ({"deadline_minutes": float("inf")}, "deadline_minutes: input should be a finite number (found inf)."),
        ({"deadline_minutes": 0}, "deadline_minutes: input should be greater than 0 (found 0)."),
        ({"keep_rounds": 1}, "keep_rounds: "),
        ({"min_cases": 0}, "min_cases: input should be greater than or equal to 1 (found 0)."),
        ({"geometry": "list"}, "geometry: there is no 'list'; known: 'private' or 'lists'."),
        ({"overwrite_target_spacing": [1.0, 1.0]}, "the key 'overwrite_target_spacing.2' is missing"),
        ({"overwrite_target_spacing": [1.0, 0.0, 1.0]}, "overwrite_target_spacing.1: input should be greater than 0"),
        ({"method": {"name": "fedsm"}, "sites": ["a"]}, "a study of FedSM needs at least two sites"),
        ({"method": {"name": "fedsm"}, "sites": ["a", "global"]}, "no site may be called 'global'"),
        ({"method": {"name": "fedsm", "softpull_self_weight": 0.4}}, "with 2 sites it must be at least 1/2"),
        ({"method": {"name": "fedsm", "softpull_self_weight": 1.1}}, "softpull_self_weight: input should be less than"),
        ({"method": {"name": "gcml"}, "cross_site": True}, "sites that train with GCML do not call it"),
        (
            {"method": {"name": "fedoap", "private_stem": True}, "cross_site": True},
            "cross_site = true does not go with private_stem = true",
        ),
        ({"method": {"name": "fedgs", "strenght": 1}}, "unknown key 'method.strenght', did you mean 'strength'?"),
        (
            {"method": {"name": "fedgs", "threshold": 0.5}},
            "threshold is an inverse area, patch over lesion: use numbers",
        ),
        ({"method": {"name": "fedgs", "threshold": {"x": 2, "y": 0}}}, "use numbers of at least 1"),
        ({"method": {"name": "fedgs", "threshold": 1}}, "the base of a logarithm is above 1"),
        ({"method": {"name": "fedgs", "log_base": 1}}, "the base of a logarithm is above 1"),
        (
            {"method": {"name": "fedgs", "threshold": "calibrated"}},
            "threshold: use a number, or a number for each class",
        ),
        ({"method": {"name": "fedgs", "threshold": {}}}, "threshold: use a number, or a number for each class"),
        ({"method": {"name": "fedgs", "threshold": float("inf")}}, "threshold"),
        ({"method": {"name": "fedgs", "strength": -1}}, "method.strength: input should be greater than or equal to 0"),
        ({"method": {"name": "fedgs", "warm_down": 1}}, "method.warm_down: input should be less than 1"),
        ({"method": {"name": "fedgs", "classes": []}}, "method.classes: "),
        (
            {"pretrained": "7c0fadc53d47"},
            "pretrained: use the 64 hexadecimal digits that 'nnunet_fed digest FILE' prints (found '7c0fadc53d47').",
        ),
        ({"pretrained": 7}, "pretrained: use the 64 hexadecimal digits"),
        ({"gpu_memory_target_in_gb": 0}, "gpu_memory_target_in_gb: input should be greater than 0 (found 0)."),
    ],
)
def test_a_mistake_in_the_study_is_named(changes: dict[str, Any], expected: str) -> None:
    assert expected in sentence(Federation, **changes)


def test_an_unknown_method_is_named_and_so_are_the_known_ones() -> None:
    told = sentence(Federation, method={"name": "scaffold"})
    assert told.startswith("method")
    for name in ("scaffold", *METHODS):
        assert f"'{name}'" in told


def test_all_mistakes_are_told_at_once() -> None:
    told = sentence(Federation, roundz=3, rounds=..., seed=-1)
    for part in ("'rounds' is missing", "unknown key 'roundz'", "seed: "):
        assert part in told


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"cordinator": "x"}, "unknown key 'cordinator', did you mean 'coordinator'?"),
        ({"name": "a b"}, "site name 'a b': use letters"),
        ({"name": ...}, "the key 'name' is missing."),
        *(
            ({"coordinator": address}, f"{address!r} is no HOST:PORT, for example 127.0.0.1:7464")
            for address in ("", "localhost", ":80", "localhost:", "localhost:http", "a:0", "a:65536", "a:-1", "a:²")
        ),
        ({"listen": "0.0.0.0:7465"}, "listen and peers go together: give both, or neither"),
        ({"peers": {"a": "a:1"}}, "listen and peers go together: give both, or neither"),
        ({"listen": "0.0.0.0", "peers": {"a": "a:1"}}, "listen: '0.0.0.0' is no HOST:PORT"),
        ({"listen": ":1", "peers": {"a": "a:1"}}, "listen: ':1' is no HOST:PORT"),
        ({"listen": "a:1", "peers": {"a": "a:http"}}, "peers: 'a:http' is no HOST:PORT"),
        ({"listen": "a:1", "peers": {"a": "a:1", "b c": "b:1"}}, "peers: site name 'b c': use letters"),
        (
            {"listen": "a:1", "peers": {"b": "b:1", "c": "c:1"}},
            "peers lacks this site, 'a': the list is",
        ),
        (
            {"listen": "a:1", "peers": {"a": "host:1", "b": "b:1", "c": "Host:1"}},
            "peers: the sites 'a' and 'c' have one address, Host:1: give each its own",
        ),
        ({"insecure": True, "revoked": "revoked.txt"}, "insecure = true goes without revoked"),
        ({"connect_minutes": 0}, "connect_minutes: "),
        ({"connect_minutes": float("inf")}, "connect_minutes: input should be a finite number"),
        ({"fold": "one"}, "fold: use a whole number"),
    ],
)
def test_a_mistake_in_a_sites_file_is_named(changes: dict[str, Any], expected: str) -> None:
    assert expected in sentence(Site, **changes)


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:65535", "[::1]:7464"])
def test_good_addresses(address: str) -> None:
    assert Site(name="a", coordinator=address).coordinator == address


@pytest.mark.parametrize("model", [Federation, Site])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read: .*'nnunet_fed init' writes one"),
        (b"\xff\xfe", "cannot be read: .*'nnunet_fed init' writes one"),
        (b"name = \nrounds = 3", "is no valid TOML: .*line 1"),
        (b"name = 'a'\nname = 'b'\nrounds = 3", "is no valid TOML: .*line 2"),
        (b"name = 'a'", "the key '.*' is missing"),
    ],
    ids=["missing", "binary", "no value", "twice", "incomplete"],
)
def test_errors_name_the_file(
    tmp_path: Path, model: type[Federation] | type[Site], content: bytes | None, expected: str
) -> None:
    path = tmp_path / "some.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=expected) as refused:
        model.read(path)
    assert str(path) in str(refused.value)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Federation.read(tmp_path)


@pytest.mark.parametrize("value", [None, ""])
def test_a_site_without_its_variable(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(SITE_FILE_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(SITE_FILE_VARIABLE, value)
    with pytest.raises(ConfigurationError, match="nnUNet_fed_site is not set.*site.toml"):
        Site.from_environment()


def test_a_site_is_found_through_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('name = "hospital-1"\ncoordinator = "127.0.0.1:1"\nfold = "all"\n')
    monkeypatch.setenv(SITE_FILE_VARIABLE, str(tmp_path / "s.toml"))
    assert Site.from_environment() == Site(name="hospital-1", coordinator="127.0.0.1:1", fold="all")


# ------------------------------------------------------------------------------------------------------------ templates


def template(name: str) -> str:
    return resources.files("nnunet_fed").joinpath("templates", name).read_text(encoding="utf-8")


def mentioned(text: str) -> dict[str, Any]:
    """Keys of a template, those in comments ("# key = value") included, with their values."""
    lines = [line.removeprefix("# ") if line.startswith("# ") and " = " in line else line for line in text.splitlines()]
    return toml.from_toml("\n".join(lines))


@pytest.mark.parametrize(("name", "model"), [("federation.toml", Federation), ("site.toml", Site)])
def test_templates_are_valid_and_show_every_key(
    tmp_path: Path, name: str, model: type[Federation] | type[Site]
) -> None:
    (tmp_path / name).write_text(template(name), encoding="utf-8")
    model.read(tmp_path / name)
    shown = mentioned(template(name))
    assert set(shown) == set(model.model_fields)
    model.model_validate(shown)  # what is in comments is valid too
    for line in template(name).splitlines():
        assert len(line) <= 120


def test_templates_show_the_defaults() -> None:
    shown = mentioned(template("federation.toml"))
    for name, field in Federation.model_fields.items():
        free_choice = name in (
            "rounds", "local_epochs", "plans_name", "min_sites", "overwrite_target_spacing", "gpu_memory_target_in_gb",
            "max_update_norm", "keep_every", "pretrained", "folds",
        )  # fmt: skip
        if not field.is_required() and not free_choice:
            assert shown[name] == field.default, name


def test_templates_belong_together() -> None:
    study = Federation.model_validate(toml.from_toml(template("federation.toml")))
    site = Site.model_validate(toml.from_toml(template("site.toml")))
    assert site.name in study.sites


@pytest.mark.parametrize("method", ["gcml", "local"])
def test_a_method_without_common_rounds_has_no_best_one(method: str) -> None:
    with pytest.raises(
        ValidationError, match=r"best = 'federation' needs rounds .* keeps its own best\. Take 'best' out"
    ):
        make_study(rounds=50, method={"name": method}, best="federation")
