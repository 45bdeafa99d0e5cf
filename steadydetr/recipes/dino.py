"""DINO as in its own repository: lr 1e-4, backbone 1e-5, denoising of 100 objects with box noise 1.0."""

from __future__ import annotations

from dataclasses import replace

from steadydetr.detectors import DINOConfig
from steadydetr.detectors.configs.deformable import DINO_TRANSFORMER, with_transformer
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.objectives import Denoising, SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.schedules import COCO, as_detrex_trains, for_epochs
from steadydetr.runs.training_config import TrainingConfig


@recipe
def dino_4scale_r50_12ep() -> Recipe:
    """steadydetr train dino-4scale-r50-12ep --data COCO."""
    return Recipe(
        name="dino-4scale-r50-12ep",
        detector=DINOConfig(),
        criterion=Criterion(loss_weights=Weights(1.0, 5.0, 2.0), giou_eps=1e-6),
        objectives=(SetPrediction(), Denoising()),
        data=COCO,
        training=TrainingConfig(epochs=12, drop_epochs=(11,)),
        reported="49.0 (DINO Table 1)",
        notes="DINO, 4 scales",
    )


@recipe
def dino_4scale_r50_24ep() -> Recipe:
    return for_epochs(dino_4scale_r50_12ep(), 24, "24ep", "50.4 (DINO Table 2)")


@recipe
def dino_4scale_r50_36ep() -> Recipe:
    return for_epochs(dino_4scale_r50_12ep(), 36, "36ep", "50.9 (DINO Table 2)")


@recipe
def dino_5scale_r50_12ep() -> Recipe:
    four = dino_4scale_r50_12ep()
    return replace(
        four,
        name="dino-5scale-r50-12ep",
        detector=DINOConfig(TimmBackboneConfig(out_indices=(1, 2, 3, 4)), replace(DINO_TRANSFORMER, levels=5)),
        reported="49.4 (DINO Table 1)",
        notes="DINO, 5 scales, from stride 4",
    )


@recipe
def dino_4scale_swin_l_12ep() -> Recipe:
    """Swin-L of ImageNet-22K at 384 px, nothing of it frozen."""
    four = dino_4scale_r50_12ep()
    swin = TimmBackboneConfig(
        "swin_large_patch4_window12_384.ms_in22k", out_indices=(1, 2, 3), frozen_stages=0, drop_path=0.2, output_norm=True
    )
    return replace(
        four,
        name="dino-4scale-swin-l-12ep",
        detector=DINOConfig(swin),
        reported="56.8 (DINO repository)",
        notes="DINO, 4 scales, Swin-L",
    )


@recipe
def dino_4scale_swin_l_24ep() -> Recipe:
    return for_epochs(dino_4scale_swin_l_12ep(), 24, "24ep")


@recipe
def dino_4scale_swin_l_36ep() -> Recipe:
    return for_epochs(dino_4scale_swin_l_12ep(), 36, "36ep", "58.0 (DINO repository)")


def detrex_dino(recipe: Recipe) -> Recipe:
    """DINO as detrex has it: a pair of heads for every stage, no spare row of labels, its sine positions of 12 epochs, its training."""
    detector = with_transformer(recipe.detector, temperature=10000.0, position_offset=-0.5).changed(share_heads=False, spare_label=False)
    return as_detrex_trains(replace(recipe, detector=detector))
