"""H-Deformable-DETR (Jia et al. 2023) as in detrex: mixed query selection, look forward twice, no dropout; 1500 further queries.

Learning rates, batch and augmentation are those of all recipes after detrex (D-168).
"""

from __future__ import annotations

from dataclasses import replace

from steadydetr.detectors import HDeformableDETRConfig
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.objectives import OneToMany, SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.schedules import COCO, for_epochs
from steadydetr.runs.training_config import TrainingConfig


@recipe
def h_deformable_detr_r50_12ep() -> Recipe:
    """steadydetr train h-deformable-detr-r50-12ep --data COCO."""
    return Recipe(
        name="h-deformable-detr-r50-12ep",
        detector=HDeformableDETRConfig(),
        criterion=Criterion(loss_weights=Weights(2.0, 5.0, 2.0), giou_eps=1e-6),
        objectives=(SetPrediction(), OneToMany()),
        data=replace(COCO, filter_empty=True),
        training=TrainingConfig(epochs=12, drop_epochs=(11,), decay_norms=False),
        reported="48.7 (H-DETR repository; Stable-DINO Table 5: 48.6)",
        notes="H-Deformable-DETR, two-stage, hybrid matching",
    )


@recipe
def h_deformable_detr_r50_36ep() -> Recipe:
    return for_epochs(h_deformable_detr_r50_12ep(), 36, "36ep", "50.0 (H-DETR repository)")


@recipe
def h_deformable_detr_swin_l_12ep() -> Recipe:
    """Swin-L of ImageNet-22K at 224 px, nothing of it frozen; 900 queries, as the numbers that papers report are of."""
    start = h_deformable_detr_r50_12ep()
    swin = TimmBackboneConfig("swin_large_patch4_window7_224.ms_in22k", (1, 2, 3), frozen_stages=0, drop_path=0.2, output_norm=True)
    return replace(
        start,
        name="h-deformable-detr-swin-l-12ep",
        detector=start.detector.changed(backbone=swin, queries=900),
        reported="56.1 (OD-DETR Table 11)",
        notes="H-Deformable-DETR, two-stage, hybrid matching, Swin-L",
    )


@recipe
def h_deformable_detr_swin_l_36ep() -> Recipe:
    start = for_epochs(h_deformable_detr_swin_l_12ep(), 36, "36ep", "57.6 (OD-DETR Table 11)")
    backbone = replace(start.detector.backbone, drop_path=0.5)  # type: ignore[attr-defined]
    return replace(start, detector=start.detector.changed(backbone=backbone))
