"""Conditional DETR as in its own repository (batch 16, lr 1e-4, a tenth of it for the backbone), and DETRDistill on it.

The supplement's 43.19 M and 62.13 M parameters are its trainable ones at COCO's 80 classes. Table 4 of DETRDistill trains for 12 epochs,
with other numbers of encoder and decoder layers: 6-3 has 6 and 3.
"""

from __future__ import annotations

from dataclasses import replace

from steadydetr.detectors import ConditionalDETRConfig
from steadydetr.detectors.configs.conditional import C5
from steadydetr.detectors.configs.deformable import with_transformer
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.objectives import SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.distill import BACKBONES, PAPERS, distilled
from steadydetr.recipes.schedules import COCO, for_epochs
from steadydetr.runs.training_config import TrainingConfig


@recipe
def conditional_detr_r50_50ep() -> Recipe:
    """steadydetr train conditional-detr-r50-50ep --data COCO; about 240 GPU hours on V100 in the original."""
    return Recipe(
        name="conditional-detr-r50-50ep",
        detector=ConditionalDETRConfig(),
        criterion=Criterion(loss_weights=Weights(2.0, 5.0, 2.0)),
        objectives=(SetPrediction(),),
        data=COCO,
        training=TrainingConfig(epochs=50, drop_epochs=(40,), seed=42),
        top=100,
        reported="41.0 (official repository; DETRDistill Table 3: 40.7)",
        notes="Conditional DETR, C5",
    )


@recipe
def conditional_detr_r101_50ep() -> Recipe:
    """The teacher of 50 epochs: steadydetr train conditional-detr-r101-50ep --data COCO."""
    reported = "42.8 (official repository; DETRDistill Table 3: 42.4)"
    start = _with_backbone(conditional_detr_r50_50ep(), "r101")
    return replace(start, name="conditional-detr-r101-50ep", reported=reported, notes="Conditional DETR, C5, with ResNet-101")


@recipe
def conditional_detr_dc5_r50_50ep() -> Recipe:
    """Features of stride 16; batch 8, one image on each of 8 GPUs."""
    return _dilated(conditional_detr_r50_50ep(), "r50", "conditional-detr-dc5-r50-50ep", "43.7 (official repository)")


@recipe
def conditional_detr_dc5_r101_50ep() -> Recipe:
    return _dilated(conditional_detr_r101_50ep(), "r101", "conditional-detr-dc5-r101-50ep", "45.0 (official repository)")


@recipe
def conditional_detr_r50_12ep() -> Recipe:
    """The student alone: 6/6 of DETRDistill's Table 4."""
    return for_epochs(conditional_detr_r50_50ep(), 12, "12ep", "33.0 (DETRDistill Table 4)")


@recipe
def conditional_detr_r101_12ep() -> Recipe:
    """The teacher of 12 epochs."""
    return for_epochs(conditional_detr_r101_50ep(), 12, "12ep", "36.2 (DETRDistill Table 4)")


@recipe
def conditional_detr_6_3_r50_12ep() -> Recipe:
    return _with_layers(conditional_detr_r50_12ep(), 6, 3, "30.3 (DETRDistill Table 4)")


@recipe
def conditional_detr_3_6_r50_12ep() -> Recipe:
    return _with_layers(conditional_detr_r50_12ep(), 3, 6, "33.0 (DETRDistill Table 4)")


@recipe
def conditional_detr_3_3_r50_12ep() -> Recipe:
    return _with_layers(conditional_detr_r50_12ep(), 3, 3, "29.9 (DETRDistill Table 4)")


@recipe
def detrdistill_conditional_detr_r101_r50_50ep() -> Recipe:
    """steadydetr distill detrdistill-conditional-detr-r101-r50-50ep --teacher runs/conditional-detr-r101-50ep --data COCO."""
    return _taught(conditional_detr_r50_50ep(), "42.9 (DETRDistill Table 3)")


@recipe
def detrdistill_conditional_detr_r101_r50_12ep() -> Recipe:
    """steadydetr distill detrdistill-conditional-detr-r101-r50-12ep --teacher runs/conditional-detr-r101-12ep --data COCO."""
    return _taught(conditional_detr_r50_12ep(), "38.1 (DETRDistill Table 4)")


@recipe
def detrdistill_conditional_detr_6_3_r101_r50_12ep() -> Recipe:
    return _taught(conditional_detr_6_3_r50_12ep(), "36.6 (DETRDistill Table 4)")


@recipe
def detrdistill_conditional_detr_3_6_r101_r50_12ep() -> Recipe:
    return _taught(conditional_detr_3_6_r50_12ep(), "37.7 (DETRDistill Table 4)")


@recipe
def detrdistill_conditional_detr_3_3_r101_r50_12ep() -> Recipe:
    return _taught(conditional_detr_3_3_r50_12ep(), "35.7 (DETRDistill Table 4)")


def _with_backbone(recipe: Recipe, backbone: str) -> Recipe:
    return replace(recipe, detector=recipe.detector.changed(backbone=replace(C5, name=BACKBONES[backbone])))


def _dilated(recipe: Recipe, backbone: str, name: str, reported: str) -> Recipe:
    return replace(
        recipe,
        name=name,
        detector=recipe.detector.changed(backbone=replace(C5, name=BACKBONES[backbone], output_stride=16)),
        training=replace(recipe.training, batch_size=8),
        reported=reported,
        notes=recipe.notes.replace("C5", "DC5"),
    )


def _with_layers(recipe: Recipe, encoder: int, decoder: int, reported: str) -> Recipe:
    return replace(
        recipe,
        name=recipe.name.replace("detr-r50", f"detr-{encoder}-{decoder}-r50"),
        detector=with_transformer(recipe.detector, encoder_layers=encoder, decoder_layers=decoder),
        reported=reported,
        notes=f"{recipe.notes}, {encoder} encoder and {decoder} decoder layers",
    )


def _taught(student: Recipe, reported: str) -> Recipe:
    name = f"detrdistill-{student.name.replace('-r50', '-r101-r50')}"
    notes = f"{student.notes}, r50 taught by r101 (DETRDistill)"
    return replace(distilled(student, objectives=PAPERS), name=name, reported=reported, notes=notes)
