"""Hungarian-matching logits distillation (DETRDistill 4.1, Eq. 2-4): the teacher's predictions are the student's pseudo-targets.

Legend: S student stages, T teacher stages, Q pairs of a student's stage with the teacher's that it learns from, B images,
G objects, M teacher queries, N student queries, K slots of an image, C classes, P matched pairs; folded: pair of stages * B + image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steadydetr.boxes import to_cxcywh, to_xyxy
from steadydetr.detectors.base import Detector
from steadydetr.equations.detection import box_terms
from steadydetr.equations.distill import grouped_stages, pairwise_boxes, soft_label_cost, soft_label_loss, teacher_stages
from steadydetr.kinds import register
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import FORBIDDEN, Problem
from steadydetr.learning.teachers import TeacherOutput
from steadydetr.objectives.base import Objective, require_teacher
from steadydetr.structures import Losses, MatchResult, Stages

MOST_SCORED = 100  # positives of an image that are chosen by their score


@dataclass(frozen=True)
class Slots:
    """The teacher's predictions that are matched, with room for the same number in every image."""

    query: Tensor  # [Q*B, K]
    valid: Tensor  # [Q*B, K] bool: does a prediction stand there


@dataclass(frozen=True)
class View:
    """Student and teacher, stage beside stage, in float32 or better."""

    pairs: list[tuple[int, int]]  # [Q] a stage of the student, one of the teacher
    logits: Tensor  # [Q*B, N, C] of the student
    boxes: Tensor  # [Q*B, N, 4]
    valid: Tensor | None  # [Q*B, N] bool
    scores: Tensor  # [Q*B, M, C] of the teacher
    targets: Tensor  # [Q*B, M, 4] its boxes


@register("logits-distillation")
@dataclass(frozen=True)
class LogitsDistillation(Objective):
    """Defaults: the paper's. Its Table 6 varies the three parts, Table 7 `stages`.

    The class term is BCE to the teacher's scores, summed over classes; boxes learn by L1 and GIoU; costs and losses weigh the same.
    Student queries without a partner learn nothing here.
    """

    teacher: str = "teacher"
    positives: Literal["matched", "score"] = "matched"  # those that the teacher's own match with the targets holds, or by their score
    threshold: float = 0.5  # the score of a positive, where `positives` is score
    positive_class: bool = True
    positive_box: bool = True
    negative_box: bool = True
    stages: Literal["progressive", "group", "last"] = "progressive"  # group: all teacher stages that fall to a student's, their mean
    candidates: int | None = 300  # negatives of an image, the best by score, that are matched; None: all  # D-38
    rest: bool = False  # negatives are matched to those queries alone that the positives left
    weights: Weights = Weights(1.0, 5.0, 2.0)
    weight: float = 1.0  # lambda_1
    as_released: bool = False  # every prediction of the teacher is positive, its boxes cut off at the image  # D-36

    def __post_init__(self) -> None:
        fixed = ("positives", "threshold", "negative_box", "candidates", "rest")
        if self.as_released and any(getattr(self, name) != getattr(LogitsDistillation, name) for name in fixed):
            raise ValueError(
                "objective logits: as_released has every prediction of the teacher for a positive and no negatives, which fixes"
                f" {', '.join(fixed)}: leave them as they are"
            )

    @property
    def name(self) -> str:
        return "logits"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        require_teacher(self.name, self.teacher, teachers)

    def problems(self, context: StepContext, stages: Mapping[str, Stages], criterion: Criterion) -> list[Problem]:
        with torch.no_grad(), torch.autocast(context.memory.tokens.device.type, enabled=False):
            view = self._view(context, stages["main"])
            positive, negative = self._slots(context, view)
            problems = [self._problem(view, positive, "positive", criterion)]
            if negative is not None:
                problems.append(self._problem(view, negative, "negative", criterion))
        return problems

    def add_losses(
        self, losses: Losses, context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion
    ) -> None:
        with torch.autocast(context.memory.tokens.device.type, enabled=False):
            view = self._view(context, stages["main"])
            positive, negative = self._slots(context, view)
            self._add(losses, "positive", view, positive, solved, self._positives(context, view), criterion)
            if negative is not None:
                self._add(losses, "negative", view, negative, solved, self._negatives(context, view), criterion)

    def _add(
        self,
        losses: Losses,
        part: str,
        view: View,
        slots: Slots,
        solved: Mapping[str, MatchResult],
        normaliser: float,
        criterion: Criterion,
    ) -> None:
        match = solved[f"{self.name}/{part}"].match
        ours, theirs = (match.image, match.query), (match.image, slots.query.flatten()[match.target])
        terms = {}
        if part == "positive" and self.positive_class:
            terms["class"] = soft_label_loss(view.logits[ours], view.scores[theirs])
        if part == "negative" or self.positive_box:
            terms["l1"], terms["giou"], _ = box_terms(view.boxes[ours], view.targets[theirs], criterion.giou_eps)
        for term, values in terms.items():
            weight = self.weight * getattr(self.weights, "label" if term == "class" else term)
            losses.add(f"{self.name}/{part}_{term}", by_stage(values, match.image, view) / normaliser, weight)

    def _view(self, context: StepContext, main: Stages) -> View:
        student, teacher = main.in_float32(), context.teacher_outputs[self.teacher].stages.in_float32()
        pairs = self._pairs(len(student.logits), len(teacher.logits))

        def fold(tensor: Tensor, whose: int) -> Tensor:
            """[S or T, B, ...] -> [Q*B, ...]."""
            return torch.cat([tensor[pair[whose]] for pair in pairs])

        targets = fold(teacher.boxes, 1)
        if self.as_released:
            targets = to_cxcywh(to_xyxy(targets).clamp(0, 1))
        valid = None if student.valid is None else fold(student.valid.expand(student.logits.shape[:3]), 0)
        return View(pairs, fold(student.logits, 0), fold(student.boxes, 0), valid, fold(teacher.logits, 1).sigmoid(), targets)

    def _pairs(self, student: int, teacher: int) -> list[tuple[int, int]]:
        if self.stages == "group":
            return grouped_stages(student, teacher)
        return list(enumerate([teacher - 1] * student if self.stages == "last" else teacher_stages(student, teacher).tolist()))

    def _slots(self, context: StepContext, view: View) -> tuple[Slots, Slots | None]:
        """The positives, and the negatives where they are to learn."""
        best = view.scores.amax(-1)
        images, queries = best.shape
        if self.as_released:
            every = torch.arange(queries, device=best.device).expand_as(best)
            return Slots(every, torch.ones_like(every, dtype=torch.bool)), None
        if self.positives == "score":
            chosen = best.topk(min(MOST_SCORED, queries))
            positive, held = Slots(chosen.indices, chosen.values >= self.threshold), best >= self.threshold
        else:
            positive = matched_slots(context.teacher_outputs[self.teacher], view.pairs, context.targets.counts)
            held = torch.zeros(images, queries + 1, dtype=torch.bool, device=best.device)  # the last column takes empty slots
            held = held.scatter(1, torch.where(positive.valid, positive.query, queries), True)[:, :-1]
        if not self.negative_box:
            return positive, None
        left = best.masked_fill(held, -1).topk(self._room(view))
        return positive, Slots(left.indices, left.values >= 0)

    def _room(self, view: View) -> int:
        """Slots of an image for negatives."""
        queries = view.scores.shape[1]
        return queries if self.candidates is None else min(self.candidates, queries)

    def _problem(self, view: View, slots: Slots, part: str, criterion: Criterion) -> Problem:
        """The teacher's predictions in the slots against all queries of the student: L_match of Eq. 2, or without the class of Eq. 3."""
        l1, giou = pairwise_boxes(view.boxes, take(view.targets, slots.query), criterion.giou_eps)
        cost = self.weights.l1 * l1 - self.weights.giou * giou
        if part == "positive":
            cost = cost + self.weights.label * soft_label_cost(view.logits, take(view.scores, slots.query))
        allowed = slots.valid[..., None] if view.valid is None else slots.valid[..., None] & view.valid[:, None]
        images, room = slots.query.shape
        after = f"{self.name}/positive" if part == "negative" and self.rest else None
        return Problem(torch.where(allowed, cost, FORBIDDEN).flatten(0, 1), (room,) * images, f"{self.name}/{part}", after)

    # Normalisers come from the totals of the step alone, so that they are the same for every rank and micro-batch.  # D-37

    def _positives(self, context: StepContext, view: View) -> float:
        """How many positives of the whole step are matched: one an object, or as many as there are queries on both sides."""
        if not self.as_released:
            return context.normaliser
        return float(context.batch.global_totals.images * min(view.logits.shape[1], view.scores.shape[1]))

    def _negatives(self, context: StepContext, view: View) -> float:
        """How many negatives of the whole step are matched: as many as there is room for, or as the positives leave."""
        totals, ours, theirs = context.batch.global_totals, view.logits.shape[1], view.scores.shape[1]
        room = totals.images * min(self._room(view), ours)
        if self.positives == "score":
            return float(room)
        return float(max(min(room, totals.images * (min(ours, theirs) if self.rest else theirs) - totals.objects), 1))


def matched_slots(teacher_output: TeacherOutput, pairs: list[tuple[int, int]], counts: tuple[int, ...]) -> Slots:
    """The query that the teacher's match gives every object, object by object."""
    taught = teacher_output.holders([t for _, t in pairs]).T  # [G, Q]
    slots = pad_sequence(taught.split(counts), batch_first=True, padding_value=-1).permute(2, 0, 1).flatten(0, 1)  # [Q*B, K]
    return Slots(slots.clamp(min=0), slots >= 0)


def take(tensor: Tensor, query: Tensor) -> Tensor:
    """Rows [F, K] of [F, M, D] -> [F, K, D]."""
    return tensor.gather(1, query[..., None].expand(-1, -1, tensor.shape[-1]))


def by_stage(values: Tensor, image: Tensor, view: View) -> Tensor:
    """[P] -> [S] sums; where a stage learns from several of the teacher's, the mean of their sums."""
    stages, images = [s for s, _ in view.pairs], len(view.logits) // len(view.pairs)
    share = torch.tensor([1 / stages.count(s) for s in stages], device=values.device, dtype=values.dtype)
    pair = image // images
    stage = torch.tensor(stages, device=values.device)[pair]
    return values.new_zeros(stages[-1] + 1).index_add(0, stage, values * share[pair])
