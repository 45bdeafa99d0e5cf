"""Contrastive denoising (DINO 3.3): queries made of noised targets must find back to them, or, if noised too far, be background.

Legend: T objects in the batch, K denoising groups, M largest number of objects in an image of the step.
A group has 2 M rows: M positives, then M negatives; row k of each belongs to the k-th object of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steadydetr.boxes import to_cxcywh, to_xyxy
from steadydetr.detectors.base import Detector
from steadydetr.detectors.dino import DINO
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.objectives.base import Objective
from steadydetr.structures import Assignment, Batch, Losses, Match, MatchResult, Queries, QueryGroup, Stages, Targets


@dataclass(frozen=True)
class Draws:
    """The random numbers behind the noise. Copies alternate: even ones become positives, odd ones negatives."""

    keep_label: Tensor  # [2K, T] in 0..1
    new_label: Tensor  # [2K, T] int64
    sign: Tensor  # [2K, T, 4] -1 or 1
    part: Tensor  # [2K, T, 4] in 0..1


@dataclass(frozen=True)
class Denoising(Objective):
    """DINO's defaults; the official 4-scale scripts train with box_noise 1.0."""

    number: int = 100  # objects' worth of denoising queries: groups = number / largest object count
    label_noise: float = 0.5  # half of this share of the labels is redrawn
    box_noise: float = 1.0  # positives move each corner by up to this many half sides
    negative_offset: float = 1.0  # negatives by so many box_noise more; 0: like positives, yet background (released Stable-DINO)  # D-22
    mask_padding: bool = True  # False: the original, whose empty rows are attended to and count as background  # D-05
    weights: Weights | None = None  # None: the criterion's

    @property
    def name(self) -> str:
        return "denoising"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        if not isinstance(student, DINO):
            raise ValueError(f"denoising needs queries that carry a label, which {type(student).__name__} has not: use DINO")

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        batch = context.batch
        most = batch.global_totals.most_objects
        count = group_count(self.number, most)
        draws = draw_noise(batch, count, context.student.num_classes)
        labels = noise_labels(batch.targets.labels, draws, self.label_noise)
        boxes = noise_boxes(batch.targets.boxes, draws, self.box_noise, self.negative_offset)
        queries = place(context.student, batch.targets, labels, boxes, most)
        if most and not self.mask_padding:
            queries = Queries(queries.content, queries.reference)
        rows = queries.content.shape[1]
        blocks = torch.arange(rows, device=labels.device) // max(2 * most, 1)
        return [QueryGroup(self.name, queries, sees=("main",), blocks=blocks, known=known_match(batch.targets, count, most))]

    def add_losses(
        self, losses: Losses, context: StepContext, stages: Mapping[str, Stages], solved: Mapping[str, MatchResult], criterion: Criterion
    ) -> None:
        predicted = stages[self.name]
        most = context.batch.global_totals.most_objects
        count = group_count(self.number, most)
        match = repeat_stages(known_match(context.targets, count, most), predicted, len(context.targets.labels))
        assignment = Assignment((match,), match)
        criterion.add_losses(losses, self.name, predicted, assignment, context.targets, context.normaliser * count, self.weights)


def group_count(number: int, most_objects: int) -> int:
    """Groups that fit the budget, at least one (detrex's rule; F-38)."""
    return max(number // max(most_objects, 1), 1)


def draw_noise(batch: Batch, groups: int, num_classes: int) -> Draws:
    """Every image has a generator of its own, seeded by (seed, step, image id): the noise does not depend on how images are dealt out."""
    parts: list[tuple[Tensor, ...]] = []
    for image_id, objects in zip(batch.image_ids, batch.targets.counts, strict=True):
        generator = torch.Generator().manual_seed(hash((batch.seed, batch.step, image_id)) % 2**63)
        shape = (2 * groups, objects)
        parts.append(
            (
                torch.rand(shape, generator=generator),
                torch.randint(num_classes, shape, generator=generator),
                torch.randint(2, (*shape, 4), generator=generator) * 2.0 - 1.0,
                torch.rand((*shape, 4), generator=generator),
            )
        )
    device = batch.targets.boxes.device
    return Draws(*(torch.cat(tensors, 1).to(device, non_blocking=True) for tensors in zip(*parts, strict=True)))


def noise_labels(labels: Tensor, draws: Draws, ratio: float) -> Tensor:
    """[T] -> [2K, T]: each copy is redrawn with probability ratio / 2, positives and negatives alike."""
    return torch.where(draws.keep_label < ratio / 2, draws.new_label, labels)


def noise_boxes(boxes: Tensor, draws: Draws, scale: float, negative_offset: float = 1.0) -> Tensor:
    """[T, 4] -> [2K, T, 4]: corners move by part * sign * half side * scale; a negative's part is larger by `negative_offset`."""
    copies = len(draws.part)
    negative = (torch.arange(copies, device=boxes.device) % 2)[:, None, None]
    half = boxes[:, 2:].repeat(1, 2) / 2
    moved = to_xyxy(boxes) + (draws.part + negative_offset * negative) * draws.sign * half * scale
    return to_cxcywh(moved.clamp(0, 1))


def slots(targets: Targets, copies: int, most: int) -> tuple[Tensor, Tensor]:
    """Where copy c of an object stands: image [T] and row [copies, T]."""
    counts = torch.tensor(targets.counts, device=targets.labels.device)
    first = counts.cumsum(0) - counts
    within = torch.arange(len(targets.labels), device=counts.device) - first[targets.image]
    return targets.image, torch.arange(copies, device=counts.device)[:, None] * most + within


def place(student: Detector, targets: Targets, labels: Tensor, boxes: Tensor, most: int) -> Queries:
    """Noised labels [2K, T] and boxes [2K, T, 4] into padded rows. Without objects one invalid row keeps every parameter in the graph."""
    images, copies = len(targets.counts), len(labels)
    rows = max(copies * most, 1)
    image, row = slots(targets, copies, most)
    image = image.expand(copies, -1)
    padded_labels = labels.new_zeros(images, rows)
    padded_boxes = boxes.new_full((images, rows, 4), 0.5)
    valid = torch.zeros(images, rows, dtype=torch.bool, device=labels.device)
    padded_labels[image, row], padded_boxes[image, row], valid[image, row] = labels, boxes, True
    queries = student.embed(padded_labels, padded_boxes)
    return Queries(torch.where(valid[..., None], queries.content, 0), queries.reference, valid=valid)


def known_match(targets: Targets, groups: int, most: int) -> Match:
    """Positives of every group with their objects, of one stage; P = K * T."""
    image, row = slots(targets, 2 * groups, most)
    target = torch.arange(len(targets.labels), device=row.device)
    return Match(image.repeat(groups), row[0::2].flatten(), target.repeat(groups))


def repeat_stages(match: Match, stages: Stages, objects: int) -> Match:
    """A match of one stage, the same at every stage, in folded indices."""
    count, images = stages.logits.shape[:2]
    stage = torch.arange(count, device=match.image.device)[:, None]
    return Match((match.image + stage * images).flatten(), match.query.repeat(count), (match.target + stage * objects).flatten())
