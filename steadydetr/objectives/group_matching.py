"""Group-DETR (Chen et al. 2023): several groups of queries, each matched one to one by itself; all but the detector's own are dropped.

A group's stage is to the criterion one more stage: S * (groups - 1) stages in all, group after group. A group of a two-stage detector has
proposals of its own, which are supervised like the detector's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from steadydetr.config import check_within
from steadydetr.kinds import register
from steadydetr.lazy import nn, torch
from steadydetr.learning.context import StepContext
from steadydetr.learning.matching import Problem
from steadydetr.learning.predictions import proposal_targets
from steadydetr.objectives.base import Matched, Objective, Predicted, require_further_queries
from steadydetr.structures import Assignment, Losses, MaskPredictions, QueryGroup, Stages, Targets

if TYPE_CHECKING:
    from steadydetr.detectors.base import Detector


@register("group-matching")
@dataclass(frozen=True)
class GroupMatching(Objective):
    """Defaults: the paper's. What the further groups are made of is trained beside the detector and not part of it."""

    groups: int = 11  # with the detector's own queries, which the objective main matches

    def __post_init__(self) -> None:
        check_within("objectives.groups", self, groups=(2, 1000))

    @property
    def name(self) -> str:
        return "groups"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_further_queries(self.name, student)

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.ModuleList:
        return nn.ModuleList(student.new_queries() for _ in range(self.groups - 1))

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        """Groups that do not see each other, so that attention is computed within each alone."""
        made = [context.student.further_queries(context.memory, group) for group in cast(nn.ModuleList, context.adapters[self.name])]
        context.kept[self.name] = fold([proposals for _, proposals in made if proposals is not None])
        return [QueryGroup(name, queries) for name, (queries, _) in zip(self._names, made, strict=True)]

    @property
    def _names(self) -> list[str]:
        return [f"{self.name}/{number}" for number in range(2, self.groups + 1)]

    def _predictions(self, context: StepContext, stages: Predicted) -> dict[str, tuple[Stages, Targets]]:
        """All groups' stages and, of two-stage detectors, their proposals, with what they learn."""
        found = {self.name: (cast(Stages, fold([stages[name] for name in self._names])), context.targets)}
        proposals = cast("Stages | None", context.kept[self.name])
        if proposals is not None:
            found[f"{self.name}/proposals"] = proposals, proposal_targets(context.student, context.targets)
        return found

    def problems(self, context: StepContext, stages: Predicted) -> list[Problem]:
        found = self._predictions(context, stages)
        return [context.criterion.problem(predicted, targets, name) for name, (predicted, targets) in found.items()]

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        """Every group weighs as much as the detector's own queries."""  # D-170
        for name, (predicted, targets) in self._predictions(context, stages).items():
            context.criterion.add_losses(losses, name, predicted, Assignment.of(matched[name].match), targets, context.normaliser)


def fold(groups: Sequence[Stages]) -> Stages | None:
    """The stages of all groups, [G * S, B, N], one group after the other; None for no group."""
    if not groups:
        return None
    valid = groups[0].valid
    if valid is not None:
        valid = torch.cat([cast("torch.Tensor", group.valid).expand(group.logits.shape[:3]) for group in groups])
    masks = MaskPredictions.stack([group.masks for group in groups])
    return Stages(torch.cat([group.logits for group in groups]), torch.cat([group.boxes for group in groups]), valid, masks)
