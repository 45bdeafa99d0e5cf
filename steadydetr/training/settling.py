"""What a recipe leaves open is settled before its run: by timm, by the device and by the data. The run saves what was found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator

from steadydetr.data import Dataset
from steadydetr.detectors import DetectorConfig
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.recipes.base import Recipe
from steadydetr.runs.training_config import TrainingConfig
from steadydetr.training.batch_fit import find_accumulation, find_batch
from steadydetr.training.precision import precision_of


def settle(recipe: Recipe, device: torch.device, before: Recipe | None = None, start: DetectorConfig | None = None) -> Recipe:
    """The recipe with values for what it leaves open, but for the schedule, which needs the data: see `settle_schedule`.

    Args:
        before: that of the run which goes on, whose values are taken wherever the recipe leaves something open.
        start: the detector whose weights the run starts from, which goes on seeing pixels as it did.
    """
    if start is not None:
        recipe = replace(recipe, detector=with_pixels_of(recipe.detector, start))
    if before is not None:
        recipe = as_before(recipe, before)
    training = recipe.training
    if training.precision == "auto":
        training = replace(training, precision=precision_of(device))
    return replace(recipe, detector=recipe.detector.settled(), training=training)


def settle_schedule(recipe: Recipe, train_data: Dataset, accelerator: Accelerator, say: Callable[[str], None]) -> Recipe:
    """The recipe with a batch and micro-batches where these are auto, which is said, and as many steps as its least passes take."""
    training = recipe.training
    if training.batch_size == "auto":
        batch = find_batch(recipe, train_data, accelerator)
        training = with_batch(training, batch)
        say(f"training.batch_size = auto is {batch} on {accelerator.device}, training.lr {training.lr:.3g}")
    if training.accumulation == "auto":
        parts = find_accumulation(replace(recipe, training=training), train_data, accelerator)
        training = replace(training, accumulation=parts)
        if parts > 1:
            say(f"training.accumulation = auto is {parts} on {accelerator.device}: {training.batch_size} images do not fit at once")
    return replace(recipe, training=with_passes(training, len(train_data.index)))


def as_before(recipe: Recipe, before: Recipe) -> Recipe:
    """The recipe with the values of the run that goes on where it leaves them open."""
    training, past = recipe.training, before.training
    if training.precision == "auto":
        training = replace(training, precision=past.precision)
    if training.batch_size == "auto":
        training = replace(training, batch_size=past.batch_size, lr=past.lr, lr_batch_size=past.lr_batch_size)
    return replace(recipe, detector=with_pixels_of(recipe.detector, before.detector), training=training)


def with_pixels_of(detector: DetectorConfig, other: DetectorConfig) -> DetectorConfig:
    """The detector with the mean and deviation of another one of the same backbone, where it leaves them open."""
    backbone, old = getattr(detector, "backbone", None), getattr(other, "backbone", None)
    if isinstance(backbone, TimmBackboneConfig) and isinstance(old, TimmBackboneConfig) and backbone.name == old.name:
        return detector.changed(backbone=replace(backbone, mean=backbone.mean or old.mean, std=backbone.std or old.std))
    return detector


def with_batch(training: TrainingConfig, batch: int) -> TrainingConfig:
    """For a batch that was found: the learning rate goes with the square root of the batch."""
    scale = math.sqrt(batch / training.lr_batch_size) if training.lr_batch_size else 1.0
    return replace(training, batch_size=batch, lr=training.lr * scale)


def with_passes(training: TrainingConfig, images: int) -> TrainingConfig:
    """With so many steps in an epoch that the run goes over the data `passes` times at least."""
    if not training.passes:
        return training
    steps = math.ceil(training.passes * (images // training.images_per_step) / training.epochs)
    return replace(training, epoch_steps=max(training.epoch_steps, steps))
