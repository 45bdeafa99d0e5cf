"""Small cases of online distillation, made of plain numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steadydetr.learning.class_terms import QualityTarget
from steadydetr.learning.criterion import Criterion
from steadydetr.structures import Assignment, Losses, Match, Stages, Targets
from tests.conftest import make_batch

TARGET = (0.5, 0.5, 0.4, 0.4)
QUALITY = Criterion(class_target=QualityTarget(), alpha=None)
COUNTS = [(2, 0, 3), (0, 0), (1,), (5, 4)]


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def whole(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def one_image(scores: list[list[float]], boxes: list[tuple[float, ...]]) -> Stages:
    """Queries of one image at one stage, by their scores."""
    return Stages(tensor(*scores)[None, None].logit(), tensor(*boxes)[None, None])


def match_of(*pairs: tuple[int, int]) -> Match:
    """Pairs of a query and a target of the only image."""
    queries, targets = zip(*pairs, strict=True) if pairs else ((), ())
    return Match(torch.zeros(len(pairs), dtype=torch.int64), whole(*queries), whole(*targets))


def parts(criterion: Criterion, stages: Stages, assignment: Assignment, targets: Targets) -> dict[str, float]:
    losses = Losses()
    criterion.add_losses(losses, "m", stages, assignment, targets, 1.0)
    return {name.removeprefix("m/"): float(value.sum()) for name, value, _ in losses}


def targets_of(counts: tuple[int, ...], classes: int) -> Targets:
    targets = make_batch(counts).targets
    return replace(targets, labels=targets.labels % classes, boxes=targets.boxes.double())
