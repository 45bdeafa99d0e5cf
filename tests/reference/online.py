"""Slow, obvious counterparts of online distillation (OD-DETR; DETRDistill Eq. 9): one query, one target, one stage, one image at a time.

`step` is the whole training step: values of autograd come from scalars of torch, assignments from scipy image by image, and every
group, for the auxiliary ones every image of it, goes through the decoder on its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from steadydetr.detectors import Detector
from steadydetr.learning.context import StepContext
from steadydetr.objectives import (
    AssignmentDistillation,
    AuxiliaryGroups,
    Denoising,
    MatchingDistillation,
    NaivePrediction,
    Objective,
    PredictionDistillation,
    SetPrediction,
)
from steadydetr.objectives.denoising import denoising_groups, known_match
from steadydetr.structures import Batch, Memory, Queries, QueryGroup
from tests.reference.boxes import Box, iou_and_giou, l1
from tests.reference.detection import cross_entropy
from tests.reference.matching import matching_cost

Classes = dict[tuple[int, int], tuple[int, float]]  # (query, class) -> the target whose IoU it learns, and the entry's weight
Boxes = dict[int, tuple[int, float]]  # query -> the target whose box it learns, and the weight


def quality_focal(p: float, t: float) -> float:
    """Eq. 2."""
    return abs(t - p) ** 2 * cross_entropy(p, t)


def task_weight(score: float, iou: float) -> float:
    """c'[c_g] of Eq. 5."""
    return score**0.25 * iou**0.75


def box_distillation(student: Box, teacher: Box, target: Box, weight: float, listen: bool = True) -> tuple[float, float]:
    """Eq. 6 of one matched query: L1 and 1 - GIoU with the teacher's box, 0 where the teacher's is not strictly better."""
    if listen and iou_and_giou(teacher, target)[0] <= iou_and_giou(student, target)[0]:
        return 0.0, 0.0
    return weight * l1(student, teacher), weight * (1 - iou_and_giou(student, teacher)[1])


def join(
    own: Sequence[int],
    taught: Sequence[int],
    labels: Sequence[int],
    cost: Sequence[Sequence[float]],
    iou: Sequence[Sequence[float]],
    options: MatchingDistillation,
) -> tuple[Classes, Boxes]:
    """Eq. 3 and 4 of one image and stage: query of every target by either match (-1: none); cost and IoU by [target][query]."""
    classes: Classes = {}
    boxes: Boxes = {}
    for q in range(len(cost[0]) if cost else 0):
        mine, theirs = (next((t for t, query in enumerate(match) if query == q), None) for match in (own, taught))
        if mine is not None:
            rival = taught[mine]  # the other query of the same target
            contested = rival not in (-1, q)
            cheaper = contested and cost[mine][rival] < cost[mine][q]
            extra = options.classes == "union" or (options.classes == "conditional" and contested and iou[mine][rival] > 0.5)
            idle = contested and rival not in own
            classes[q, labels[mine]] = mine, options.class_weight if cheaper and extra else 1.0
            boxes[q] = mine, options.box_weight if cheaper and options.boxes and idle else 1.0
        if theirs is None or theirs == mine:
            continue
        costlier = own[theirs] >= 0 and cost[theirs][q] >= cost[theirs][own[theirs]]
        if options.classes == "union" or (options.classes == "conditional" and iou[theirs][q] > 0.5):
            classes.setdefault((q, labels[theirs]), (theirs, options.class_weight if costlier else 1.0))
        if mine is None and options.boxes:
            boxes[q] = theirs, options.box_weight if costlier else 1.0
    return classes, boxes


def cheapest(cost: Sequence[Sequence[float]], count: int = 2) -> list[int]:
    """Of one image, cost by [target][query]: the cheapest queries of every target, each once, in the order of their numbers."""
    return sorted({q for row in cost for q in sorted(range(len(row)), key=row.__getitem__)[:count]})


def assign(cost: Sequence[Sequence[float]]) -> list[int]:
    """The query of every target of one image, -1: none."""
    found = [-1] * len(cost)
    if cost:
        for target, query in zip(*linear_sum_assignment(cost), strict=True):
            found[int(target)] = int(query)
    return found


@dataclass(frozen=True)
class View:
    """One image at one stage, or one of its groups: scalars that are differentiated, and numbers that are not."""

    logits: Tensor  # [N, C]
    boxes: Tensor  # [N, 4]

    def costs(self, targets: Sequence[tuple[int, Box]]) -> list[list[float]]:
        logits, boxes = self.logits.tolist(), self.boxes.tolist()
        return [[matching_cost(row[label], box, target) for row, box in zip(logits, boxes, strict=True)] for label, target in targets]

    def ious(self, targets: Sequence[tuple[int, Box]]) -> list[list[float]]:
        return [[iou_and_giou(box, target)[0] for box in self.boxes.tolist()] for _, target in targets]


def entry_loss(logit: Tensor, t: float) -> Tensor:
    """Eq. 2 in the logit."""
    p = logit.sigmoid()
    return (t - p) ** 2 * -(t * p.log() + (1 - t) * (1 - p).log())


def pair_loss(box: Tensor, target: Box) -> tuple[Tensor, Tensor]:
    """L1 and 1 - GIoU of one pair."""
    x, y, w, h = box.unbind()
    tx, ty, tw, th = box.new_tensor(target).unbind()

    def overlap(centre: Tensor, side: Tensor, other: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        highs, lows = (centre + side / 2, other + length / 2), (centre - side / 2, other - length / 2)
        inner = min(highs, key=Tensor.item) - max(lows, key=Tensor.item)
        return inner.clamp(min=0), max(highs, key=Tensor.item) - min(lows, key=Tensor.item)

    (inner_w, outer_w), (inner_h, outer_h) = overlap(x, w, tx, tw), overlap(y, h, ty, th)
    inner, outer = inner_w * inner_h, outer_w * outer_h
    union = w * h + tw * th - inner
    distance = (x - tx).abs() + (y - ty).abs() + (w - tw).abs() + (h - th).abs()
    return distance, 1 - (inner / union - (outer - union) / outer)


class Sums:
    """Loss terms by name and stage."""

    def __init__(self, stages: int) -> None:
        self.values: dict[str, list[Tensor]] = defaultdict(lambda: [torch.zeros((), dtype=torch.float64) for _ in range(stages)])

    def add(self, name: str, stage: int, value: Tensor | float) -> None:
        self.values[name][stage] = self.values[name][stage] + value

    def detection(
        self, name: str, stage: int, view: View, classes: Classes, boxes: Boxes, targets: list[tuple[int, Box]], n: float
    ) -> None:
        """What the queries of one image learn: `classes` at their entries, 0 elsewhere, and `boxes`."""
        iou = view.ious(targets)
        for q, row in enumerate(view.logits):
            for c, logit in enumerate(row):
                target, weight = classes.get((q, c), (None, 1.0))
                self.add(f"{name}/class", stage, weight * entry_loss(logit, 0.0 if target is None else iou[target][q]) / n)
        for part in ("l1", "giou"):
            self.add(f"{name}/{part}", stage, 0.0)  # the term is there, whoever learns it
        for q, (target, weight) in boxes.items():
            distance, apart = pair_loss(view.boxes[q], targets[target][1])
            self.add(f"{name}/l1", stage, weight * distance / n)
            self.add(f"{name}/giou", stage, weight * apart / n)


def one_to_one(queries: Sequence[int], labels: Sequence[int]) -> tuple[Classes, Boxes]:
    """What a match alone teaches."""
    pairs = [(q, t) for t, q in enumerate(queries) if q >= 0]
    return {(q, labels[t]): (t, 1.0) for q, t in pairs}, {q: (t, 1.0) for q, t in pairs}


def image_of(memory: Memory, b: int) -> Memory:
    rows = slice(b, b + 1)
    return Memory(memory.tokens[rows], memory.padding[rows], memory.levels, memory.valid_ratios[rows], memory.inputs[rows])


class Step:
    """Everything that the objectives of a step look at, as lists by stage and image."""

    def __init__(self, student: Detector, teacher: Detector, batch: Batch) -> None:
        self.student, self.teacher, self.batch = student, teacher, batch
        self.targets = [list(zip(t.labels.tolist(), t.boxes.tolist(), strict=True)) for t in batch.targets.split()]
        self.normaliser = float(max(sum(batch.targets.counts), 1))
        self.memory = student.encode(batch.images, batch.padding)
        self.queries = student.queries(self.memory)["main"]
        with torch.no_grad():
            memory = teacher.encode(batch.images, batch.padding)
            self.teachers_queries = teacher.queries(memory)["main"]
            self.teacher_output = teacher.decode(memory, [QueryGroup("main", self.teachers_queries)])["main"]
        self.depth = len(self.teacher_output.logits)
        self.taught = [[assign(self.teachers_view(s, b).costs(t)) for b, t in enumerate(self.targets)] for s in range(self.depth)]
        self.sums = Sums(self.depth)
        self.seen: dict[str, list[bool]] = defaultdict(list)  # of every target at every stage; a measure is the share that is true

    def teachers_view(self, stage: int, b: int) -> View:
        return View(self.teacher_output.logits[stage, b], self.teacher_output.boxes[stage, b])

    def decoded(self, group: QueryGroup, *others: QueryGroup, memory: Memory | None = None) -> list[list[View]]:
        """[stage][image]."""
        stages = self.student.decode(memory or self.memory, [*others, group])[group.name]
        return [
            [View(logits, boxes) for logits, boxes in zip(*pair, strict=True)] for pair in zip(stages.logits, stages.boxes, strict=True)
        ]

    def counterpart(self, b: int, query: int) -> int:
        """The student's query that stands for one of the teacher's."""
        if query < 0 or self.queries.token is None or self.teachers_queries.token is None:
            return query
        mine, theirs = self.queries.token[b].tolist(), self.teachers_queries.token[b].tolist()
        return mine.index(theirs[query]) if theirs[query] in mine else -1

    def detection(self, objective: SetPrediction) -> None:
        for s, images in enumerate(self.decoded(QueryGroup("main", self.queries))):
            for b, view in enumerate(images):
                targets, labels = self.targets[b], [label for label, _ in self.targets[b]]
                cost = view.costs(targets)
                own = assign(cost)
                learned = one_to_one(own, labels)
                if objective.teacher_match is not None:
                    taught = [self.counterpart(b, q) for q in self.taught[s][b]]
                    self.seen["main/same_query_as_teacher"] += [q == other != -1 for q, other in zip(own, taught, strict=True)]
                    self.seen["main/without_counterpart"] += [q == -1 for q in taught]
                    learned = join(own, taught, labels, cost, view.ious(targets), objective.teacher_match)
                self.sums.detection("main", s, view, *learned, targets, self.normaliser)
        proposals = self.student.proposals(self.memory, self.queries)
        if proposals is None:
            return
        for b, targets in enumerate(self.targets):
            if self.student.class_agnostic_proposals:
                targets = [(0, box) for _, box in targets]
            view = View(proposals.logits[0, b], proposals.boxes[0, b])
            learned = one_to_one(assign(view.costs(targets)), [label for label, _ in targets])
            self.sums.detection("proposals", 0, view, *learned, targets, self.normaliser)

    def denoising(self, objective: Denoising, context: StepContext) -> None:
        """The noised queries are the objective's, which have counterparts of their own; they see the main ones."""
        (group,) = objective.query_groups(context)
        assert group.queries.valid is not None
        most = context.batch.global_totals.most_objects
        match = known_match(context.targets, denoising_groups(objective.number, most), most)
        known = [m.tolist() for m in (match.image, match.query, match.target)]
        copies = len(known[0]) / self.normaliser
        first = [sum(len(t) for t in self.targets[:b]) for b in range(len(self.targets))]
        for s, images in enumerate(self.decoded(group, QueryGroup("main", self.queries))):
            for b, view in enumerate(images):
                there = group.queries.valid[b].nonzero()[:, 0].tolist()
                row = {q: i for i, q in enumerate(there)}
                pairs = {row[q]: t - first[b] for image, q, t in zip(*known, strict=True) if image == b}
                labels = [label for label, _ in self.targets[b]]
                classes: Classes = {(q, labels[t]): (t, 1.0) for q, t in pairs.items()}
                boxes: Boxes = {q: (t, 1.0) for q, t in pairs.items()}
                kept = View(view.logits[there], view.boxes[there])
                self.sums.detection("denoising", s, kept, classes, boxes, self.targets[b], self.normaliser * copies)

    def prediction(self, objective: PredictionDistillation | NaivePrediction) -> None:
        naive = isinstance(objective, NaivePrediction)
        for s, images in enumerate(self.decoded(QueryGroup("prediction", self.teachers_queries))):
            for b, view in enumerate(images):
                teacher, query = self.teachers_view(s, b), self.taught[s][b]
                wanted, theirs = teacher.logits.sigmoid().tolist(), teacher.boxes.tolist()
                heard = {q: 1.0 for q in range(len(theirs))} if naive else {}  # query -> weight of its box
                n = self.normaliser
                if isinstance(objective, NaivePrediction) and objective.divisor == "queries":
                    n = float(len(images) * len(theirs))
                for (label, target), q in zip(self.targets[b], query, strict=True):
                    if q < 0 or naive:
                        continue
                    taught, own = (iou_and_giou(box, target)[0] for box in (theirs[q], view.boxes[q].tolist()))
                    wanted[q][label] = task_weight(wanted[q][label], taught)
                    heard[q] = wanted[q][label] if taught > own or not objective.listen else 0.0
                for q, weight in heard.items():
                    distance, apart = pair_loss(view.boxes[q], theirs[q])
                    self.sums.add("prediction/l1", s, weight * distance / n)
                    self.sums.add("prediction/giou", s, weight * apart / n)
                for q, row in enumerate(view.logits):
                    for c, logit in enumerate(row):
                        self.sums.add("prediction/class", s, entry_loss(logit, wanted[q][c]) / n)

    def auxiliary(self, objective: AuxiliaryGroups) -> None:
        """Values by the student's stage, summed over groups."""
        n = self.normaliser * (self.depth if objective.reduction == "mean" else 1)
        parts: Sums = Sums(self.depth)
        for t in range(self.depth):
            for b, targets in enumerate(self.targets):
                if not targets:
                    continue
                labels, chosen = [label for label, _ in targets], cheapest(self.teachers_view(t, b).costs(targets))
                position = self.teachers_queries.position
                rows = Queries(
                    self.teacher_output.content[t, b, chosen][None],
                    self.teacher_output.boxes[t, b, chosen][None],
                    position=None if position is None else position[b, chosen][None],
                )
                taught = [chosen.index(q) if q in chosen else -1 for q in self.taught[t][b]]
                self.seen["auxiliary/targets_outside"] += [slot == -1 for slot in taught]
                for s, (view,) in enumerate(self.decoded(QueryGroup("auxiliary", rows), memory=image_of(self.memory, b))):
                    cost = view.costs(targets)
                    own = assign(cost)
                    learned = join(own, taught, labels, cost, view.ious(targets), objective.distillation)
                    if objective.matching != "both":
                        learned = one_to_one(own if objective.matching == "own" else taught, labels)
                    parts.detection("auxiliary", s, view, *learned, targets, n)
        self.sums.values |= parts.values

    def assignment(self, objective: AssignmentDistillation) -> None:
        for s, images in enumerate(self.decoded(QueryGroup("assignment", self.teachers_queries))):
            for b, view in enumerate(images):
                targets = self.targets[b]
                query = self.taught[s][b] if objective.matching == "teacher" else assign(view.costs(targets))
                self.sums.detection("assignment", s, view, *one_to_one(query, [label for label, _ in targets]), targets, self.normaliser)


def step(
    student: Detector, teacher: Detector, batch: Batch, objectives: Sequence[Objective], context: StepContext
) -> tuple[Mapping[str, list[Tensor]], dict[str, float]]:
    """Every loss term by the student's stage, and the measures; `context` is for denoising only."""
    whole = Step(student, teacher, batch)
    for objective in objectives:
        if isinstance(objective, SetPrediction):
            whole.detection(objective)
        elif isinstance(objective, Denoising):
            whole.denoising(objective, context)
        elif isinstance(objective, (PredictionDistillation, NaivePrediction)):
            whole.prediction(objective)
        elif isinstance(objective, AuxiliaryGroups):
            whole.auxiliary(objective)
        elif isinstance(objective, AssignmentDistillation):
            whole.assignment(objective)
    return whole.sums.values, {name: sum(found) / len(found) for name, found in whole.seen.items()}


def total(values: Mapping[str, list[Tensor]]) -> Tensor:
    """With weights 1, 5, 2."""
    weights = {"class": 1.0, "l1": 5.0, "giou": 2.0}
    return sum((weights[name.rpartition("/")[2]] * sum(stages) for name, stages in values.items()), torch.zeros((), dtype=torch.float64))


def decay(steps: int) -> float:
    """Of a horizon of 2.8% of a run."""
    return 1 - 1 / (0.028 * steps)


def averaged(values: Sequence[float], start: float, rate: float) -> float:
    """Exponential moving average of a weight after every value in turn."""
    for value in values:
        start = rate * start + (1 - rate) * value
    return start
