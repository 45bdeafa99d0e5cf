"""What all objectives of a step look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from steadydetr.detectors.base import Detector
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import solve
from steadydetr.learning.teachers import TeacherOutput
from steadydetr.structures import Batch, Memory, Queries, QueryGroup, Stages, Targets


@dataclass(frozen=True)
class StepContext:
    """One batch seen by the student: its memory, its own queries, for two-stage detectors the supervised proposals; and by teachers."""

    batch: Batch
    student: Detector
    memory: Memory
    queries: dict[str, Queries]
    proposals: Stages | None
    teacher_outputs: dict[str, TeacherOutput]  # by the teachers' names
    adapters: Mapping[str, nn.Module]  # what objectives train besides the student, by their names
    teachers: Mapping[str, Detector]  # that were run

    @staticmethod
    def of(
        batch: Batch,
        student: Detector,
        criterion: Criterion,
        teachers: Mapping[str, Detector],
        adapters: Mapping[str, nn.Module] | None = None,
    ) -> StepContext:
        """Teachers first: the fetch of all their assignment problems waits for them while the device goes on with the student's encoder."""
        views = [_view(batch, teacher) for teacher in teachers.values()]
        problems = [criterion.problem(stages, batch.targets, name) for name, (*_, stages) in zip(teachers, views, strict=True)]
        memory = student.encode(batch.images, batch.padding)
        queries = student.queries(memory)
        proposals = student.proposals(memory, queries["main"])
        teacher_outputs = {name: TeacherOutput(*view, solved) for name, view, solved in zip(teachers, views, solve(problems), strict=True)}
        return StepContext(batch, student, memory, queries, proposals, teacher_outputs, adapters or {}, teachers)

    @property
    def targets(self) -> Targets:
        return self.batch.targets

    @property
    def normaliser(self) -> float:
        """Objects of the whole step, over ranks and accumulated micro-batches, at least 1."""
        return self.batch.global_totals.normaliser


@torch.no_grad()
def _view(batch: Batch, teacher: Detector) -> tuple[Memory, Queries, Stages]:
    memory = teacher.encode(batch.images, batch.padding)
    queries = teacher.queries(memory)["main"]
    return memory, queries, teacher.decode(memory, [QueryGroup("main", queries)])["main"]
