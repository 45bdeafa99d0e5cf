"""Online distillation as a whole step: against the slow twin, its groups, its teacher, empty batches, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import steadydetr.matching
import steadydetr.method
import steadydetr.scene
from steadydetr.classification import QualityTarget
from steadydetr.criterion import Criterion
from steadydetr.detectors import DetectorConfig, DINOConfig
from steadydetr.matching import Problem
from steadydetr.method import Method
from steadydetr.objectives import (
    AssignmentDistillation,
    AuxiliaryGroups,
    Denoising,
    Detection,
    MatchingDistillation,
    Objective,
    PredictionDistillation,
)
from steadydetr.scene import Scene
from steadydetr.structures import Batch, Group, Losses, Totals
from steadydetr.teachers import Average
from tests.conftest import CLASSES, DETECTORS, make_batch, part_of
from tests.reference import online as slow

FAMILIES = ("refine", "dab", "dino")
ALL: tuple[Objective, ...] = (
    Detection(MatchingDistillation()),
    PredictionDistillation(),
    AuxiliaryGroups(),
    AssignmentDistillation(),
)


def perturb(model: torch.nn.Module, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def make_online(
    config: DetectorConfig, objectives: Sequence[Objective] = ALL, criterion: Criterion | None = None, apart: float = 0.05
) -> Method:
    """In float64 and evaluation mode; the teacher is the student with its weights moved by `apart`. DINO denoises besides."""
    torch.manual_seed(0)
    student = config.build(CLASSES)
    perturb(student, 0.05, 1)
    teacher = Average(student, 0.9)
    perturb(teacher, apart, 2)
    objectives = tuple(objectives)
    if isinstance(config, DINOConfig) and objectives is not None and Detection in map(type, objectives):
        objectives += (Denoising(number=4, box_noise=0.4),)
    return Method(student, criterion or Criterion(class_target=QualityTarget(), alpha=None), objectives, {"ema": teacher}).double().eval()


def wide(batch: Batch, classes: int = CLASSES) -> Batch:
    """In float64."""
    targets = replace(batch.targets, boxes=batch.targets.boxes.double(), labels=batch.targets.labels % classes)
    return replace(batch, images=batch.images.double(), targets=targets)


def learned(method: Method, losses: Losses) -> dict[str, Tensor]:
    """The gradient of every parameter of the student, zeros where none came."""
    names, parameters = zip(*[(n, p) for n, p in method.student.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(losses.total, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, gradients, strict=True)}


def by_stage(losses: Losses, stages: int) -> dict[str, Tensor]:
    """[S] every term, those of auxiliary groups summed over the groups; the proposals have one stage."""
    return {name: v.view(min(stages, len(v)), -1).sum(1) for name, v, _ in losses}


def assert_equals_twin(method: Method, batch: Batch) -> Losses:
    losses = method(batch)
    scene = Scene.of(batch, method.student, method.criterion, method.teaching)
    values = slow.step(method.student, method.teaching["ema"], batch, method.objectives, scene)
    stages = method.student.decoder.stages
    found = by_stage(losses, stages)
    assert values.keys() <= found.keys()
    zero = torch.zeros(stages, dtype=torch.float64)
    for name, value in found.items():
        expected = torch.stack(values[name]) if name in values else zero
        torch.testing.assert_close(value, expected[: len(value)], rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
    expected_gradients = learned_from(method, slow.total(values))
    for name, gradient in learned(method, losses).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-6, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
    return losses


def learned_from(method: Method, total: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*[(n, p) for n, p in method.student.named_parameters() if p.requires_grad], strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, gradients, strict=True)}


@pytest.mark.parametrize("name", [*FAMILIES, "two-stage"])
def test_step_and_its_gradients_equal_the_slow_twin(name: str) -> None:
    """Repeated classes, an image without objects, a padded one; the teacher differs enough to be worth listening to."""
    method = make_online(DETECTORS[name])
    losses = assert_equals_twin(method, wide(make_batch((2, 0, 3)), classes=2))
    assert float(losses.measures["main/same_query_as_teacher"]) < 1
    assert float(losses["prediction/l1"].sum()) > 0


VARIANTS: dict[str, tuple[Objective, ...]] = {
    "twins by rank": (Detection(MatchingDistillation(class_weight=0.51)),),
    "conditional": (Detection(MatchingDistillation(classes="conditional", boxes=False)),),
    "auxiliary own": (AuxiliaryGroups(matching="own"),),
    "auxiliary teacher": (AuxiliaryGroups(matching="teacher"),),
    "auxiliary sum": (AuxiliaryGroups(reduction="sum", distillation=MatchingDistillation(class_weight=0.51)),),
    "without listening": (PredictionDistillation(listen=False),),
    "assignment own": (AssignmentDistillation(matching="own"),),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_slow_twin(variant: str) -> None:
    """Table 6, Table 5 without Listen2stu, the supplement's Teacher Group, and weights of Table 4."""
    assert_equals_twin(make_online(DETECTORS["refine"], VARIANTS[variant]), wide(make_batch((3, 2)), classes=2))
