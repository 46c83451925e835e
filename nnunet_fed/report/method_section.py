"""What a method leaves besides the model: FedGS, FedSM, FedOAP and GCML. Symbols are explained in docs/methods.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from nnunet_fed.exchange.keys import last_round
from nnunet_fed.report.blocks import (
    NOTHING,
    Figure,
    Paragraph,
    Section,
    Table,
    count,
    evenly,
    megabytes,
    number,
    significant,
)
from nnunet_fed.report.charts import bars, graph, intervals, lines, matrix
from nnunet_fed.report.gather import Run
from nnunet_fed.study.method_table import MethodTable
from nnunet_fed.study.methods import METHODS

MOST_ROWS = 60
"""Of the table by round and site; of more rounds some are shown."""
Block = Paragraph | Figure | Table

_WORDS = {
    "mean_factor": "mean factor by which a step counts more",
    "scaled_share": "share of the steps that count more",
    "federation_mean_factor": "mean factor of all sites",
    "best_scalar": "factor that fits best between plain and uploaded update",
    "residual": "what that factor leaves of the uploaded update",
    "rho": "SoftPull: weight of the own model",
    "self_weight": "share of the own model in the pull",
    "deviation": "distance of the personal models to their mean",
    "selector_loss": "loss of the selector",
}


def method_section(run: Run) -> Section:
    """Everything that the method of the run tells of itself."""
    section = Section("method", f"What {_title(run)} tells")
    section.blocks.extend(_diagnostics(run))
    section.blocks.extend(_selector(run))
    section.blocks.extend(_phases(run))
    section.blocks.extend(_exchange(run))
    return section


def _title(run: Run) -> str:
    """A method from outside the package goes by its trainer's name, and one of a newer version by its own."""
    if trainer := run.study.get("method", {}).get("trainer"):
        return str(trainer)
    return METHODS[run.method].TITLE if run.method in METHODS else run.method


def _diagnostics(run: Run) -> Iterator[Block]:
    """The figures of each round: FedGS's factors, FedSM's pull."""
    by_name: dict[str, dict[str, dict[int, float]]] = {}
    for site, files in run.sites.items():
        for entry in files.record.get("rounds", []):
            place = last_round(entry["scope"]) + 1
            for name, value in (entry.get("diagnostics") or {}).items():
                by_name.setdefault(name, {}).setdefault(site, {})[place] = value
    for name, by_site in by_name.items():
        caption = f"{name}: {_WORDS[name]}." if name in _WORDS else f"{name}, as the method told it."
        told = list(by_site.values())
        shown = {"all sites": told[0]} if all(values == told[0] for values in told) else by_site
        yield lines(name, shown, "round", caption)
    places = sorted({place for sites in by_name.values() for values in sites.values() for place in values})
    rows = [
        [str(place), site, *(significant(by_name[name].get(site, {}).get(place)) for name in by_name)]
        for place in evenly(places, max(2, MOST_ROWS // max(1, len(run.sites))))
        for site in run.sites
    ]
    if rows:
        yield Table("The method's figures by round and site", ("Round", "Site", *by_name), rows, texts=2)


def _selector(run: Run) -> Iterator[Block]:
    """FedSM: whom the selector takes a case's site for, and which model the super model chose."""
    found: Mapping[str, Any] = run.summary.get("selector") or next(
        (f.record["selector"] for f in run.sites.values() if f.record.get("selector")), {}
    )
    confusion = found.get("confusion")
    sites = sorted(run.site_names)
    if confusion and len(confusion) == len(sites):
        trusted = found.get("trusted")
        said = f"The selector tells the site of {number(found.get('accuracy'), 2)} of all validation cases."
        if trusted is False:
            said += " That is too few: the super model is the global one."
        share = found.get("share_routed_to_global")
        said += "" if share is None else f" It gives {number(share, 2)} of them to the global model."
        yield Paragraph(said)
        labels = ("site of the case", "what the selector says")
        yield matrix(
            "cases", sites, sites, confusion, labels, "Confusion of the selector on all sites' validation cases.", 0
        )
        rows = [[site, *map(str, row)] for site, row in zip(sites, confusion, strict=True)]
        yield Table("Confusion: cases of the site in the row, taken for the site in the column", ("Site", *sites), rows)
    # version 0.1 did not record it
    choices = {site: chosen for site, files in run.sites.items() if (chosen := files.record.get("super_model_choices"))}
    if choices:
        models = sorted({model for chosen in choices.values() for model in chosen})
        groups = {site: {model: float(chosen.get(model, 0)) for model in models} for site, chosen in choices.items()}
        yield bars("validation cases", groups, "Which model the super model chose for each site's validation cases.")
        rows = [[site, *(str(chosen.get(model, 0)) for model in models)] for site, chosen in choices.items()]
        yield Table("Routing: validation cases by site and model", ("Site", *models), rows)


def _phases(run: Run) -> Iterator[Block]:
    """FedOAP, and others that fine-tune: the model after the rounds, and after the fine-tuning at the site."""
    before = METHODS.get(run.method, MethodTable).LAST_MODEL
    dice = {name: site["dice"] for name, site in run.summary.get("sites", {}).items()}
    fine_tuned = run.study.get("method", {}).get("finetune_epochs", 0)
    pairs = {
        name: (models[before], models["final"])
        for name, models in dice.items()
        if models.get(before) is not None and models.get("final") is not None
    }
    if not fine_tuned or not pairs:
        return
    rows = [
        row
        for name, (first, second) in pairs.items()
        for row in ((name, "after the rounds", first, None, None), (name, "after fine-tuning", second, None, None))
    ]
    yield intervals(
        "Dice", rows, f"Both phases: after the rounds, and after {fine_tuned} epochs of fine-tuning at the site."
    )
    table = [[name, number(first), number(second), number(second - first)] for name, (first, second) in pairs.items()]
    yield Table("Dice in both phases", ("Site", "After the rounds", "After fine-tuning", "Gain"), table)


def _exchange(run: Run) -> Iterator[Block]:
    """GCML: whose model went where, what became of it, and what the transfers cost."""
    phases = {site: files.record.get("mutual_phases") or [] for site, files in run.sites.items()}
    transfers = {site: files.record.get("transfers") or [] for site, files in run.sites.items()}
    if not any(transfers.values()) and not any(phases.values()):
        return
    arrived = Counter(
        (str(e["peer"]), site) for site, moved in transfers.items() for e in moved if e["event"] == "received"
    )
    used = Counter((str(phase["from"]), site) for site, done in phases.items() for phase in done)
    nodes = list(dict.fromkeys([*run.sites, *(site for pair in [*arrived, *used] for site in pair)]))
    yield graph(
        "Models that trained beside a site's own",
        nodes,
        used,
        "An arrow goes from the giver to the taker, with the number.",
    )
    rows = [
        [giver, taker, str(arrived[giver, taker]), str(used[giver, taker])]
        for giver, taker in sorted({*arrived, *used})
    ]
    yield Table(
        "Who received what from whom", ("From", "To", "Models that arrived", "Trained beside the own"), rows, texts=2
    )
    events = ("sent", "received", "declined", "refused", "missed")
    rows = [
        [
            site, *(str(sum(entry["event"] == event for entry in moved)) for event in events),
            megabytes(sum(entry.get("bytes") or 0 for entry in moved if entry["event"] == "sent")),
        ]
        for site, moved in transfers.items()
    ]  # fmt: skip
    yield Table("Transfers by site", ("Site", *(event.capitalize() for event in events), "Sent"), rows)
    rows = [
        [
            site, str(phase["from"]), count(phase.get("began")), count(phase.get("ended")),
            str(phase.get("kept", NOTHING)),
            ", ".join(f"{name} {number(score)}" for name, score in (phase.get("scores") or {}).items()) or NOTHING,
        ]
        for site, done in phases.items()
        for phase in done
    ]  # fmt: skip
    if rows:
        head = ("Site", "Model of", "From epoch", "To epoch", "Model that was kept", "Dice by which it was chosen")
        yield Table("Mutual phases", head, rows, texts=6)
