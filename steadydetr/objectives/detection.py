"""The detection loss of DETR: one-to-one matching of the main queries at every stage, and of the encoder's proposals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from steadydetr.criterion import Criterion
from steadydetr.matching import Problem
from steadydetr.objectives.base import Objective
from steadydetr.scene import Scene
from steadydetr.structures import Assignment, Group, Losses, Solved, Stages, Targets


@dataclass(frozen=True)
class Detection(Objective):
    """Owner of the group "main" and of the proposals."""

    @property
    def name(self) -> str:
        return "main"

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
        match = solved["main"].match
        criterion.add_losses(losses, "main", stages["main"], Assignment((match,), match), scene.targets, scene.normaliser)
        if scene.proposals is not None:
            match = solved["proposals"].match
            targets = proposal_targets(scene)
            criterion.add_losses(losses, "proposals", scene.proposals, Assignment((match,), match), targets, scene.normaliser)


def proposal_targets(scene: Scene) -> Targets:
    """The targets of the proposals: without their classes where the detector's proposals know none (reference-facts 26)."""
    targets = scene.targets
    return replace(targets, labels=torch.zeros_like(targets.labels)) if scene.student.class_agnostic_proposals else targets
