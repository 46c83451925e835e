"""Results of another study at a site, to which this one's would go: nnU-Net tells them apart by names only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nnunet_fed.errors import ConfigurationError
from nnunet_fed.planners.dataset import RawDataset
from nnunet_fed.study.federation import PLANS_KEY, STOCK_TRAINER, Federation

_RESULTS = "nnUNet_results"


def require_no_other_results(dataset: RawDataset, planner: Any, study: Federation) -> None:
    """See that no results of these plans' name belong to a study with another base trainer.

    nnU-Net names the folder of the results by the command's trainer and the plans, and both would be the same.

    Args:
        dataset: this site's.
        planner: class of the study's planner.
        study: whose results would go there.

    Raises:
        ConfigurationError: such results are there.
    """
    name, results = study.plans_name or planner.defaults["plans_name"], os.environ.get(_RESULTS)
    if not results:
        return
    for path in sorted((Path(results) / dataset.name).glob(f"*__{name}__*/plans.json")):
        try:
            carried = json.loads(path.read_text(encoding="utf-8")).get(PLANS_KEY, {}).get("study")
        except (OSError, ValueError):  # they are not read here, and whoever predicts with them is told
            continue
        there = None if carried is None else carried.get("trainer", STOCK_TRAINER)
        if there not in (None, study.trainer):
            raise ConfigurationError(
                f"{path.parent} holds results of the study '{carried.get('name')}', whose base trainer is {there}, and "
                f"the study '{study.name}' builds on {study.trainer}: its results would go into the same folder. Set "
                "another 'plans_name' in federation.toml, or move that folder away."
            )
