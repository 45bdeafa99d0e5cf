"""Group-DETR (Chen et al. 2023) on DINO: 11 groups of queries in training."""

from __future__ import annotations

from dataclasses import replace

from steadydetr.learning.criterion import Weights
from steadydetr.objectives import DenoisingObjective, GroupMatching
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.dino import dino_4scale_r50_36ep


def grouped(recipe: Recipe, groups: int, name: str, reported: str = "") -> Recipe:
    """The recipe with so many groups. Denoising weighs as many times more, so as much as the mean of the groups (D-170)."""
    of = recipe.criterion.loss_weights
    weights = Weights(of.label * groups, of.l1 * groups, of.giou * groups)
    objectives = tuple(each.weighed(weights) if isinstance(each, DenoisingObjective) else each for each in recipe.objectives)
    return replace(
        recipe,
        name=name,
        objectives=(*objectives, GroupMatching(groups)),
        reported=reported,
        notes=f"{recipe.notes}, with {groups} groups of queries",
    )


@recipe
def group_dino_4scale_r50_36ep() -> Recipe:
    """steadydetr train group-dino-4scale-r50-36ep --data COCO."""
    return grouped(dino_4scale_r50_36ep(), 11, "group-dino-4scale-r50-36ep", "51.3 (OD-DETR Table 1)")
