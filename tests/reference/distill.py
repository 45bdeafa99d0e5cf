"""Slow, obvious counterparts of offline distillation (DETRDistill Eq. 2-4, 9): one query, one target, one stage, one image at a time.

`step` is a training step of detection, logits and assignment distillation: values of autograd come from scalars of torch, assignments
from scipy image by image, and every group goes through the decoder on its own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from steadydetr.detectors import Detector
from steadydetr.objectives import AssignmentDistillation, LogitsDistillation, Objective, ReleasedLogits, SetPrediction
from steadydetr.structures import Batch, Queries, QueryGroup
from tests.reference.boxes import Box, corners, iou_and_giou, l1
from tests.reference.detection import cross_entropy, sigmoid
from tests.reference.matching import matching_cost

WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0}
Target = tuple[int, Box]


def soft_label(logits: Sequence[float], scores: Sequence[float]) -> float:
    """L_cls of Eq. 2 for one pair: cross-entropy to the teacher's scores, summed over classes."""
    return sum(cross_entropy(sigmoid(x), t) for x, t in zip(logits, scores, strict=True))


def box_cost(student: Box, teacher: Box) -> float:
    return 5 * l1(student, teacher) - 2 * iou_and_giou(student, teacher)[1]


def stages_of(student: int, student_stages: int, teacher_stages: int, which: str) -> list[int]:
    """The stages of the teacher that a stage of the student learns from, both counted from 0."""
    if which == "last":
        return [teacher_stages - 1]
    end = math.ceil((student + 1) * teacher_stages / student_stages)
    return list(range(math.floor(student * teacher_stages / student_stages), end)) if which == "group" else [end - 1]


def pairs_of(cost: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """(row, column) of the cheapest one-to-one assignment; as many as the smaller side has."""
    if not cost or not cost[0]:
        return []
    return [(int(r), int(c)) for r, c in zip(*linear_sum_assignment(np.array(cost)), strict=True)]


@dataclass(frozen=True)
class View:
    """One image at one stage."""

    logits: Tensor  # [N, C]
    boxes: Tensor  # [N, 4]

    def match(self, targets: Sequence[Target]) -> dict[int, int]:
        """Target -> query, by the matcher of the detection loss."""
        logits, boxes = self.logits.tolist(), self.boxes.tolist()
        cost = [[matching_cost(row[label], box, target) for row, box in zip(logits, boxes, strict=True)] for label, target in targets]
        return dict(pairs_of(cost))


def entry(logit: Tensor, t: float) -> Tensor:
    """Cross-entropy."""
    p = logit.sigmoid()
    return -(t * p.log() + (1 - t) * (1 - p).log())


def focal(logit: Tensor, positive: bool) -> Tensor:
    p = logit.sigmoid()
    return 0.25 * (1 - p) ** 2 * -p.log() if positive else 0.75 * p**2 * -(1 - p).log()


def box_terms(box: Tensor, target: Box) -> tuple[Tensor, Tensor]:
    """L1 and 1 - GIoU."""
    x, y, w, h = box.unbind()
    ours, theirs = (x - w / 2, y - h / 2, x + w / 2, y + h / 2), corners(target)
    inner, outer = [], []
    for low in (0, 1):
        highs, lows = [ours[low + 2], box.new_tensor(theirs[low + 2])], [ours[low], box.new_tensor(theirs[low])]
        inner.append((min(highs, key=Tensor.item) - max(lows, key=Tensor.item)).clamp(min=0))
        outer.append(max(highs, key=Tensor.item) - min(lows, key=Tensor.item))
    overlap, hull = inner[0] * inner[1], outer[0] * outer[1]
    union = w * h + target[2] * target[3] - overlap
    distance = sum(((a - b).abs() for a, b in zip(box, target, strict=True)), box.new_zeros(()))
    return distance, 1 - (overlap / union - (hull - union) / hull)


def cut_off(box: Box) -> Box:
    x0, y0, x1, y1 = (min(max(side, 0.0), 1.0) for side in corners(box))
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


class Step:
    """Everything that the objectives of a step look at, as lists by stage and image."""

    def __init__(self, student: Detector, teacher: Detector, batch: Batch) -> None:
        self.student = student
        self.targets = [list(zip(t.labels.tolist(), t.boxes.tolist(), strict=True)) for t in batch.targets.split()]
        self.objects = float(max(sum(map(len, self.targets)), 1))
        self.memory = student.encode(batch.images, batch.padding)
        self.queries = student.queries(self.memory)["main"]
        with torch.no_grad():
            memory = teacher.encode(batch.images, batch.padding)
            self.given = teacher.queries(memory)["main"]
            stages = teacher.decode(memory, [QueryGroup("main", self.given)])["main"]
        self.taught = [[View(*pair) for pair in zip(*stage, strict=True)] for stage in zip(stages.logits, stages.boxes, strict=True)]
        self.held = [[view.match(targets) for view, targets in zip(stage, self.targets, strict=True)] for stage in self.taught]
        self.main = self.decoded(self.queries)
        self.values: dict[str, list[Tensor]] = defaultdict(lambda: [torch.zeros((), dtype=torch.float64) for _ in self.main])

    def decoded(self, queries: Queries) -> list[list[View]]:
        """[stage][image]."""
        stages = self.student.decode(self.memory, [QueryGroup("main", queries)])["main"]
        return [[View(*pair) for pair in zip(*stage, strict=True)] for stage in zip(stages.logits, stages.boxes, strict=True)]

    def add(self, name: str, stage: int, value: Tensor | float) -> None:
        self.values[name][stage] = self.values[name][stage] + value

    def detection(self, name: str, stage: int, view: View, match: Mapping[int, int], targets: Sequence[Target]) -> None:
        positive = {(q, targets[t][0]) for t, q in match.items()}
        for q, row in enumerate(view.logits):
            for c, logit in enumerate(row):
                self.add(f"{name}/class", stage, focal(logit, (q, c) in positive) / self.objects)
        for part in ("l1", "giou"):
            self.add(f"{name}/{part}", stage, 0.0)  # the term is there, whoever learns it
        for t, q in match.items():
            for part, value in zip(("l1", "giou"), box_terms(view.boxes[q], targets[t][1]), strict=True):
                self.add(f"{name}/{part}", stage, value / self.objects)

    def logits(self, objective: LogitsDistillation | ReleasedLogits) -> None:
        for s, images in enumerate(self.main):
            chosen = stages_of(s, len(self.main), len(self.taught), objective.stages)
            for t in chosen:
                positive, negative = [], []
                for b, view in enumerate(images):
                    found = self.pseudo_targets(objective, view, t, b)
                    positive += [(view, *pair) for pair in found[0]]
                    negative += [(view, *pair) for pair in found[1]]
                count = float(len(positive)) if isinstance(objective, ReleasedLogits) else self.objects
                self.learn("positive", s, positive, objective, count * len(chosen))
                if isinstance(objective, LogitsDistillation) and objective.negative_box:
                    self.learn("negative", s, negative, objective, self.negatives(objective, len(negative)) * len(chosen))

    def negatives(self, objective: LogitsDistillation, matched: int) -> float:
        """What their terms are divided by: how many are matched; where scores choose, which one process alone knows, how many can be."""
        if objective.positives == "matched":
            return float(max(matched, 1))
        ours, theirs = len(self.main[0][0].boxes), len(self.taught[0][0].boxes)
        return float(len(self.targets) * min(ours, theirs, objective.candidates or theirs))

    def learn(
        self,
        part: str,
        s: int,
        pairs: list[tuple[View, int, list[float], Box]],
        objective: LogitsDistillation | ReleasedLogits,
        normaliser: float,
    ) -> None:
        kinds = {"class": part == "positive" and objective.positive_class}
        kinds["l1"] = kinds["giou"] = part == "negative" or objective.positive_box
        for kind in (kind for kind, on in kinds.items() if on):
            self.add(f"logits/{part}_{kind}", s, 0.0)
        for view, n, scores, box in pairs:
            distance, apart = box_terms(view.boxes[n], box)
            label = sum((entry(x, t) for x, t in zip(view.logits[n], scores, strict=True)), distance * 0)
            for kind, value in (("class", label), ("l1", distance), ("giou", apart)):
                if kinds[kind]:
                    self.add(f"logits/{part}_{kind}", s, value / normaliser)

    def pseudo_targets(self, objective: LogitsDistillation | ReleasedLogits, view: View, t: int, b: int) -> tuple[list, list]:
        """(student's query, the teacher's scores, its box) of positives and of negatives."""
        scores, boxes = self.taught[t][b].logits.sigmoid().tolist(), self.taught[t][b].boxes.tolist()
        best = {m: max(row) for m, row in enumerate(scores)}
        if isinstance(objective, ReleasedLogits):
            positives, boxes = list(best), [cut_off(box) for box in boxes]
        elif objective.positives == "score":
            positives = [m for m in best if best[m] >= objective.threshold]
        else:
            positives = list(self.held[t][b].values())
        negatives, rest = [], False
        if isinstance(objective, LogitsDistillation):
            negatives = sorted(set(best) - set(positives), key=lambda m: -best[m])[: objective.candidates]
            rest = objective.rest
        logits, ours = view.logits.tolist(), view.boxes.tolist()
        cost = [[soft_label(x, scores[m]) + box_cost(box, boxes[m]) for x, box in zip(logits, ours, strict=True)] for m in positives]
        first = [(n, scores[positives[row]], boxes[positives[row]]) for row, n in pairs_of(cost)]
        free = [n for n in range(len(ours)) if not rest or n not in {n for n, *_ in first}]
        second = pairs_of([[box_cost(ours[n], boxes[m]) for n in free] for m in negatives])
        return first, [(free[column], scores[negatives[row]], boxes[negatives[row]]) for row, column in second]

    def assignment(self, objective: AssignmentDistillation, adapter: nn.ModuleDict | None) -> None:
        content, position = self.given.content, self.given.position
        if adapter is not None:
            content = adapter["content"](content)
        if not self.student.positioned:
            position = None
        elif adapter is not None:
            position = adapter["position"](position)
        sized = self.given.sized and self.queries.sized
        for s, images in enumerate(self.decoded(Queries(content, self.given.reference, sized, position=position))):
            (t,) = stages_of(s, self.student.decoder.stages, len(self.taught), "progressive")
            for b, view in enumerate(images):
                match = self.held[t][b] if objective.matching == "teacher" else view.match(self.targets[b])
                self.detection("assignment", s, view, match, self.targets[b])


def step(
    student: Detector, teacher: Detector, batch: Batch, objectives: Sequence[Objective], adapters: Mapping[str, nn.Module]
) -> Mapping[str, list[Tensor]]:
    """Every loss term by the student's stage."""
    whole = Step(student, teacher, batch)
    for objective in objectives:
        if isinstance(objective, SetPrediction):
            for s, images in enumerate(whole.main):
                for view, targets in zip(images, whole.targets, strict=True):
                    whole.detection("main", s, view, view.match(targets), targets)
        elif isinstance(objective, (LogitsDistillation, ReleasedLogits)):
            whole.logits(objective)
        elif isinstance(objective, AssignmentDistillation):
            adapter = adapters.get(objective.name)
            assert adapter is None or isinstance(adapter, nn.ModuleDict)
            whole.assignment(objective, adapter)
    return whole.values


def total(values: Mapping[str, list[Tensor]]) -> Tensor:
    parts = (WEIGHTS[name.rpartition("/")[2].rpartition("_")[2]] * sum(stages) for name, stages in values.items())
    return sum(parts, torch.zeros((), dtype=torch.float64))
