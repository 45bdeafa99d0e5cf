"""Every recipe, at a size that takes a step at once: all parameters that are trained get a finite gradient.

One that gets none is never trained, and on several processes DistributedDataParallel waits for it.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from steadydetr.detectors import AdaMixerConfig, DetectorConfig, MaskDINOConfig
from steadydetr.learning.frozen import Frozen
from steadydetr.objectives.method import Method
from steadydetr.recipes import find, names
from steadydetr.recipes.base import Recipe
from tests.conftest import BACKBONE, CLASSES, make_batch

SMALL = {"width": 16, "heads": 2, "ffn": 16, "encoder_layers": 2, "decoder_layers": 3, "norm_groups": 4, "dropout": 0.0}
SMALL |= {"encoder_points": 2, "decoder_points": 2}


def shrunk(detector: DetectorConfig) -> DetectorConfig:
    """The same structure in small."""
    if isinstance(detector, AdaMixerConfig):
        return replace(_shrunk(detector), backbone=BACKBONE, queries=20, groups=2, in_points=4, out_points=6, levels=3)
    backbone = replace(BACKBONE, fine_map=isinstance(detector, MaskDINOConfig))
    return detector.changed(backbone=backbone, transformer=_shrunk(detector.transformer), queries=20)  # type: ignore[attr-defined]


def _shrunk(config: Any) -> Any:
    """With the small sizes that it has."""
    return replace(config, **{field.name: SMALL[field.name] for field in fields(config) if field.name in SMALL})


def make_method(recipe: Recipe) -> Method:
    """The method of the recipe, shrunk; a trained teacher has random weights."""
    torch.manual_seed(0)
    student = shrunk(recipe.detector).build(CLASSES)
    teachers = {
        teacher.name: Frozen(shrunk(recipe.detector).build(CLASSES)) if teacher.trained_before else teacher.build(student, CLASSES, 100)
        for teacher in recipe.teachers
    }
    criterion = recipe.criterion
    if criterion.masks is not None:
        criterion = replace(criterion, masks=replace(criterion.masks, points=64))
    return Method(student, criterion, recipe.objectives, teachers)


def check_gradients(recipe: Recipe) -> None:
    method = make_method(recipe)
    method(make_batch((2, 0, 3), masks=recipe.criterion.masks is not None)).total.backward()
    trained = {name: parameter for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == method.unused_parameters
    assert not [name for name, parameter in trained.items() if parameter.grad is not None and not parameter.grad.isfinite().all()]


@pytest.mark.parametrize("name", names())
def test_every_parameter_gets_a_gradient(name: str) -> None:
    check_gradients(find(name))


VARIANTS = sorted({(name, objective.name) for name in names() for objective in find(name).objectives if len(find(name).objectives) > 1})


@pytest.mark.parametrize(("name", "left_out"), [(name, left_out) for name, left_out in VARIANTS if left_out != "main"])
def test_without_one_of_its_objectives(name: str, left_out: str) -> None:
    """`--objectives.NAME none`."""
    recipe = find(name)
    check_gradients(replace(recipe, objectives=tuple(part for part in recipe.objectives if part.name != left_out)))


@pytest.mark.parametrize("fusion", ["none", "simple", "dense"])
@pytest.mark.parametrize("share_decoder", [False, True])
@pytest.mark.parametrize("name", ["small-dino", "small-deformable-detr", "small-refine-deformable-detr", "dab-deformable-detr-r50-50ep"])
def test_other_transformers(name: str, share_decoder: bool, fusion: str) -> None:
    recipe = find(name)
    transformer = replace(recipe.detector.transformer, share_decoder=share_decoder, fusion=fusion)  # type: ignore[attr-defined]
    check_gradients(replace(recipe, detector=recipe.detector.changed(transformer=transformer)))
