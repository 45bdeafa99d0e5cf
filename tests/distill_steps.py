"""What tests of offline distillation share: a student and a teacher with other queries, stages and width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from steadydetr.detectors import AdaMixerConfig, ConditionalDETRConfig, DetectorConfig
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Frozen
from steadydetr.objectives import AssignmentDistillation, LogitsDistillation, Objective, SetPrediction
from steadydetr.objectives.method import Method
from tests import steps
from tests.conftest import CLASSES, DETECTORS, TINY, TINY_PLAIN, own_objectives

assert_close = partial(steps.assert_close, rtol=1e-09, atol=1e-11)
ALL: tuple[Objective, ...] = (SetPrediction(), LogitsDistillation(), AssignmentDistillation())
SIZES = {"width": 24, "heads": 3, "decoder_layers": 3, "encoder_layers": 2}  # what a teacher may differ in, besides its queries
OTHER = {"queries": 9, "transformer": replace(TINY, **SIZES)}


def perturb(model: nn.Module, seed: int) -> None:
    """Random weights; scores around one half, where they start near 0."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
            if name.startswith("decoder.class_heads") and name.endswith("bias"):
                parameter.add_(4 + torch.randn_like(parameter))


def make_distilled(student: DetectorConfig, teacher: DetectorConfig, objectives: Sequence[Objective] = ALL) -> Method:
    """In float64 and evaluation mode, with random weights; what the student's paper trains besides comes with it."""
    torch.manual_seed(0)
    models = [config.build(CLASSES) for config in (student, teacher)]
    for seed, model in enumerate(models):
        perturb(model, seed)
    return Method(models[0], Criterion(), (*objectives, *own_objectives(student)), {"teacher": Frozen(models[1])}).double().eval()


def other(name: str, **changes: Any) -> DetectorConfig:
    """Another width, other numbers of queries and stages, unless `changes` say otherwise."""
    config = DETECTORS[name]
    given = OTHER
    if isinstance(config, ConditionalDETRConfig):
        given = OTHER | {"transformer": replace(TINY_PLAIN, **SIZES)}
    elif isinstance(config, AdaMixerConfig):
        given = {"queries": 9, "width": 24, "heads": 3, "groups": 3, "decoder_layers": 3}
    return replace(config, **(given | changes))


def learned(method: Method) -> dict[str, nn.Parameter]:
    """What is trained in evaluation mode: without the queries of extra groups, which are there in training mode alone."""
    extra = {f"student.{name}" for names in method.student.extra_groups.values() for name in names}
    absent = extra.union(method.unused_parameters)
    parts = [*method.student.named_parameters(prefix="student"), *method.adapters.named_parameters(prefix="adapters")]
    return {name: parameter for name, parameter in parts if parameter.requires_grad and name not in absent}
