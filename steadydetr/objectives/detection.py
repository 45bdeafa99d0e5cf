"""The detection loss of DETR: one-to-one matching of the main queries at every stage, and of the encoder's proposals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from steadydetr.criterion import Criterion
from steadydetr.detectors.base import Detector
from steadydetr.matching import Problem, query_of_targets
from steadydetr.objectives.base import Objective, require_alike
from steadydetr.objectives.matching_distillation import MatchingDistillation, taught_queries
from steadydetr.scene import Scene
from steadydetr.structures import Assignment, Group, Losses, Solved, Stages, Targets


@dataclass(frozen=True)
class Detection(Objective):
    """Owner of the group "main" and of the proposals."""

    guide: MatchingDistillation | None = None  # a teacher whose match is learned beside the student's own

    @property
    def name(self) -> str:
        return "main"

    @property
    def learns_from(self) -> tuple[str, ...]:
        return () if self.guide is None else (self.guide.teacher,)

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        if self.guide is not None:
            require_alike(self.name, self.guide.teacher, student, teachers, ("architecture", "stages"))

    def groups(self, scene: Scene) -> list[Group]:
        return [Group("main", scene.queries["main"])]

    def problems(self, scene: Scene, stages: Mapping[str, Stages], criterion: Criterion) -> list[Problem]:
        problems = [criterion.problem(stages["main"], scene.targets, "main")]
        if scene.proposals is not None:
            problems.append(criterion.problem(scene.proposals, proposal_targets(scene), "proposals"))
        return problems

    def add_losses(
        self, losses: Losses, scene: Scene, stages: Mapping[str, Stages], solved: Mapping[str, Solved], criterion: Criterion
    ) -> None:
        criterion.add_losses(
            losses, "main", stages["main"], self._assign(losses, scene, stages["main"], solved["main"]), scene.targets, scene.normaliser
        )
        if scene.proposals is not None:
            match = solved["proposals"].match
            targets = proposal_targets(scene)
            criterion.add_losses(losses, "proposals", scene.proposals, Assignment((match,), match), targets, scene.normaliser)

    def _assign(self, losses: Losses, scene: Scene, stages: Stages, solved: Solved) -> Assignment:
        if self.guide is None:
            return Assignment((solved.match,), solved.match)
        taught = taught_queries(scene.lessons[self.guide.teacher], scene, self.guide.twins)
        own, rows = query_of_targets(solved.match, len(taught)), max(len(taught), 1)
        losses.measure("main/same_query_as_teacher", ((taught == own) & (own >= 0)).sum() / rows)
        losses.measure("main/without_twin", (taught < 0).sum() / rows)
        return self.guide.assign(solved, taught, stages, scene.targets)


def proposal_targets(scene: Scene) -> Targets:
    """The targets of the proposals: without their classes where the detector's proposals know none (F-16)."""
    targets = scene.targets
    return replace(targets, labels=torch.zeros_like(targets.labels)) if scene.student.class_agnostic_proposals else targets
