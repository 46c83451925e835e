"""Dice of several models on the same validation patches: how a site chooses between them (GCML's notes, 1.6)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nnunet_fed.gossip.schedule import Candidate
from nnunet_fed.trainers.parts.checkpoint import drawn_from
from nnunet_fed.trainers.parts.ranks import of_all_ranks
from nnunet_fed.trainers.parts.study_trainer import StudyTrainer


def foreground_dice(
    trainer: StudyTrainer, models: Mapping[Candidate, torch.nn.Module], seed: int
) -> dict[Candidate, float]:
    """Mean foreground Dice of each model, by nnU-Net's own validation step.

    The patches are drawn in this process, a batch for all models at a time, and are the same in every call. nnU-Net's
    own draws go on as if nothing had been drawn here. Every rank of a distributed training calls this, draws patches of
    its own, and has the Dice over the patches of all: nnU-Net's step waits for the other ranks.

    Args:
        trainer: whose validation cases they are of, ``val_iterations_per_epoch`` batches.
        models: left in evaluation mode.
        seed: of the patches; each rank draws from another.

    Returns:
        As nnU-Net's pseudo Dice: over all voxels of all patches, then the mean of the classes or regions that the
        patches or the predictions have; NaN if there is none.
    """
    augmenter, network = trainer.dataloader_val, trainer.network
    loader: Any = getattr(augmenter, "generator", None) or augmenter.data_loader
    counts: dict[Candidate, list[Any]] = {name: [] for name in models}
    try:
        with drawn_from((seed + trainer.local_rank) % 2**32), torch.no_grad():
            for _ in range(trainer.num_val_iterations_per_epoch):
                batch = next(loader)
                for name, model in models.items():
                    trainer.network = model.eval()
                    # nnU-Net's step overwrites ignored voxels of its target
                    found = trainer.validation_step({**batch, "target": copy.deepcopy(batch["target"])})
                    counts[name].append([found[kind] for kind in ("tp_hard", "fp_hard", "fn_hard")])
    finally:
        trainer.network = network
    summed = of_all_ranks({name: np.sum(found, axis=0, dtype=np.float64) for name, found in counts.items()})
    return {name: _mean_dice(sum(of_rank[name] for of_rank in summed)) for name in models}


def _mean_dice(counts: Any) -> float:
    """Of true positives, false positives and false negatives by class: (3, classes)."""
    right, voxels = 2 * counts[0], 2 * counts[0] + counts[1] + counts[2]
    there = voxels > 0
    return float(np.mean(right[there] / voxels[there])) if there.any() else float("nan")
