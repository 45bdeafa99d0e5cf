"""A training step: the same few lines for every method."""

from __future__ import annotations

from torch import nn

from steadydetr.criterion import Criterion
from steadydetr.detectors.base import Detector
from steadydetr.matching import solve
from steadydetr.objectives.base import Objective
from steadydetr.scene import Scene
from steadydetr.structures import Batch, Losses


class Method(nn.Module):
    """Student and objectives over one criterion; what DistributedDataParallel wraps.

    Losses are divided by the objects of the whole step (`batch.totals`), so the gradients of ranks and of accumulated
    micro-batches are to be summed.
    """

    def __init__(self, student: Detector, criterion: Criterion, objectives: tuple[Objective, ...]) -> None:
        super().__init__()
        names = [objective.name for objective in objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"objectives need names of their own, got {names}")
        for objective in objectives:
            objective.check(student)
        self.student, self.criterion, self.objectives = student, criterion, objectives

    def forward(self, batch: Batch) -> Losses:
        scene = Scene.of(batch, self.student)
        groups = [group for objective in self.objectives for group in objective.groups(scene)]
        stages = self.student.decode(scene.memory, groups)
        problems = [problem for o in self.objectives for problem in o.problems(scene, stages, self.criterion)]
        solved = {problem.name: solution for problem, solution in zip(problems, solve(problems), strict=True)}
        losses = Losses()
        for objective in self.objectives:
            objective.add_losses(losses, scene, stages, solved, self.criterion)
        return losses
