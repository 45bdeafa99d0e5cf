"""The moving averages of the student's weights: the one that teaches and the one that is evaluated."""

from __future__ import annotations

import copy

from torch import nn

from steadydetr.detectors import Detector
from steadydetr.learning.frozen import Average
from steadydetr.learning.teachers import relative_decay
from steadydetr.objectives.method import Method
from steadydetr.recipes.base import Recipe
from steadydetr.training.optimiser import first_drop


class Averages:
    """The average that teaches and the one that is evaluated. Stop Update (OD-DETR) freezes the first from some step on, never the second.

    As long as both have the same values they are one object, which costs half the memory and time.
    """

    def __init__(
        self, evaluated: Average[Detector] | None, teacher: Average[Detector] | None = None, freeze_step: int | None = None
    ) -> None:
        """
        Args:
            evaluated: what is evaluated and saved beside the trained weights; the teacher itself where the two are the same.
            teacher: the method's average that teaches.
            freeze_step: the first step after which the teacher is not updated any more; None: it always is.
        """
        self.evaluated, self.teacher, self.freeze_step = evaluated, teacher, freeze_step

    def update(self, student: nn.Module, step: int) -> None:
        """Take in the student's weights after the optimiser's step number `step`, counted from 0."""
        frozen = self.freeze_step is not None and step >= self.freeze_step
        if frozen:
            self.separate()
        if self.teacher is not None and not frozen:
            self.teacher.update(student)
        if self.evaluated is not None and self.evaluated is not self.teacher:
            self.evaluated.update(student)

    def separate(self) -> None:
        """From now on the two averages are two objects: the evaluated one becomes a copy, if it was the teacher itself."""
        if self.evaluated is not None and self.evaluated is self.teacher:
            self.evaluated = copy.deepcopy(self.teacher)


def make_averages(recipe: Recipe, method: Method, steps_per_epoch: int) -> Averages:
    """The averages that a recipe asks for: of `training.ema_decay`, of its EMA teacher, of both or none."""
    decay, teacher = recipe.training.ema_decay, method.ema
    if decay is None:
        decay = relative_decay(steps_per_epoch * recipe.training.epochs)
    evaluated = Average(method.student, decay) if decay else teacher
    stops = any(config.stop_update for config in recipe.teachers)
    return Averages(evaluated, teacher, first_drop(steps_per_epoch, recipe.training) if stops else None)
