"""What tests of feature distillation share: a student and a teacher of another width, and the parts of their losses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steadydetr.detectors import DetectorConfig
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Frozen
from steadydetr.objectives import FGD, FGFI, FKD, MGD, FeatureDistillation, Objective, ReleasedFeatures, SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Losses
from tests import steps
from tests.conftest import CLASSES, DETECTORS, TINY

assert_close = partial(steps.assert_close, rtol=1e-09, atol=1e-12)
WIDE = replace(TINY, width=24, heads=3)
TEACHER = replace(DETECTORS["refine"], transformer=WIDE, queries=9)  # another width and number of queries
VARIANTS: dict[str, FeatureDistillation] = {
    "paper": FeatureDistillation(),
    "mean": FeatureDistillation(mask="mean"),
    "ones": FeatureDistillation(mask="ones"),
    "cosine": FeatureDistillation(similarity="cosine"),
    "inputs": FeatureDistillation(source="inputs"),
    "initial": FeatureDistillation(queries="initial"),
    "every": FeatureDistillation(queries="every"),
    "best": FeatureDistillation(quality="best", gamma=0.7),
}


def make(
    objective: Objective, student: DetectorConfig = DETECTORS["deformable"], teacher: DetectorConfig = TEACHER, apart: float = 0.05
) -> Method:
    """In float64; the adapters are moved away from where they start."""
    torch.manual_seed(0)
    models = [config.build(CLASSES) for config in (student, teacher)]
    method = Method(models[0], Criterion(), (SetPrediction(), objective), {"teacher": Frozen(models[1])})
    with torch.no_grad():
        for parameter in [*method.teachers.parameters(), *method.adapters.parameters()]:
            parameter.add_(torch.randn_like(parameter) * apart)
    return method.double().eval()


def context_of(method: Method, batch: Batch) -> StepContext:
    return StepContext.of(batch, method.student, method.criterion, method.teaching, dict(method.adapters))


def own_total(losses: Losses, prefix: str = "features") -> Tensor:
    return torch.stack([values.sum() * weight for name, values, weight in losses if name.startswith(f"{prefix}/")]).sum()


def own_value(losses: Losses, prefix: str = "features") -> float:
    return float(own_total(losses, prefix).detach())


SAME_WIDTH = replace(TEACHER, transformer=TINY)
EVERY: dict[str, Any] = {**VARIANTS, "released": ReleasedFeatures()}
EVERY |= {"fgd": FGD(), "fgd without attention": FGD(focal=False), "mgd": MGD(), "fkd": FKD(), "fgfi": FGFI()}
BY_LEVEL: dict[str, Objective] = {"fgd": FGD(), "mgd": MGD(), "fkd": FKD(), "fgfi": FGFI()}
