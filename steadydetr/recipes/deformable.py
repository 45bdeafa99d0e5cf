"""Deformable DETR as in its own repository: batch 32, lr 2e-4, a tenth of it for the
backbone, sampling offsets and reference points."""

from __future__ import annotations

from dataclasses import replace

from steadydetr.detectors import DeformableDETRConfig
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.objectives import SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.schedules import COCO, for_epochs
from steadydetr.runs.training_config import TrainingConfig


@recipe
def deformable_detr_r50_50ep() -> Recipe:
    """steadydetr train deformable-detr-r50-50ep --data COCO; 8 x 32 GB, about 325 GPU hours in the paper."""
    return Recipe(
        name="deformable-detr-r50-50ep",
        detector=DeformableDETRConfig(),
        criterion=Criterion(loss_weights=Weights(2.0, 5.0, 2.0)),
        objectives=(SetPrediction(),),
        data=COCO,
        training=TrainingConfig(epochs=50, drop_epochs=(40,), batch_size=32, lr=2e-4, offset_lr_factor=0.1),
        top=100,
        reported="44.5 (official repository; paper 43.8)",
        notes="Deformable DETR, plain",
    )


@recipe
def deformable_detr_r50_24ep() -> Recipe:
    return for_epochs(deformable_detr_r50_50ep(), 24, "24ep")


@recipe
def deformable_detr_r50_12ep() -> Recipe:
    return for_epochs(deformable_detr_r50_50ep(), 12, "12ep")


@recipe
def deformable_detr_refine_r50_50ep() -> Recipe:
    plain = deformable_detr_r50_50ep()
    return replace(
        plain,
        name="deformable-detr-refine-r50-50ep",
        detector=DeformableDETRConfig(refine=True),
        reported="46.2 (official repository; paper 45.4)",
        notes="Deformable DETR with iterative box refinement",
    )


@recipe
def deformable_detr_refine_r50_24ep() -> Recipe:
    return for_epochs(deformable_detr_refine_r50_50ep(), 24, "24ep")


@recipe
def deformable_detr_refine_r50_12ep() -> Recipe:
    return for_epochs(deformable_detr_refine_r50_50ep(), 12, "12ep")


@recipe
def deformable_detr_two_stage_r50_50ep() -> Recipe:
    plain = deformable_detr_r50_50ep()
    return replace(
        plain,
        name="deformable-detr-two-stage-r50-50ep",
        detector=DeformableDETRConfig(refine=True, two_stage=True),
        reported="46.9 (official repository; paper 46.2)",
        notes="Deformable DETR, two-stage with refinement",
    )


@recipe
def deformable_detr_two_stage_r50_24ep() -> Recipe:
    return for_epochs(deformable_detr_two_stage_r50_50ep(), 24, "24ep")


@recipe
def deformable_detr_two_stage_r50_12ep() -> Recipe:
    return for_epochs(deformable_detr_two_stage_r50_50ep(), 12, "12ep")
