"""MaskDINO (Li et al. 2022) as in its own repository: instance masks, large scale jitter, weight decay 0.05, gradients clipped at 0.01."""

from __future__ import annotations

from dataclasses import replace

from steadydetr.data import LargeScaleJitter
from steadydetr.detectors import MaskDINOConfig
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.mask_terms import MaskTerms
from steadydetr.objectives import MaskDenoising, SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.schedules import COCO
from steadydetr.recipes.stable import stable
from steadydetr.runs.training_config import TrainingConfig

MASKDINO_CRITERION = Criterion(cost_weights=Weights(4.0, 5.0, 2.0), loss_weights=Weights(4.0, 5.0, 2.0), giou_eps=1e-6, masks=MaskTerms())


@recipe
def maskdino_r50_50ep() -> Recipe:
    """steadydetr train maskdino-r50-50ep --data COCO; the rate drops after 327,778 and 355,092 of 368,750 steps."""
    return Recipe(
        name="maskdino-r50-50ep",
        detector=MaskDINOConfig(),
        criterion=MASKDINO_CRITERION,
        objectives=(SetPrediction(), MaskDenoising()),
        data=replace(COCO, transform=LargeScaleJitter(), masks=True, filter_empty=True),
        training=TrainingConfig(epochs=50, drop_epochs=(0.8889, 0.963), weight_decay=0.05, decay_norms=False, clip=0.01),
        top=100,
        reported="51.7, masks 46.3 (its repository)",
        notes="MaskDINO, 300 queries, boxes that start from masks",
    )


@recipe
def maskdino_r50_12ep() -> Recipe:
    start = maskdino_r50_50ep()
    training = replace(start.training, epochs=12, drop_epochs=(11,))
    return replace(start, name="maskdino-r50-12ep", training=training, reported="45.7, masks 41.4 (Stable-DINO Table 4)")


@recipe
def stable_maskdino_r50_12ep() -> Recipe:
    """Stable matching of 300 queries, so with targets rescaled to 1; the terms of masks stay as they are (D-195)."""
    return replace(stable(maskdino_r50_12ep(), "one", "47.0, masks 42.1 (Table 4)"), top=100)
