"""Scores, figures and tables of a comparison, out of its finished arms, into its folder. Source: ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from nnunet_fed.comparison.arms import POOLED, Comparison
from nnunet_fed.comparison.figures import figures
from nnunet_fed.comparison.pooled_data import CASES, SITE
from nnunet_fed.comparison.tables import markdown
from nnunet_fed.evaluation.case_scores import CaseScore, Origins, scores_of_run, write_csv
from nnunet_fed.files import write_json, write_text


def write_results(
    comparison: Comparison, tolerance: float, left_out: dict[str, str], console: Console
) -> dict[str, Any]:
    """Write ``compare.json``, ``compare.csv`` and ``compare.md``.

    Args:
        comparison: whose arms have finished.
        tolerance: of NSD in mm.
        left_out: sites that are left out, and why.
        console: for the progress.

    Returns:
        The content of ``compare.json``.

    Raises:
        FederationError: a case cannot be scored.
    """
    rows: list[CaseScore] = []
    summaries: dict[str, list[dict[str, Any]]] = {method: [] for method in comparison.methods}
    for method, seed in comparison.arms:
        run = comparison.run_of(method, seed)
        origins = _origins(comparison.out / POOLED) if method == SITE else None
        rows += scores_of_run(run, method, seed, tolerance, console, origins)
        summaries[method].append(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    settings = {**comparison.settings, "methods": list(comparison.methods), "seeds": list(comparison.seeds)}
    content = figures(settings, rows, summaries, tolerance, left_out)
    write_csv(comparison.out / "compare.csv", rows)
    write_text(comparison.out / "compare.md", markdown(content))
    write_json(comparison.out / "compare.json", content)
    return content


def _origins(pooled: Path) -> Origins:
    return {name: (site, case) for name, (site, case) in json.loads((pooled / CASES).read_text("utf-8")).items()}
