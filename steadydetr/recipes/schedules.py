"""What the recipes of the papers share: COCO as data, schedules with the learning rate x 0.1 once, near the end, and how detrex trains."""

from __future__ import annotations

from dataclasses import replace

from steadydetr.data import DataConfig
from steadydetr.recipes.base import Recipe

COCO = DataConfig(source="coco")  # COCO 2017 in the folder coco; --data names another place
DROPS = {12: 11, 24: 20, 36: 30, 50: 40}  # epochs -> the epoch at which the rate drops


def for_epochs(recipe: Recipe, epochs: int, suffix: str, reported: str = "", drop: int | None = None) -> Recipe:
    """The recipe under another length; `suffix` replaces the last part of its name."""
    training = replace(recipe.training, epochs=epochs, drop_epochs=(drop or DROPS[epochs],))
    name = f"{recipe.name.rpartition('-')[0]}-{suffix}"
    return replace(recipe, name=name, training=training, reported=reported)


def as_detrex_trains(recipe: Recipe) -> Recipe:
    """Batch 16 at lr 1e-4, the same for sampling offsets; norms are not decayed, images without objects left out; eps in GIoU."""
    return replace(
        recipe,
        criterion=replace(recipe.criterion, giou_eps=1e-6),
        data=replace(recipe.data, filter_empty=True),
        training=replace(recipe.training, batch_size=16, lr=1e-4, offset_lr_factor=1.0, decay_norms=False),
    )
