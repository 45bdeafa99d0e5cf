"""Feature distillation from teachers that differ in detector, width, levels or sizes of maps; what is refused; rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadydetr.cli.training_arguments import read_training_arguments
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.objectives import FeatureDistillation, Objective, ReleasedFeatures
from steadydetr.objectives.released_features import MOST_PAIRS
from tests.conftest import CLASSES, DETECTORS, make_batch
from tests.feature_steps import BY_LEVEL, TEACHER, WIDE, context_of, make, own_value
from tests.steps import wide
from tests.test_features import expected


@pytest.mark.parametrize("name", list(DETECTORS))
def test_any_detector_learns_from_any(name: str) -> None:
    """Another architecture, width, number of queries and of stages."""
    teacher = replace(DETECTORS["dino"], transformer=replace(WIDE, decoder_layers=3), queries=20)
    method = make(FeatureDistillation(), DETECTORS[name], teacher)
    assert own_value(method(wide(make_batch((2, 1))))) > 0


def test_levels_of_the_same_stride_are_compared() -> None:
    """A teacher with levels 8 to 64 and a student with 8 to 32: as if the coarsest were not there."""
    four = replace(TEACHER, transformer=replace(WIDE, levels=4))
    method = make(FeatureDistillation(mask="ones"), teacher=four)
    batch = wide(make_batch((2, 1)))
    context = context_of(method, batch)
    assert len(context.teacher_outputs["teacher"].memory.levels) == 4 and len(context.memory.levels) == 3
    cut = sum(h * w for h, w in context.memory.levels)
    teacher_output = context.teacher_outputs["teacher"]
    memory = replace(teacher_output.memory, tokens=teacher_output.memory.tokens[:, :cut])
    context.teacher_outputs["teacher"] = replace(teacher_output, memory=memory)
    found = float(method(batch)["features/error"].detach().sum())
    with torch.no_grad():
        assert found == pytest.approx(expected(FeatureDistillation(mask="ones"), method, context, torch_twin=False), rel=1e-9)


class Stride(nn.Module):
    """A detector's strides and the sizes of its maps, without weights."""

    image_channels = 3

    def __init__(self, *strides: int, width: int = 16, rounds: Callable[[float], int] = math.ceil) -> None:
        super().__init__()
        self.strides, self.width, self.rounds = strides, width, rounds
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def encode(self, images: Tensor, padding: Tensor) -> Any:
        assert images.shape[-2:] == padding.shape[-2:]
        return SimpleNamespace(levels=tuple(tuple(self.rounds(n / s) for n in images.shape[-2:]) for s in self.strides))


def first_layer_up(cells: float) -> int:
    """As floor, but not where a side is one pixel short of a multiple of 8, which the first layer has rounded up."""
    return math.floor(cells + 1 / 8)


@pytest.mark.parametrize("objective", [FeatureDistillation(), ReleasedFeatures(), *BY_LEVEL.values()], ids=lambda o: o.name)
def test_maps_that_would_differ_in_size_are_refused(objective: Objective) -> None:
    """Whatever the image: which side it is on, and from which layer on. Only levels that both have count."""
    up, down = Stride(8, 16, 32), Stride(8, 32, 64, rounds=math.floor)
    said = r"maps of other sizes.* of 129 x 127 pixels at stride 8: \(17, 16\) and \(16, 15\); stride 32: \(5, 4\) and \(4, 3\)\)"
    with pytest.raises(ValueError, match=f"{said}.*--objectives.{objective.name} none"):
        objective.check(up, {"teacher": down})  # type: ignore[arg-type, dict-item]
    with pytest.raises(ValueError, match=r"stride 8: \(2, 1\) and \(2, 2\)"):
        objective.check(Stride(8, rounds=math.floor), {"teacher": Stride(8, rounds=first_layer_up)})  # type: ignore[arg-type, dict-item]
    objective.check(down, {"teacher": Stride(8, 16, 32, rounds=math.floor)})  # type: ignore[arg-type, dict-item]


def test_a_backbone_that_rounds_down_is_refused_beside_one_that_rounds_up() -> None:
    """ConvNeXt's patches, at every level; two of its kind teach each other."""
    patches = replace(TEACHER, backbone=TimmBackboneConfig("convnext_atto", (1, 2, 3), "none", frozen_stages=0))
    with pytest.raises(ValueError, match=r"stride 8: \(9, 8\) and \(8, 7\); stride 16: \(5, 4\) and \(4, 3\); stride 32: \(3, 2\) and"):
        make(FeatureDistillation(), teacher=patches)
    make(FeatureDistillation(), student=patches, teacher=patches)


def test_the_look_at_sizes_leaves_no_trace() -> None:
    """Neither in running statistics nor in random numbers."""
    student, teacher = DETECTORS["dino"].build(CLASSES), TEACHER.build(CLASSES).eval()
    before, state = {name: tensor.clone() for name, tensor in student.state_dict().items()}, torch.get_rng_state()
    FeatureDistillation().check(student, {"teacher": teacher})
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in student.modules()) and not any(module.training for module in teacher.modules())


def test_pairs_that_cannot_work_are_refused_with_the_reason() -> None:
    objective = FeatureDistillation()
    with pytest.raises(ValueError, match=r"strides are \[32\] and those of 'teacher' \[8, 16\]"):
        objective.check(Stride(32), {"teacher": Stride(8, 16)})  # type: ignore[arg-type, dict-item]
    with pytest.raises(ValueError, match="called 'teacher', but the recipe has none"):
        objective.check(Stride(32), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the student has 16, the teacher 24"):
        ReleasedFeatures().check(Stride(8), {"teacher": Stride(8, width=24)})  # type: ignore[arg-type, dict-item]


def test_every_row_of_the_tables_is_one_override() -> None:
    for words, objective in (
        ("--objectives.features.mask mean", FeatureDistillation(mask="mean")),
        ("--objectives.features.mask ones", FeatureDistillation(mask="ones")),
        ("--objectives.features.similarity cosine", FeatureDistillation(similarity="cosine")),
        ("--objectives.features released-features", ReleasedFeatures()),
    ):
        recipe, _ = read_training_arguments("small-dino", ["--objectives.features", "feature-distillation", *words.split()])
        assert objective in recipe.objectives
    for name, objective in BY_LEVEL.items():
        assert objective in read_training_arguments("small-dino", [f"--objectives.{name}", name])[0].objectives


def test_defaults_are_the_papers() -> None:
    method = make(FeatureDistillation())
    losses = {name: weight for name, _, weight in method(wide(make_batch((1,))))}
    assert losses["features/error"] == 20 and MOST_PAIRS == 100 and FeatureDistillation().gamma == 0.5
    phi = method.adapters["features"]
    assert isinstance(phi, nn.Linear) and (phi.in_features, phi.out_features) == (16, 24)
