"""What all objectives of a step read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from steadydetr.lazy import nn
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import solve
from steadydetr.learning.predictions import TeacherOutput, predict
from steadydetr.structures import Batch, Memory, Queries, Stages, Targets

if TYPE_CHECKING:
    from steadydetr.detectors.base import Detector


@dataclass(frozen=True)
class StepContext:
    """One batch with the student's memory and queries and with the outputs of the teachers."""

    batch: Batch
    student: Detector
    criterion: Criterion
    memory: Memory
    queries: dict[str, Queries]  # the student's own, "main" and perhaps others
    proposals: Stages | None  # the encoder's predictions that are supervised, of two-stage detectors
    teacher_outputs: dict[str, TeacherOutput]  # by the teachers' names
    adapters: Mapping[str, nn.Module]  # what objectives train besides the student, by their names
    teachers: Mapping[str, Detector]  # those that were run, by name
    kept: dict[str, Any] = field(default_factory=dict)  # what objectives made with their query groups and need again, by their names

    @staticmethod
    def of(
        batch: Batch,
        student: Detector,
        criterion: Criterion,
        teachers: Mapping[str, Detector],
        adapters: Mapping[str, nn.Module] | None = None,
        criteria: Mapping[str, Criterion] | None = None,
    ) -> StepContext:
        """Run the teachers and the student's encoder.

        A teacher is matched by its own criterion, that of `criteria`; one that is not there by the student's.
        The teachers' assignment problems are solved last: a GPU works on the student's encoder while the host waits for their costs.
        """
        predictions = {name: predict(teacher, batch) for name, teacher in teachers.items()}
        own = {name: criterion for name in predictions} | dict(criteria or {})
        problems = [own[name].problem(found.stages, batch.seeded_targets, name) for name, found in predictions.items()]
        memory = student.encode(batch.images, batch.padding)
        queries = student.queries(memory)
        proposals = student.proposals(memory, queries["main"])
        solved = zip(predictions.items(), solve(problems, batch), strict=True)
        outputs = {name: TeacherOutput.of(found, matched, batch.targets) for (name, found), matched in solved}
        return StepContext(batch, student, criterion, memory, queries, proposals, outputs, adapters or {}, teachers)

    @cached_property
    def targets(self) -> Targets:
        return self.batch.seeded_targets

    @property
    def normaliser(self) -> float:
        """Objects of the whole step, over ranks and accumulated micro-batches, at least 1."""
        return self.batch.global_totals.normaliser
