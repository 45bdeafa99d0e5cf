"""What a detector predicts for a batch, and which query its matcher gives every object: encode, queries, decode, match."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

from steadydetr.lazy import torch
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import Problem, solve
from steadydetr.structures import (
    Batch,
    DecodedStages,
    MatchedQueries,
    MatchResult,
    Memory,
    Queries,
    QueryGroup,
    Stages,
    Targets,
    take_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector

Counterparts = Literal["token", "rank"]


@dataclass(frozen=True)
class Predictions:
    """A batch as a detector sees it, without gradients."""

    memory: Memory
    queries: Queries  # the main ones
    stages: DecodedStages


@dataclass(frozen=True)
class MatchedPredictions(Predictions):
    """The same, matched with the objects at every stage by the detector's own criterion."""

    matched: MatchResult
    matched_queries: MatchedQueries  # [S, G] the match as the query of every object
    proposal_queries: MatchedQueries | None = None  # [1, G] those of the encoder's proposals, of `match_batch` with two-stage detectors

    @classmethod
    def of(cls, found: Predictions, matched: MatchResult, targets: Targets, proposal_queries: MatchedQueries | None = None) -> Self:
        """The predictions with the solution of their assignment problem."""
        queries = MatchedQueries.of(matched.match, targets, len(found.stages.logits))
        return cls(found.memory, found.queries, found.stages, matched, queries, proposal_queries)


@dataclass(frozen=True)
class TeacherOutput(MatchedPredictions):
    """The predictions of a teacher in a training step. Its stages are T and its queries M of the legend."""

    def counterparts(self, student: Queries, by: Counterparts) -> Tensor:
        """[B, M] the student's query that is the counterpart of each of the teacher's, -1: it has none.

        Queries of two-stage detectors are counterparts where both come from the same encoder token, or by rank; learned ones by number
        (D-28).
        """
        images, count = self.queries.content.shape[:2]
        student_count = student.content.shape[1]
        device = self.queries.content.device
        if by == "rank" or student.token is None or self.queries.token is None:
            number = torch.arange(count, device=device)
            return torch.where(number < student_count, number, -1).expand(images, -1)
        query_of_token = torch.full(self.memory.tokens.shape[:2], -1, device=device)
        query_of_token.scatter_(1, student.token, torch.arange(student_count, device=device).expand(images, -1))
        return query_of_token.gather(1, self.queries.token)


def predict(detector: Detector, batch: Batch) -> Predictions:
    """One pass of the detector's main queries, in the mode that the detector is in."""
    with torch.no_grad():
        memory = detector.encode(batch.images, batch.padding)
        queries = detector.queries(memory)["main"]
        return Predictions(memory, queries, detector.decode(memory, [QueryGroup("main", queries)])["main"])


def match_batch(detector: Detector, criterion: Criterion, batch: Batch) -> MatchedPredictions:
    """The detector's predictions in evaluation mode, matched at every stage; with a two-stage detector its proposals are matched too."""
    from steadydetr.detectors.base import evaluating

    with torch.no_grad(), evaluating(detector):
        found, targets = predict(detector, batch), batch.seeded_targets
        proposals = detector.proposals(found.memory, found.queries)
    problems = [criterion.problem(found.stages, targets, "main")]
    if proposals is not None:
        problems.append(_proposal_problem(proposals, found.queries, detector, criterion, targets))
    matched, *others = solve(problems, batch)
    return MatchedPredictions.of(found, matched, targets, MatchedQueries.of(others[0].match, targets, 1) if others else None)


def _proposal_problem(proposals: Stages, queries: Queries, detector: Detector, criterion: Criterion, targets: Targets) -> Problem:
    """Of those proposals that became queries, even if the detector supervises others too."""
    if queries.token is not None and proposals.logits.shape[2] != queries.content.shape[1]:
        logits, boxes = (take_rows(tensor, queries.token[None]) for tensor in (proposals.logits, proposals.boxes))
        masks = proposals.masks and replace(proposals.masks, queries=take_rows(proposals.masks.queries, queries.token[None]))
        proposals = Stages(logits, boxes, masks=masks)
    return criterion.problem(proposals, proposal_targets(detector, targets), "proposals")


def proposal_targets(detector: Detector, targets: Targets) -> Targets:
    """The targets of the encoder's proposals: all of class 0 where they only tell objects from background (F-16)."""
    return replace(targets, labels=torch.zeros_like(targets.labels)) if detector.class_agnostic_proposals else targets
