"""The report in a real browser: nothing goes wrong, nothing sticks out, and every figure is told in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import SITES, amend, fold_of, make_comparison, make_run, write_images

from nnunet_fed.report.page import MOST_BYTES, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LONG = "a-site-with-" + "a-very-long-name-" * 3
"""Nearly as long as a site's name may be."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"there is no browser on the PATH ({', '.join(BROWSERS)}); Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


def with_everything(folder: Path) -> Path:
    """A run that fills every section."""
    run = make_run(folder, {"name": "fedsm", "gamma": 0.9}, (*SITES, LONG), cross_site={LONG: {LONG: 0.5, "a": 0.25}})
    write_images(run)
    selector = {"accuracy": 0.9, "confusion": [[3, 0, 0], [0, 2, 1], [0, 0, 3]], "trusted": True}
    amend(run / "summary.json", selector=selector)
    phase = {"from": LONG, "began": 1, "ended": 2, "kept": "local", "scores": {}}
    moved = [{"event": "received", "peer": LONG, "bytes": 9}]
    path = fold_of(run, "site_a") / "federation.json"
    rounds = json.loads(path.read_text())["rounds"]
    for entry in rounds:
        entry["diagnostics"] = {f"a_figure_of_the_method_{number}": 0.5 for number in range(6)}
    amend(path, mutual_phases=[phase], transfers=moved, rounds=rounds)
    return run


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    made = {"run": with_everything(folder / "run"), "comparison": make_comparison(folder / "comparison")}
    for name, source in made.items():
        write_report(source, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_in_a_browser(browser: Any, reports: dict[str, Path], name: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    page.goto(reports[name].as_uri())
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    sticking_out = """() => [...document.querySelectorAll("main *")]
        .filter(e => !e.closest(".box") || e.classList.contains("box"))
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName)"""
    assert page.evaluate(sticking_out) == []
    asked = "[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 0, i.closest('figure') != null])"
    pictures = page.evaluate(asked)
    assert len(pictures) > 5
    assert all(len(alternative) > 20 and shown and inside for alternative, shown, inside in pictures)
    assert page.evaluate("[...document.querySelectorAll('figure')].every(f => f.querySelector('figcaption').innerText)")
    linked = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))")
    there = page.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)")
    assert linked == there
    expected = {
        "run": {"study", "data", "dice", "training", "cross-site", "method", "traffic", "images", "events"},
        "comparison": {"study", "data", "dice", "training-local-3", "training-fedavg-3"},
    }
    assert expected[name] <= set(there)
    context.close()


def test_a_report_that_would_be_too_large_leaves_out_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run")
    write_images(run)
    write_report(run, tmp_path / "whole.html")
    size = (tmp_path / "whole.html").stat().st_size
    assert size < MOST_BYTES
    monkeypatch.setattr("nnunet_fed.report.page.MOST_BYTES", size - 1)
    write_report(run, tmp_path / "less.html")
    assert 'id="images"' not in (tmp_path / "less.html").read_text(encoding="utf-8")
    assert "The images are left out" in caplog.text
