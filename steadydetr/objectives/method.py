"""A training step: the same few lines for every method."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from steadydetr.config import to_plain
from steadydetr.detectors.base import Detector
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Average, Frozen
from steadydetr.learning.matching import solve
from steadydetr.objectives.base import Objective
from steadydetr.structures import Batch, Losses


def check_masks(student: Detector, criterion: Criterion) -> None:
    """Raise ValueError where masks are to be learned and not predicted, or are used and not learned."""
    if criterion.masks is not None and not student.predicts_masks:
        raise ValueError(
            f"criterion.masks needs a detector that predicts masks, as {student.architecture} does not: --criterion.masks none"
        )
    if criterion.masks is None and student.starts_from_masks:
        raise ValueError(
            f"the boxes of {student.architecture} start from its masks, which nothing trains without criterion.masks:"
            " --criterion.masks masks, or --detector.box-init no"
        )


class Method(nn.Module):
    """Student, its teachers and objectives over one criterion; what DistributedDataParallel wraps.

    Losses are divided by the objects of the whole step (`batch.totals`), so the gradients of ranks and of accumulated
    micro-batches are to be summed. Teachers get no gradient and are always in evaluation mode.
    """

    def __init__(
        self,
        student: Detector,
        criterion: Criterion,
        objectives: tuple[Objective, ...],
        teachers: Mapping[str, Frozen[Detector]] | None = None,
        criteria: Mapping[str, Criterion] | None = None,
    ) -> None:
        """
        Args:
            criteria: by which teachers are matched, by their names, where it is not the student's.
        """
        super().__init__()
        names = [objective.name for objective in objectives]
        if len(set(names)) < len(names):
            raise ValueError(f"objectives need names of their own, got {names}")
        self.student, self.criterion, self.objectives = student, criterion, objectives
        self.criteria = dict(criteria or {})
        check_masks(student, criterion)
        self.teachers = nn.ModuleDict(dict(teachers or {}))
        for objective in objectives:
            objective.check(student, self.teaching)
        made = {objective.name: objective.prepare(student, self.teaching) for objective in objectives}
        self.adapters = nn.ModuleDict({name: module for name, module in made.items() if module is not None})

    @property
    def ema(self) -> Average[Detector] | None:
        """The teacher that is the average of the student's weights."""
        return next((teacher for teacher in self.teachers.values() if isinstance(teacher, Average)), None)

    @property
    def teaching(self) -> dict[str, Detector]:
        """The teachers' detectors, by name."""
        return {name: cast("Frozen[Detector]", teacher).model for name, teacher in self.teachers.items()}

    @property
    def active_teachers(self) -> dict[str, Detector]:
        """The teachers that are run in every step, because an objective reads their output."""
        names = {name for objective in self.objectives for name in objective.reads}
        return {name: teacher for name, teacher in self.teaching.items() if name in names}

    @property
    def unused_parameters(self) -> list[str]:
        """The names of those that get no gradient, because no objective uses them."""
        embeds = any(objective.embeds_labels for objective in self.objectives)
        used = {group for objective in self.objectives for group in objective.extra_groups}
        unused = set() if embeds else set(self.student.label_parameters)
        unused |= set() if self.criterion.masks is not None else set(self.student.mask_parameters)
        unused |= {name for group, names in self.student.extra_groups.items() if group not in used for name in names}
        return [f"student.{name}" for name, _ in self.student.named_parameters() if name in unused]

    def check_unused(self) -> None:
        """Raise ValueError where one of them has a gradient, which several processes would not sum."""
        for name in self.unused_parameters:
            if self.get_parameter(name).grad is not None:
                raise ValueError(
                    f"an objective trains {name} without saying so: its class must declare embeds_labels or the group in extra_groups;"
                    " masks are learned with criterion.masks"
                )

    @property
    def fingerprints(self) -> dict[str, str]:
        """By which a resumed run knows that a teacher is the same: its weights and, where it is not the student's, what matches it."""
        own = {name: json.dumps(to_plain(criterion.matcher)) for name, criterion in self.criteria.items()}
        return {name: cast("Frozen[Detector]", teacher).fingerprint + own.get(name, "") for name, teacher in self.teachers.items()}

    def training_state(self) -> dict[str, Tensor]:
        """The weights that training changes. Those of trained teachers are left out, because they have a checkpoint of their own."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(self._frozen)}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `training_state` gave; a ValueError names keys that are missing or left over."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith(self._frozen)]
        if missing or unexpected:
            raise ValueError(f"the training state does not fit the recipe: missing {missing}, left over {unexpected}")

    @property
    def _frozen(self) -> tuple[str, ...]:
        return tuple(f"teachers.{name}." for name, teacher in self.teachers.items() if not isinstance(teacher, Average))

    def forward(self, batch: Batch) -> Losses:
        return self.losses(self.step_context(batch), self.objectives)

    def step_context(self, batch: Batch) -> StepContext:
        """What the objectives of a step read: the outputs of the teachers and the student's memory and queries."""
        return StepContext.of(batch, self.student, self.criterion, self.active_teachers, dict(self.adapters), self.criteria)

    def losses(self, context: StepContext, objectives: Sequence[Objective]) -> Losses:
        """The losses of these objectives, which are all of the method's or, to see what each costs, some of them."""
        groups = [group for objective in objectives for group in objective.query_groups(context)]
        stages = self.student.decode(context.memory, groups)
        problems = [problem for objective in objectives for problem in objective.problems(context, stages)]
        matched = {problem.name: result for problem, result in zip(problems, solve(problems, context.batch), strict=True)}
        losses = Losses()
        for objective in objectives:
            objective.add_losses(losses, context, stages, matched)
        return losses
