"""Query-prior assignment distillation (DETRDistill 3.4, Eq. 9): the teacher's queries as an extra group with the teacher's assignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from steadydetr.criterion import Criterion
from steadydetr.detectors.base import Detector
from steadydetr.equations.distill import teacher_stages
from steadydetr.matching import Problem, query_of_targets
from steadydetr.objectives.base import Objective, require_teacher
from steadydetr.objectives.matching_distillation import pick
from steadydetr.scene import Scene
from steadydetr.structures import Assignment, Group, Losses, Solved, Stages


@dataclass(frozen=True)
class AssignmentDistillation(Objective):
    """Default: Teacher Assigned. `own` is the Teacher Group of the supplement's Table 4, which is matched anew."""

    teacher: str = "teacher"
    matching: Literal["teacher", "own"] = "teacher"

    @property
    def name(self) -> str:
        return "assignment"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_teacher(self.name, self.teacher, teachers)

    def groups(self, scene: Scene) -> list[Group]:
        return [Group(self.name, scene.lessons[self.teacher].queries)]

    def problems(self, scene: Scene, stages: Mapping[str, Stages], criterion: Criterion) -> list[Problem]:
        return [criterion.problem(stages[self.name], scene.targets, self.name)] if self.matching == "own" else []

    def add_losses(
        self, losses: Losses, scene: Scene, stages: Mapping[str, Stages], solved: Mapping[str, Solved], criterion: Criterion
    ) -> None:
        predicted, lesson = stages[self.name], scene.lessons[self.teacher]
        if self.matching == "own":
            match = solved[self.name].match
        else:
            rows = query_of_targets(lesson.solved.match, len(lesson.solved.cost)).view(len(lesson.stages.logits), -1)
            query = rows[teacher_stages(len(predicted.logits), len(rows)).to(rows.device)].flatten()
            match = pick(scene.targets.repeat_batch(len(predicted.logits)).image, query, query >= 0)
        criterion.add_losses(losses, self.name, predicted, Assignment((match,), match), scene.targets, scene.normaliser)
