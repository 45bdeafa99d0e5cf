"""Hungarian-matching logits distillation (DETRDistill 4.1, Eq. 2-4): the teacher's predictions are the student's pseudo-targets.

Student and teacher stages are compared in pairs, and pairs are folded like stages: here F counts stage pairs times images.

Legend: S student stages, T teacher stages, B images, F folded images (stage pair * B + image), G objects, M teacher queries,
N student queries, K slots of an image, C classes, P matched pairs of a slot and a student query.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from steadydetr.equations.distill import grouped_stages, pairwise_boxes, soft_label_cost, soft_label_loss, teacher_stages
from steadydetr.kinds import register
from steadydetr.lazy import nn, torch
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import FORBIDDEN, Problem
from steadydetr.learning.predictions import TeacherOutput
from steadydetr.objectives.base import Matched, Objective, Predicted, require_teacher
from steadydetr.structures import DecodedStages, Losses, MatchResult, take_rows, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector

MOST_SCORED = 100  # positives of an image that are chosen by their score
StageChoice = Literal["progressive", "group", "last"]


@dataclass(frozen=True)
class Slots:
    """The teacher's predictions that are to be matched, with as many slots in every image."""

    query: Tensor  # [F, K]
    valid: Tensor  # [F, K] bool: which slots hold a prediction


@dataclass(frozen=True)
class StagePairs:
    """The predictions of student and teacher, stage beside stage, in float32 or better."""

    stages: list[tuple[int, int]]  # of every pair the stage of the student and that of the teacher
    logits: Tensor  # [F, N, C] of the student
    boxes: Tensor  # [F, N, 4]
    valid: Tensor | None  # [F, N] bool
    scores: Tensor  # [F, M, C] of the teacher
    targets: Tensor  # [F, M, 4] its boxes


class LogitsObjective(Objective):
    """What the paper's and the released form share: chosen predictions of the teacher are matched to the student's and learned.

    The class term is BCE to the teacher's scores, summed over classes; boxes learn by L1 and GIoU; costs and losses weigh the same.
    Student queries without a partner learn nothing here.
    """

    teacher: str
    positive_class: bool
    positive_box: bool
    stages: StageChoice
    weights: Weights
    weight: float

    @property
    def name(self) -> str:
        return "logits"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_teacher(self.name, self.teacher, teachers)

    @abstractmethod
    def slots(self, pairs: StagePairs, context: StepContext) -> dict[str, Slots]:
        """The predictions that are matched: "positive" ones, which learn class and box, and perhaps "negative" ones, the box alone."""

    @abstractmethod
    def normalisers(self, pairs: StagePairs, context: StepContext) -> dict[str, float]:
        """How many positives and negatives of the whole step are matched.

        They are computed from the totals of the step alone, so that they are the same for every rank and micro-batch (D-37).
        """

    def learned_boxes(self, boxes: Tensor) -> Tensor:
        """What the student learns of the teacher's boxes."""
        return boxes

    def problems(self, context: StepContext, stages: Predicted) -> list[Problem]:
        with torch.no_grad(), without_autocast(context.memory.tokens):
            pairs = self.stage_pairs(context, stages["main"])
            return [self.problem(pairs, slots, part, context.criterion) for part, slots in self.slots(pairs, context).items()]

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        with without_autocast(context.memory.tokens):
            pairs = self.stage_pairs(context, stages["main"])
            normalisers = self.normalisers(pairs, context)
            for part, slots in self.slots(pairs, context).items():
                terms = self.terms(part, pairs, slots, matched[f"{self.name}/{part}"], context.criterion)
                for term, (value, weight) in terms.items():
                    losses.add(f"{self.name}/{part}_{term}", value / normalisers[part], self.weight * weight)

    def terms(
        self, part: str, pairs: StagePairs, slots: Slots, matched: MatchResult, criterion: Criterion
    ) -> dict[str, tuple[Tensor, float]]:
        """The sums of every stage, [S] each, with their weights, by name."""
        match, weights = matched.match, self.weights
        ours, theirs = (match.image, match.query), (match.image, slots.query.flatten()[match.target])
        terms = {}
        if part == "positive" and self.positive_class:
            terms["class"] = soft_label_loss(pairs.logits[ours], pairs.scores[theirs]), weights.label
        if part == "negative" or self.positive_box:
            l1, giou = criterion.box_terms(pairs.boxes[ours], pairs.targets[theirs])
            terms |= {"l1": (l1, weights.l1), "giou": (giou, weights.giou)}
        return {name: (by_stage(values, match.image, pairs), weight) for name, (values, weight) in terms.items()}

    def stage_pairs(self, context: StepContext, main: DecodedStages) -> StagePairs:
        """The student's predictions beside those of the teacher's stages that it learns from."""
        student, teacher = main.in_float32(), context.teacher_outputs[self.teacher].stages.in_float32()
        chosen = self.chosen_stages(len(student.logits), len(teacher.logits))

        def fold(tensor: Tensor, whose: int) -> Tensor:
            """[S or T, B, ...] -> [F, ...]."""
            return torch.cat([tensor[pair[whose]] for pair in chosen])

        targets = self.learned_boxes(fold(teacher.boxes, 1))
        valid = None if student.valid is None else fold(student.valid.expand(student.logits.shape[:3]), 0)
        return StagePairs(chosen, fold(student.logits, 0), fold(student.boxes, 0), valid, fold(teacher.logits, 1).sigmoid(), targets)

    def chosen_stages(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """Which stages of the student and of the teacher are compared, of so many each."""
        if self.stages == "group":
            return grouped_stages(student, teacher)
        return list(enumerate([teacher - 1] * student if self.stages == "last" else teacher_stages(student, teacher).tolist()))

    def problem(self, pairs: StagePairs, slots: Slots, part: str, criterion: Criterion) -> Problem:
        """The teacher's predictions in the slots against all queries of the student: L_match of Eq. 2, or without the class of Eq. 3."""
        l1, giou = pairwise_boxes(pairs.boxes, take_rows(pairs.targets, slots.query), criterion.giou_eps, criterion.l1_format)
        cost = self.weights.l1 * l1 - self.weights.giou * giou
        if part == "positive":
            cost = cost + self.weights.label * soft_label_cost(pairs.logits, take_rows(pairs.scores, slots.query))
        allowed = slots.valid[..., None] if pairs.valid is None else slots.valid[..., None] & pairs.valid[:, None]
        images, count = slots.query.shape
        return Problem(torch.where(allowed, cost, FORBIDDEN).flatten(0, 1), (count,) * images, f"{self.name}/{part}")


@register("logits-distillation")
@dataclass(frozen=True)
class LogitsDistillation(LogitsObjective):
    """Defaults: the paper's. Its Table 6 varies the three parts, Table 7 `stages`. `ReleasedLogits` is the released code."""

    teacher: str = "teacher"
    positives: Literal["matched", "score"] = "matched"  # those that the teacher's own match gives to objects, or by their score
    threshold: float = 0.5  # the score of a positive, where `positives` is score
    positive_class: bool = True
    positive_box: bool = True
    negative_box: bool = True
    stages: StageChoice = "progressive"  # group: all teacher stages that cover the same part of the decoder, their mean
    candidates: int | None = 300  # negatives of an image, the best by score, that are matched; None: all  # D-38
    rest: bool = False  # negatives are matched to those queries alone that the positives left
    weights: Weights = Weights(1.0, 5.0, 2.0)
    weight: float = 1.0  # lambda_1

    def slots(self, pairs: StagePairs, context: StepContext) -> dict[str, Slots]:
        best = pairs.scores.amax(-1)
        images, queries = best.shape
        if self.positives == "score":
            chosen = best.topk(min(MOST_SCORED, queries))
            positive, taken = Slots(chosen.indices, chosen.values >= self.threshold), best >= self.threshold
        else:
            positive = matched_slots(context.teacher_outputs[self.teacher], pairs.stages, context.targets.counts)
            taken = torch.zeros(images, queries + 1, dtype=torch.bool, device=best.device)  # the last column is for empty slots
            taken = taken.scatter(1, torch.where(positive.valid, positive.query, queries), True)[:, :-1]
        if not self.negative_box:
            return {"positive": positive}
        left = best.masked_fill(taken, -1).topk(self._candidates(queries))
        return {"positive": positive, "negative": Slots(left.indices, left.values >= 0)}

    def normalisers(self, pairs: StagePairs, context: StepContext) -> dict[str, float]:
        """Of positives one an object. Of negatives as many as are matched, image by image; where scores choose, as many as can be."""
        totals, ours, theirs = context.batch.global_totals, pairs.logits.shape[1], pairs.scores.shape[1]
        counts = totals.object_counts if self.positives == "matched" else (0,) * totals.images
        negatives = sum(self._matched_negatives(objects, ours, theirs) for objects in counts)
        return {"positive": context.normaliser, "negative": float(max(negatives, 1))}

    def problem(self, pairs: StagePairs, slots: Slots, part: str, criterion: Criterion) -> Problem:
        """With `rest` that of the negatives comes after that of the positives."""
        problem = super().problem(pairs, slots, part, criterion)
        return replace(problem, after=f"{self.name}/positive") if part == "negative" and self.rest else problem

    def _matched_negatives(self, objects: int, ours: int, theirs: int) -> int:
        """Of an image with so many objects, for a student and a teacher with so many queries."""
        positives = min(objects, theirs)
        free = ours - min(positives, ours) if self.rest else ours
        return min(self._candidates(theirs), theirs - positives, free)

    def _candidates(self, queries: int) -> int:
        """Slots of an image for negatives."""
        return queries if self.candidates is None else min(self.candidates, queries)


def matched_slots(teacher_output: TeacherOutput, stages: list[tuple[int, int]], counts: tuple[int, ...]) -> Slots:
    """The query that the teacher's match gives every object, one slot an object."""
    queries = teacher_output.matched_queries.at_stages([teacher for _, teacher in stages]).query.T  # [G, stage pairs]
    slots = nn.utils.rnn.pad_sequence(queries.split(counts), batch_first=True, padding_value=-1).permute(2, 0, 1).flatten(0, 1)  # [F, K]
    return Slots(slots.clamp(min=0), slots >= 0)


def by_stage(values: Tensor, image: Tensor, pairs: StagePairs) -> Tensor:
    """The sum at every stage of the student, [P] -> [S]; where a stage learns from several of the teacher's, the mean of their sums."""
    stages, images = [s for s, _ in pairs.stages], len(pairs.logits) // len(pairs.stages)
    share = torch.tensor([1 / stages.count(s) for s in stages], device=values.device, dtype=values.dtype)
    pair = image // images
    stage = torch.tensor(stages, device=values.device)[pair]
    return values.new_zeros(stages[-1] + 1).index_add(0, stage, values * share[pair])
