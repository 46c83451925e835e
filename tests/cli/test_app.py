"""The command line: what goes wrong ends in one sentence, and what stops, stops in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from serving import Served, make_study

from nnunet_fed import __version__, leases
from nnunet_fed.cli.app import DEBUG_VARIABLE
from nnunet_fed.cli.option_values import named_labels, repeat_option
from nnunet_fed.coordinator.coordinator import Coordinator
from nnunet_fed.coordinator.store import Store
from nnunet_fed.study.federation import Federation
from nnunet_fed.study.site import SITE_FILE_VARIABLE, Site

NOBODY = "127.0.0.1:9"
"""An address at which nothing listens."""
STUDY = 'name = "s"\nsites = ["a", "b"]\nrounds = 2\n[method]\nname = "fedavg"\n'


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    (tmp_path / "federation.toml").write_text(STUDY)
    return tmp_path / "federation.toml"


def use_site(monkeypatch: pytest.MonkeyPatch, folder: Path, address: str, minutes: float = 0.01) -> None:
    file = folder / "site.toml"
    file.write_text(f'name = "a"\ncoordinator = "{address}"\ninsecure = true\nconnect_minutes = {minutes}\n')
    monkeypatch.setenv(SITE_FILE_VARIABLE, str(file))


def test_the_version(command: Command) -> None:
    assert command("--version") == (0, f"{__version__}\n", "")


# ------------------------------------------------------------------------------------------------------------ init


def test_init_writes_files_that_are_valid_and_never_overwrites(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    status, out, _ = command("init", folder)
    assert (status, out.split()) == (0, [str(folder / "federation.toml"), str(folder / "site.toml")])
    Federation.read(folder / "federation.toml")
    Site.read(folder / "site.toml")
    (folder / "federation.toml").unlink()
    (folder / "site.toml").write_text("mine")
    assert f"{folder / 'site.toml'} is there already" in command.fails("init", folder)
    assert (folder / "site.toml").read_text() == "mine"
    assert not (folder / "federation.toml").exists(), "nothing is written if one of them is there"


# ----------------------------------------------------------------------------------------------------- coordinator


def listen(study: Path, address: str = "127.0.0.1:0") -> list[str]:
    return ["coordinator", str(study), "--listen", address, "--state", str(study.parent / "state"), "--insecure"]


def test_a_typo_in_the_study(command: Command, study_file: Path) -> None:
    study_file.write_text(STUDY.replace("rounds", "roundz"))
    told = command.fails(*listen(study_file))
    assert str(study_file) in told
    assert "unknown key 'roundz', did you mean 'rounds'?" in told


def test_an_unknown_method_in_the_study(command: Command, study_file: Path) -> None:
    study_file.write_text(STUDY.replace("fedavg", "scaffold"))
    told = command.fails(*listen(study_file))
    assert "'scaffold'" in told
    assert "'fedavg'" in told


def test_a_study_that_is_not_there(command: Command, tmp_path: Path) -> None:
    told = command.fails(*listen(tmp_path / "nothing.toml"))
    assert f"{tmp_path / 'nothing.toml'} cannot be read" in told
    assert "nnunet_fed init" in told


def test_a_port_in_use(command: Command, study_file: Path, serve: Callable[..., Served]) -> None:
    address = serve(make_study(), study_file.parent / "other").server.address
    assert f"Cannot listen on {address}" in command.fails(*listen(study_file, address), status=75)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "[2001:db8::1]:7464", "hospital.example:7464"])
def test_an_address_that_is_not_on_this_machine(command: Command, study_file: Path, address: str) -> None:
    assert f"'{address}' is not on this machine" in command.fails(*listen(study_file, address))


@pytest.mark.parametrize(
    "address", ["127.0.0.1:99999", "127.0.0.1:http", "127.0.0.1:", "localhost:-1", "localhost", "::1:7464"]
)
def test_an_address_with_an_impossible_port(command: Command, study_file: Path, address: str) -> None:
    assert f"'{address}' is no HOST:PORT" in command.fails(*listen(study_file, address))


def test_who_may_read_the_status_over_http(command: Command, study_file: Path) -> None:
    told = command.fails(*listen(study_file), "--http", "0.0.0.0:0")
    assert "add --http-insecure" in told
    assert "--http-insecure goes with --http" in command.fails(*listen(study_file), "--http-insecure")


def test_without_tls_only_when_told(command: Command, study_file: Path) -> None:
    assert "--insecure" in command.fails(*listen(study_file)[:-1])


def test_a_state_that_another_coordinator_uses(
    command: Command, study_file: Path, serve: Callable[..., Served]
) -> None:
    serve(make_study(), study_file.parent / "state")
    assert "If another coordinator uses it" in command.fails(*listen(study_file), status=75)


def test_a_state_of_another_study(command: Command, study_file: Path) -> None:
    store = Store(study_file.parent / "state")
    Coordinator(make_study(rounds=99), store)
    store.close()
    assert "belongs to another study" in command.fails(*listen(study_file))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_coordinator_stops_in_order(study_file: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nnunet_fed", *listen(study_file)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert "'s' for a, b on 127.0.0.1:" in process.stdout.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "Error" not in err


# ---------------------------------------------------------------------------------------------------------- at a site


@pytest.mark.parametrize("arguments", [("plan_and_preprocess", "-d", "1"), ("status", "--once")])
def test_a_site_without_its_file(command: Command, arguments: tuple[str, ...]) -> None:
    assert "nnUNet_fed_site is not set" in command.fails(*arguments)


def use_dataset(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> Path:
    """Folders for nnU-Net, and an empty one of a data set."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(name, str(folder / name))
    dataset = folder / "nnUNet_raw" / f"Dataset{number:03d}_Test"
    dataset.mkdir(parents=True)
    return dataset


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan_and_preprocess", "-d", "1"),
        ("plan_and_preprocess", "-d", "1", "--join"),
        ("plan_and_preprocess", "-d", "1", "--dry-run"),
        ("plan_and_preprocess", "-d", "1", "--correct"),
        ("status", "--json"),
    ],
)
def test_no_coordinator(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    use_site(monkeypatch, tmp_path, NOBODY)
    use_dataset(monkeypatch, tmp_path, 1)
    assert f"The coordinator at {NOBODY} does not answer" in command.fails(*arguments)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:99999"])
def test_status_of_an_address_that_is_none(command: Command, address: str) -> None:
    told = command.fails("status", "--coordinator", address, "--once")
    assert told.startswith("--coordinator: ")
    assert f"{address!r} is no HOST:PORT" in told


def test_status(command: Command, serve: Callable[..., Served]) -> None:
    served = serve(make_study())
    served.seat("a").report({"phase": "training", "round": 1, "rounds": 2, "epoch": 0}, wait=True)
    address = ("--coordinator", served.server.address)
    status, out, _ = command("status", *address, "--json")
    told = json.loads(out)
    assert status == 0
    assert told["digest"] == served.study.digest
    assert told["sites"]["a"]["progress"]["phase"] == "training"
    assert {"runs", "events"} <= told.keys()
    status, out, _ = command("status", *address, "--once")
    assert status == 0
    assert "training" in out


def test_nnunets_paths_are_not_set(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, serve: Callable[..., Served]
) -> None:
    served = serve(make_study())
    use_site(monkeypatch, tmp_path, served.server.address)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert "nnUNet_raw is not set" in command.fails("plan_and_preprocess", "-d", "1")
    assert served.coordinator.status()["sites"]["a"]["last_seen"] is None, "not even a word is sent"


def test_planning_that_fails(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, serve: Callable[..., Served]
) -> None:
    served = serve(make_study())
    use_site(monkeypatch, tmp_path, served.server.address)
    use_dataset(monkeypatch, tmp_path, 1)
    status, out, err = command("plan_and_preprocess", "-d", "1")
    assert (status, "Traceback" in out + err) == (2, False)
    assert re.search(r"^Error: The data of .* have 1 error \(nothing was sent\):\nerror, no dataset.json: ", err, re.M)
    assert served.coordinator.status()["sites"]["a"]["progress"]["phase"] == "failed", "who watches sees it"


def test_a_data_set_is_planned_once_at_a_time(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, serve: Callable[..., Served]
) -> None:
    served = serve(make_study())
    use_site(monkeypatch, tmp_path, served.server.address)
    use_dataset(monkeypatch, tmp_path, 1)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.1)
    with leases.taken(tmp_path / "nnUNet_preprocessed" / "Dataset001_Test" / "planning.lock", "It runs"):
        told = command.fails("plan_and_preprocess", "-d", "1")
    assert told.startswith("The data set 1 is being planned already: process ")
    assert served.coordinator.status()["sites"]["a"]["last_seen"] is None, "not even a word is sent"
    assert "no dataset.json" in command("plan_and_preprocess", "-d", "1")[2], "the next one is let in"


@pytest.mark.parametrize("other", ["--join", "--dry-run"])
def test_only_who_tells_something_can_withdraw_it(command: Command, other: str) -> None:
    told = f"--correct goes without {other}, which tells nothing that could be withdrawn."
    assert command.fails("plan_and_preprocess", "-d", "1", "--correct", other) == told


def test_planning_takes_several_configurations(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, serve: Callable[..., Served]
) -> None:
    from nnunet_fed.errors import DisagreementError
    from nnunet_fed.planners import planning

    asked: list[Any] = []

    def plan(
        seat: Any, study: Federation, dataset: int, configurations: list[str], processes: int, *_: Any, **more: Any
    ) -> None:
        asked.append((study, dataset, configurations, processes))
        raise DisagreementError("That is enough.")

    served = serve(make_study())
    use_site(monkeypatch, tmp_path, served.server.address)
    use_dataset(monkeypatch, tmp_path, 7)
    monkeypatch.setattr(planning, "plan_and_preprocess", plan)
    assert command.fails("plan_and_preprocess", "-d", "7", "-c", "2d", "3d_fullres", "-np", "3") == "That is enough."
    assert command.fails("plan_and_preprocess", "-c", "2d", "-d", "7") == "That is enough."
    assert command.fails("plan_and_preprocess", "-d", "7") == "That is enough."
    assert [(dataset, configurations or None, processes) for _, dataset, configurations, processes in asked] == [
        (7, ["2d", "3d_fullres"], 3),
        (7, ["2d"], 4),
        (7, None, 4),
    ]
    assert asked[0][0] == served.study
    events = served.coordinator.status(record=True)["events"]
    assert [event["site"] for event in events if event["text"] == "That is enough."] == 3 * ["a"], (
        "disagreement is told"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("plan -c 2d 3d_fullres", "plan -c 2d -c 3d_fullres"),
        ("plan -c 2d 3d_fullres 3d_lowres -d 4", "plan -c 2d -c 3d_fullres -c 3d_lowres -d 4"),
        ("plan -d 4 -c 2d", "plan -d 4 -c 2d"),
        ("plan -c 2d -c 3d_fullres", "plan -c 2d -c 3d_fullres"),
        ("plan -c 2d -d 4 5", "plan -c 2d -d 4 5"),
        ("plan -c", "plan -c"),
        ("plan -c -d 4", "plan -c -d 4"),
        ("init folder", "init folder"),
        ("", ""),
    ],
)
def test_one_option_takes_several_values(given: str, expected: str) -> None:
    assert repeat_option(given.split(), "-c") == expected.split()


# ------------------------------------------------------------------------------------------------- split and simulate


def test_the_phantoms_sites_have_sizes_of_their_own(command: Command, tmp_path: Path) -> None:
    status, printed, _ = command("phantom", tmp_path / "out", "--cases", "1,2", "--val-cases", "1")
    assert status == 0
    assert printed.split()[-3:] == [str(tmp_path / "out" / name) for name in ("site_a", "site_b", "test")]
    assert len(list((tmp_path / "out" / "site_b" / "labelsTr").iterdir())) == 3
    assert "--cases must be whole numbers with commas" in command.fails("phantom", tmp_path / "x", "--cases", "4;8")


def test_the_phantom_has_one_organ_or_many(command: Command, tmp_path: Path) -> None:
    for organs, labels in (([], {"organ", "lesion"}), (["--organs"], {"liver", "lesion"})):
        out = tmp_path / f"data{len(organs)}"
        status, printed, _ = command("phantom", out, "--sites", "1", "--cases", "1", *organs)
        assert (status, printed.split()[-2:]) == (0, [str(out / "site_a"), str(out / "test")])
        assert set(json.loads((out / "site_a" / "dataset.json").read_text())["labels"]) == labels | {"background"}


def test_split_needs_one_way_to_split(command: Command, tmp_path: Path) -> None:
    for arguments in ((), ("--by", "hospital", "--sites", "3")):
        assert "Give either --by COLUMN or --sites N" in command.fails("split", tmp_path, tmp_path / "out", *arguments)
    told = command.fails("split", tmp_path, tmp_path / "out", "--by", "hospital", "--alpha", "1")
    assert "--alpha goes with --sites" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--site", "a=x", "--site", "a=y"), "--site a is given twice"),
        (("--site", "a"), "--site a: give a name and a folder"),
        (("--site", "a="), "--site a=: give a name and a folder"),
        (("--site", "a b=x"), "site name 'a b': use letters"),
        (("--site", "a=x", "--method", "scaffold"), "'scaffold'; known: 'custom', 'ditto'"),
        (("--site", "a=x", "--option", "strength"), "--option strength: give a name and a value"),
        (("--site", "a=x", "--option", "x=1", "--option", "x=2"), "--option x is given twice"),
        (("--site", "a=x", "--option", "strength=2"), "unknown key 'method.strength'"),
        (("--site", "a=x", "--method", "fedgs", "--option", 'classes=["x", 1]'), "method.classes.1: input should be"),
        (("--site", "a=x", "--method", "fedgs", "--option", "variant=x"), "method.variant: there is no 'x'; known:"),
        (("--site", "a=x", "--labels", "lesion"), "--labels lesion: give a label of the federation"),
        (("--site", "a=x", "--labels", "=tumour"), "--labels =tumour: give a label of the federation"),
        (("--site", "a=x", "--labels", ":lesion=tumour"), "--labels :lesion=tumour: give a label of the federation"),
        (("--site", "a=x", "--labels", "y=1", "--labels", "y=2"), "--labels y is given twice; put commas between"),
        (("--site", "a=x", "--labels", "b:y=1"), "There is a label map for 'b', but the sites are a."),
        (("--site", "a=x", "--fold", "one"), "--fold must be a whole number or 'all', not 'one'"),
        (("--site", "a=x", "--fold", "-1"), "fold: use a whole number from 0 on, or 'all'"),
        (("--site", "a=x", "--weighting", "size"), "weighting: there is no 'size'; known: 'cases' or 'uniform'"),
        (("--site", "a=x", "--rounds", "0"), "rounds: input should be greater than or equal to 1"),
        (("--site", "a=x", "--site", "b=x", "--method", "gcml", "--cross-site"), "cross_site = true needs"),
        (("--site", "a=x", "--min-sites", "2"), "min_sites is 2, but the study has only 1 sites"),
        (("--site", "a=x"), "has no dataset.json"),
    ],
)
def test_a_mistake_in_a_simulation(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in command.fails("simulate", "--out", "out", *arguments)
    assert not (tmp_path / "out").exists(), "nothing has started"


@pytest.mark.parametrize(
    ("options", "maps"),
    [
        ("", {}),
        ("lesion=lesion", {"a": {"lesion": ("lesion",)}, "b": {"lesion": ("lesion",)}}),
        ("b:lesion=tumour,3", {"b": {"lesion": ("tumour", 3)}}),
        ("b:y=2 x=1 a:y=", {"a": {"y": (), "x": (1,)}, "b": {"y": (2,), "x": (1,)}}),
        ("x=1 a:x=core", {"a": {"x": ("core",)}, "b": {"x": (1,)}}),
        ("a:T1:x=1", {"a": {"T1:x": (1,)}}),
    ],
)
def test_label_maps_of_all_sites_and_of_one(options: str, maps: dict[str, dict[str, Any]]) -> None:
    made = named_labels(options.split(), "ab")
    assert made == maps
    assert [list(made[site]) for site in made] == [list(maps[site]) for site in made], "the order numbers the labels"


# -------------------------------------------------------------------------------------------------------------- errors


def test_debug_shows_where(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "nnunet_fed"]
    wrong = listen(tmp_path / "nothing.toml")
    plain = subprocess.run([*run, *wrong], capture_output=True, text=True)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("Error: ")
    assert plain.stderr.count("\n") == 1
    shown = subprocess.run([*run, "--debug", *wrong], capture_output=True, text=True)
    assert shown.returncode != 0
    assert "Traceback" in shown.stderr
    assert "ConfigurationError" in shown.stderr
    by_variable = subprocess.run(
        [*run, *wrong], capture_output=True, text=True, env={**os.environ, DEBUG_VARIABLE: "1"}
    )
    assert "Traceback" in by_variable.stderr


def fail_with(error: BaseException) -> Callable[[Path], Federation]:
    def fail(path: Path) -> Federation:
        raise error

    return fail


def test_what_nobody_expected_ends_in_a_line_too(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Federation, "read", fail_with(ZeroDivisionError("division by zero")))
    status, out, err = command(*listen(Path("x")))
    assert (status, out) == (1, "")
    assert err == "Error: ZeroDivisionError: division by zero (nnunet_fed --debug shows where)\n"


def test_an_interrupted_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Federation, "read", fail_with(KeyboardInterrupt()))
    status, out, err = command(*listen(Path("x")))
    assert status == 130
    assert "Traceback" not in out + err
