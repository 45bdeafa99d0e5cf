"""Align-DETR (Cai et al. 2023): the IoU-aware BCE loss with prime-sample weights, and mixed matching.

k = 2, tau = 1.5, the share of the score 0.25, class weight 1 (F-95, F-96); the rest is what the detectors have.
"""

from __future__ import annotations

from dataclasses import replace

from steadydetr.learning.class_terms import AlignTarget
from steadydetr.learning.matching import MixedMatching
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.deformable import deformable_detr_refine_r50_50ep
from steadydetr.recipes.dino import detrex_dino, dino_4scale_r50_12ep
from steadydetr.recipes.schedules import for_epochs


def align(recipe: Recipe, reported: str, name: str = "") -> Recipe:
    """The recipe with the loss and the matching of Align-DETR."""
    criterion = replace(
        recipe.criterion,
        class_target=AlignTarget(),
        alpha=None,
        loss_weights=replace(recipe.criterion.loss_weights, label=1.0),
        matching=MixedMatching(),
    )
    return replace(
        recipe,
        name=name or f"align-{recipe.name}",
        criterion=criterion,
        reported=reported,
        notes=f"{recipe.notes}, with the loss and mixed matching of Align-DETR",
    )


@recipe
def align_dino_4scale_r50_12ep() -> Recipe:
    """steadydetr train align-dino-4scale-r50-12ep --data COCO."""
    return align(detrex_dino(dino_4scale_r50_12ep()), "50.2 (OD-DETR Table 1; released weights 50.3)", "align-dino-4scale-r50-12ep")


@recipe
def align_dino_4scale_r50_24ep() -> Recipe:
    """Unlike detrex's DINO of 24 epochs it keeps the sine positions of 12 (F-98)."""
    return for_epochs(align_dino_4scale_r50_12ep(), 24, "24ep", "51.3 (OD-DETR Table 1; released weights 51.4)")


@recipe
def align_deformable_detr_r50_50ep() -> Recipe:
    """With refinement, beside which OD-DETR's Table 1 has Align-DETR; nothing is released for it (D-180)."""
    start = deformable_detr_refine_r50_50ep()
    return align(start, "46.0 (OD-DETR Table 1; by its abstract of DAB-DETR)", "align-deformable-detr-r50-50ep")
