"""DAB- and DN-DAB-Deformable-DETR as in detrex: lr 1e-4, norms without weight decay."""

from __future__ import annotations

from dataclasses import replace

from steadydetr.detectors import DABDeformableDETRConfig, DNDABDeformableDETRConfig
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.objectives import DNDenoising, SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.schedules import COCO, for_epochs
from steadydetr.runs.training_config import TrainingConfig


@recipe
def dab_deformable_detr_r50_50ep() -> Recipe:
    """steadydetr train dab-deformable-detr-r50-50ep --data COCO."""
    return Recipe(
        name="dab-deformable-detr-r50-50ep",
        detector=DABDeformableDETRConfig(),
        criterion=Criterion(loss_weights=Weights(1.0, 5.0, 2.0), giou_eps=1e-6),
        objectives=(SetPrediction(),),
        data=replace(COCO, filter_empty=True),
        training=TrainingConfig(epochs=50, drop_epochs=(40,), decay_norms=False, seed=42),
        reported="49.0 (detrex model zoo)",
        notes="DAB-Deformable-DETR, one-stage",
    )


@recipe
def dab_deformable_detr_r50_24ep() -> Recipe:
    return for_epochs(dab_deformable_detr_r50_50ep(), 24, "24ep")


@recipe
def dab_deformable_detr_r50_12ep() -> Recipe:
    return for_epochs(dab_deformable_detr_r50_50ep(), 12, "12ep", "44.2 (Stable-DINO Table 5)")


@recipe
def dab_deformable_detr_two_stage_r50_50ep() -> Recipe:
    one_stage = dab_deformable_detr_r50_50ep()
    return replace(
        one_stage,
        name="dab-deformable-detr-two-stage-r50-50ep",
        detector=DABDeformableDETRConfig(two_stage=True),
        reported="49.7 (detrex model zoo)",
        notes="DAB-Deformable-DETR, two-stage",
    )


@recipe
def dn_dab_deformable_detr_r50_50ep() -> Recipe:
    """Five denoising groups, whatever the number of objects."""
    start = dab_deformable_detr_r50_50ep()
    return replace(
        start,
        name="dn-dab-deformable-detr-r50-50ep",
        detector=DNDABDeformableDETRConfig(),
        objectives=(SetPrediction(), DNDenoising()),
        training=replace(start.training, seed=0),
        reported="49.5 (detrex model zoo; OD-DETR Table 1: 49.4)",
        notes="DN-DAB-Deformable-DETR, one-stage",
    )


@recipe
def dn_dab_deformable_detr_r50_12ep() -> Recipe:
    return for_epochs(dn_dab_deformable_detr_r50_50ep(), 12, "12ep")
