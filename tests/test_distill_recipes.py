"""Any recipe can learn from a trained teacher: what `distilled` adds to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steadydetr.learning.teachers import EMATeacher, TrainedTeacher
from steadydetr.objectives import (
    FGD,
    FGFI,
    FKD,
    MGD,
    AssignmentDistillation,
    FeatureDistillation,
    LogitsDistillation,
    MatchingDistillation,
    Objective,
    SetPrediction,
    TeacherInit,
)
from steadydetr.recipes import find
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.distill import distilled


def recipe_of(objectives: tuple[Objective, ...], **changes: Any) -> Recipe:
    return replace(find("small-dino"), objectives=objectives, **changes)


def test_any_recipe_can_be_distilled() -> None:
    """One that learns nothing from a trained teacher gets all objectives; one that does keeps its own, and takes another teacher."""
    start = find("small-dino")
    made = distilled(start, "runs/big")
    assert {o.name for o in made.objectives} >= {"main", "denoising", "logits", "assignment"}
    assert (made.name, made.teachers, made.detector) == ("distilled-small-dino", (TrainedTeacher("runs/big"),), start.detector)
    assert distilled(made, "runs/bigger") == replace(made, teachers=(TrainedTeacher("runs/bigger"),))
    assert distilled(made) == made
    online = distilled(find("small-od-dino"), "runs/big")
    assert online.teachers == (EMATeacher(), TrainedTeacher("runs/big"))
    average = recipe_of((SetPrediction(), AssignmentDistillation("ema")), teachers=(EMATeacher(),))
    assert distilled(average).objectives[:2] == average.objectives and len(distilled(average).objectives) > 2


@pytest.mark.parametrize("learning", [LogitsDistillation(), TeacherInit(), FeatureDistillation(), FGD(), MGD(), FKD(), FGFI()])
def test_a_recipe_that_learns_from_the_teacher_keeps_its_objectives(learning: Objective) -> None:
    start = recipe_of((SetPrediction(), learning))
    assert distilled(start, "runs/big") == replace(start, teachers=(TrainedTeacher("runs/big"),))


def test_a_matched_teacher_is_a_teacher_too() -> None:
    start = recipe_of((SetPrediction(MatchingDistillation(teacher="teacher")),))
    assert distilled(start, "runs/big").objectives == start.objectives
