"""AdaMixer as in its own repository: batch 16 at 2.5e-5 for everything, the whole gradient clipped at 1, the rate dropped twice."""

from __future__ import annotations

from dataclasses import replace

from steadydetr.data import DetrTransform
from steadydetr.detectors import AdaMixerConfig
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.objectives import SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.distill import BACKBONES, PAPERS, distilled
from steadydetr.recipes.schedules import COCO
from steadydetr.runs.training_config import TrainingConfig


@recipe
def adamixer_r50_100q_12ep() -> Recipe:
    """steadydetr train adamixer-r50-100q-12ep --data COCO; images are flipped and resized to one size."""
    return Recipe(
        name="adamixer-r50-100q-12ep",
        detector=AdaMixerConfig(),
        criterion=Criterion(loss_weights=Weights(2.0, 5.0, 2.0), l1_format="xyxy"),
        objectives=(SetPrediction(),),
        data=replace(COCO, transform=DetrTransform(shortest=(800,), crop=False), filter_empty=True),
        training=TrainingConfig(epochs=12, drop_epochs=(8, 11), lr=2.5e-5, backbone_lr_factor=1.0, clip=1.0, warmup_steps=500),
        top=100,
        reported="42.7 (its repository); 42.3 (DETRDistill Table 3)",
        notes="AdaMixer, 100 queries",
    )


@recipe
def adamixer_r50_300q_12ep() -> Recipe:
    return _with_queries(adamixer_r50_100q_12ep(), 300)


@recipe
def adamixer_r50_300q_36ep() -> Recipe:
    """In three times as many epochs, with DETR's augmentation."""
    start = adamixer_r50_300q_12ep()
    return replace(
        start,
        name="adamixer-r50-300q-36ep",
        data=replace(start.data, transform=DetrTransform()),
        training=replace(start.training, epochs=36, drop_epochs=(24, 33)),
        reported="47.0 (its repository)",
    )


@recipe
def adamixer_r101_100q_12ep() -> Recipe:
    """The teacher: steadydetr train adamixer-r101-100q-12ep --data COCO."""
    start = adamixer_r50_100q_12ep()
    return replace(
        start,
        name="adamixer-r101-100q-12ep",
        detector=AdaMixerConfig(TimmBackboneConfig(BACKBONES["r101"], (1, 2, 3, 4), train_affine=True)),
        reported="43.6 (DETRDistill Table 3)",
        notes=f"{start.notes}, with ResNet-101: DETRDistill's teacher",
    )


@recipe
def detrdistill_adamixer_r101_r50_12ep() -> Recipe:
    """steadydetr distill detrdistill-adamixer-r101-r50-12ep --teacher runs/adamixer-r101-100q-12ep --data COCO."""
    return replace(
        distilled(adamixer_r50_100q_12ep(), objectives=PAPERS),
        name="detrdistill-adamixer-r101-r50-12ep",
        reported="44.7 (DETRDistill Table 3)",
        notes="AdaMixer, 100 queries, r50 taught by r101 (DETRDistill)",
    )


def _with_queries(recipe: Recipe, queries: int) -> Recipe:
    """The recipe with another number of queries; as many detections are kept."""
    name = recipe.name.replace("100q", f"{queries}q")
    notes = recipe.notes.replace("100 queries", f"{queries} queries")
    return replace(recipe, name=name, detector=recipe.detector.changed(queries=queries), top=queries, reported="", notes=notes)
