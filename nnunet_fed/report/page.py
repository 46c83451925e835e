"""The page: its sections, in order, and the file."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from nnunet_fed import __version__
from nnunet_fed.errors import ConfigurationError
from nnunet_fed.files import write_text
from nnunet_fed.report.blocks import Section
from nnunet_fed.report.comparison_section import comparison_section
from nnunet_fed.report.gather import Comparison, Run, read_source
from nnunet_fed.report.method_section import method_section
from nnunet_fed.report.results_section import cross_site_section, dice_section
from nnunet_fed.report.slices_section import slices_section
from nnunet_fed.report.study_section import comparison_study_section, data_section, study_section
from nnunet_fed.report.training_section import curves_section, events_section, traffic_section

logger = logging.getLogger(__name__)

TEMPLATE = "templates/report.html"
MOST_BYTES = 5_000_000


def write_report(source: Path, out: Path) -> None:
    """Write the report of a run, a comparison or a record.

    Args:
        source: see :func:`nnunet_fed.report.gather.read_source`.
        out: the HTML file; an existing one is replaced once the new one is complete.

    Raises:
        ConfigurationError: the source is none of these, or the file cannot be written.
    """
    read = read_source(source)
    sections = sections_of(read, source)
    page = render(read, sections)
    if len(page.encode()) > MOST_BYTES:
        logger.warning("The images are left out, since the report would be larger than %d MB.", MOST_BYTES // 10**6)
        page = render(read, [section for section in sections if not section.id.startswith("images")])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except OSError as error:
        raise ConfigurationError(f"{out} cannot be written: {error}. Name another file with --out.") from None


def sections_of(read: Run | Comparison, source: Path) -> list[Section]:
    """The sections that have something to say.

    Args:
        read: what was read.
        source: from where; images are looked for there.
    """
    sections = _of_run(read, source) if isinstance(read, Run) else _of_comparison(read, source)
    return [section for section in sections if section.blocks]


def _of_run(run: Run, folder: Path) -> list[Section]:
    return [
        study_section(run),
        data_section(run),
        dice_section(run),
        curves_section(run),
        cross_site_section(run.name, run.cross_site),
        method_section(run),
        traffic_section(run),
        slices_section(run, folder),
        events_section(run),
    ]


def _of_comparison(comparison: Comparison, folder: Path) -> list[Section]:
    """What all methods share stands once, what each has of its own for the first seed of each."""
    described = comparison.planned or next(iter(comparison.runs), None)
    largest = max(comparison.runs, key=lambda run: len(run.sites), default=None)
    data = next(
        (run for run in (described, largest) if run is not None and any(f.plans for f in run.sites.values())), None
    )
    sections = [comparison_study_section(comparison)]
    if data is not None:
        alike = [run for run in comparison.runs if len(run.sites) >= len(data.sites)]  # pooled training is one site
        with_lesions = next((run for run in alike if any(files.lesions for files in run.sites.values())), data)
        sections.append(data_section(with_lesions))
    sections.append(comparison_section(comparison))
    for run in comparison.runs:
        parts = [
            curves_section(run),
            cross_site_section(run.name, run.cross_site),
            method_section(run),
            traffic_section(run),
            slices_section(run, folder / "runs" / run.name),
        ]
        sections += [Section(f"{part.id}-{run.name}", f"{run.name}: {part.title}", part.blocks) for part in parts]
    return sections


def render(read: Run | Comparison, sections: list[Section]) -> str:
    """The page as HTML; whatever a name or a text holds is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = (resources.files("nnunet_fed") / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        name=read.name,
        sections=sections,
        version=__version__,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
