"""What all objectives of a step look at."""

from __future__ import annotations

from dataclasses import dataclass

from steadydetr.detectors.base import Detector
from steadydetr.structures import Batch, Memory, Queries, Stages, Targets


@dataclass(frozen=True)
class Scene:
    """One batch seen by the student: its memory, its own queries and, for two-stage detectors, the supervised proposals."""

    batch: Batch
    student: Detector
    memory: Memory
    queries: dict[str, Queries]
    proposals: Stages | None

    @staticmethod
    def of(batch: Batch, student: Detector) -> Scene:
        memory = student.encode(batch.images, batch.padding)
        queries = student.queries(memory)
        return Scene(batch, student, memory, queries, student.proposals(memory, queries["main"]))

    @property
    def targets(self) -> Targets:
        return self.batch.targets

    @property
    def normaliser(self) -> float:
        """Objects of the whole step, over ranks and accumulated micro-batches, at least 1."""
        return self.batch.global_totals.normaliser
