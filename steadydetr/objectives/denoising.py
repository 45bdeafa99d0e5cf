"""Denoising: queries made of noised targets learn these targets (DN-DETR 3) or, if noised further, to be background (DINO 3.3).

The queries form denoising groups that do not see each other. A group of DINO has two copies of every object: one with little noise, which
is positive, and one with more, which is negative; a group of DN-DETR has positives alone. With `most` objects in the fullest image of the
step, a group takes 2 * most rows, or most: first the positives, then the negatives; within them a row belongs to the object of its number
in the image.

Legend: G objects of the batch, P pairs; copies = 2 * denoising groups, or their number where there are no negatives.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self, cast

from steadydetr.boxes import to_cxcywh, to_xyxy
from steadydetr.config import check_within
from steadydetr.kinds import register
from steadydetr.lazy import torch
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Weights
from steadydetr.objectives.base import Matched, Objective, Predicted
from steadydetr.structures import (
    Assignment,
    Batch,
    Losses,
    Match,
    Queries,
    QueryGroup,
    Stages,
    Targets,
    seed_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector
    from steadydetr.nn.labels import LabelLayers


@dataclass(frozen=True)
class Draws:
    """The random numbers behind the noise. Where there are negatives, copies alternate: even ones are positive, odd ones negative."""

    keep_label: Tensor  # [copies, G] in 0..1
    new_label: Tensor  # [copies, G] int64
    sign: Tensor  # [copies, G, 4] -1 or 1
    part: Tensor  # [copies, G, 4] in 0..1


class DenoisingObjective(Objective):
    """What all kinds have in common. A method has one of them."""

    mask_padding: bool  # False: rows without an object are attended to and learn background, as in the originals  # D-05
    weights: Weights | None  # None: the criterion's
    embeds_labels = True
    copies: int  # of every object in a group: its positive and perhaps a negative

    @property
    def name(self) -> str:
        return "denoising"

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> LabelLayers | None:
        """What makes queries of labels, of a student that cannot do so itself (D-211)."""
        from steadydetr.nn.labels import LabelLayers

        return None if student.embeds_labels else LabelLayers(student.num_classes, student.width, student.new_position())

    def _embed(self, context: StepContext, labels: Tensor, boxes: Tensor) -> Queries:
        layers, student = context.adapters.get(self.name), context.student
        return student.embed(labels, boxes) if layers is None else label_queries(student, cast("LabelLayers", layers), labels, boxes)

    def weighed(self, weights: Weights | None) -> Self:
        """The same with other weights."""
        return replace(self, weights=weights)  # type: ignore[type-var]  # what derives from it is a dataclass

    @abstractmethod
    def group_count(self, most: int) -> int:
        """How many groups there are, with so many objects in the fullest image of the step."""

    @abstractmethod
    def noised(self, batch: Batch, groups: int, student: Detector) -> tuple[Tensor, Tensor]:
        """Labels [copies, G] and boxes [copies, G, 4]."""

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        batch, most = context.batch, context.batch.global_totals.most_objects
        labels, boxes = self.noised(batch, self.group_count(most), context.student)
        queries = noised_queries(partial(self._embed, context), batch.targets, labels, boxes, most)
        if most and not self.mask_padding:
            queries = replace(queries, valid=None)
        rows = queries.content.shape[1]
        blocks = torch.arange(rows, device=labels.device) // max(self.copies * most, 1)
        return [QueryGroup(self.name, queries, sees=("main",), blocks=blocks)]

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        predicted, most = stages[self.name], context.batch.global_totals.most_objects
        count = self.group_count(most)
        match = repeat_stages(known_match(context.targets, count, most, self.copies), predicted, len(context.targets.labels))
        assignment, normaliser = Assignment.of(match), context.normaliser * count
        context.criterion.add_losses(losses, self.name, predicted, assignment, context.targets, normaliser, self.weights)


@register("denoising")
@dataclass(frozen=True)
class Denoising(DenoisingObjective):
    """DINO's defaults; the official 4-scale scripts train with box_noise 1.0."""

    number: int = 100  # objects that are noised, at most, in the fullest image: the number of groups is this // most
    label_noise: float = 0.5  # half of this share of the labels is drawn anew
    box_noise: float = 1.0  # corners of positives move by up to this many half sides
    negative_offset: float = 1.0  # negatives move by this many box_noise more; 0: as far as positives (released Stable-DINO)  # D-22
    mask_padding: bool = True  # False: rows without an object are attended to and learn background, as in the original  # D-05
    weights: Weights | None = None  # None: the criterion's

    copies = 2

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("box_noise", "negative_offset"), (0, 1000))
        check_within("objectives.denoising", self, number=(0, 10**6), label_noise=(0, 2), **shares)

    def group_count(self, most: int) -> int:
        return denoising_groups(self.number, most)

    def noised(self, batch: Batch, groups: int, student: Detector) -> tuple[Tensor, Tensor]:
        draws = draw_noise(batch, groups, student.num_classes)
        labels = noise_labels(batch.targets.labels, draws, self.label_noise)
        return labels, noise_boxes(batch.targets.boxes, draws, self.box_noise, self.negative_offset)


@dataclass(frozen=True)
class PositiveDenoising(DenoisingObjective):
    """The noise of DN-DETR, without negatives."""

    label_noise: float = 0.2  # this share of the labels is drawn anew; what stands for no class may be drawn where it can be embedded
    box_noise: float = 0.4  # centres move by up to this many half sides, sides change by up to this share
    mask_padding: bool = True  # False: rows without an object are attended to and learn background, as in the original  # D-05
    weights: Weights | None = None  # None: the criterion's

    copies = 1

    def __post_init__(self) -> None:
        check_within("objectives.denoising", self, label_noise=(0, 1), box_noise=(0, 1000))

    def noised(self, batch: Batch, groups: int, student: Detector) -> tuple[Tensor, Tensor]:
        draws = draw_noise(batch, groups, student.embedded_labels, self.copies)
        labels = noise_labels(batch.targets.labels, draws, 2 * self.label_noise)
        return labels, noise_centres_and_sides(batch.targets.boxes, draws, self.box_noise)


@register("dn-denoising")
@dataclass(frozen=True)
class DNDenoising(PositiveDenoising):
    """That of DN-DETR, without negatives. Defaults: those of DN-DAB-Deformable-DETR."""

    groups: int = 5  # however many objects there are

    def __post_init__(self) -> None:
        super().__post_init__()
        check_within("objectives.denoising", self, groups=(1, 10**6))

    def group_count(self, most: int) -> int:
        return self.groups


@register("mask-denoising")
@dataclass(frozen=True)
class MaskDenoising(PositiveDenoising):
    """That of MaskDINO: the noise of DN-DETR in as many groups as DINO has; with MaskDINO, masks are learned too."""

    number: int = 100  # objects that are noised, at most, in the fullest image: the number of groups is this // most, at least 1  # D-191

    def __post_init__(self) -> None:
        super().__post_init__()
        check_within("objectives.denoising", self, number=(0, 10**6))

    def group_count(self, most: int) -> int:
        return denoising_groups(self.number, most)


def denoising_groups(number: int, most_objects: int) -> int:
    """How many there are, at least one (detrex's rule; F-38)."""
    return max(number // max(most_objects, 1), 1)


def draw_noise(batch: Batch, groups: int, labels: int, copies: int = 2) -> Draws:
    """Every image has a generator of its own, so that its noise is a function of seed, step and image id, on whatever rank it is.

    Args:
        labels: how many there are to draw new ones from.
        copies: of an object in one group.
    """
    parts: list[tuple[Tensor, ...]] = []
    for image_id, objects in zip(batch.image_ids, batch.targets.counts, strict=True):
        generator = torch.Generator().manual_seed(seed_of(batch.seed, batch.step, image_id))
        shape = (copies * groups, objects)
        parts.append(
            (
                torch.rand(shape, generator=generator),
                torch.randint(labels, shape, generator=generator),
                torch.randint(2, (*shape, 4), generator=generator) * 2.0 - 1.0,
                torch.rand((*shape, 4), generator=generator),
            )
        )
    device = batch.targets.boxes.device
    return Draws(*(torch.cat(tensors, 1).to(device, non_blocking=True) for tensors in zip(*parts, strict=True)))


def noise_labels(labels: Tensor, draws: Draws, ratio: float) -> Tensor:
    """[G] -> [copies, G]: each copy's label is drawn anew with probability ratio / 2, of positives and negatives alike."""
    return torch.where(draws.keep_label < ratio / 2, draws.new_label, labels)


def noise_boxes(boxes: Tensor, draws: Draws, scale: float, negative_offset: float = 1.0) -> Tensor:
    """[G, 4] -> [copies, G, 4]: corners move by part * sign * half side * scale; a negative's part is larger by `negative_offset`."""
    copies = len(draws.part)
    negative = (torch.arange(copies, device=boxes.device) % 2)[:, None, None]
    half = boxes[:, 2:].repeat(1, 2) / 2
    moved = to_xyxy(boxes) + (draws.part + negative_offset * negative) * draws.sign * half * scale
    return to_cxcywh(moved.clamp(0, 1))


def noise_centres_and_sides(boxes: Tensor, draws: Draws, scale: float) -> Tensor:
    """[G, 4] -> [copies, G, 4]: with d = part * sign, centres move by d * half side * scale, sides become (1 + d * scale) times as long."""
    moved = draws.part * draws.sign * scale
    centre, sides = boxes[:, :2] + moved[..., :2] * boxes[:, 2:] / 2, boxes[:, 2:] * (1 + moved[..., 2:])
    return torch.cat((centre, sides), -1).clamp(0, 1)


def query_places(targets: Targets, copies: int, most: int) -> tuple[Tensor, Tensor]:
    """Where the copies of every object stand among the queries: image [G] and row [copies, G]."""
    counts = torch.tensor(targets.counts, device=targets.labels.device)
    first = counts.cumsum(0) - counts
    within = torch.arange(len(targets.labels), device=counts.device) - first[targets.image]
    return targets.image, torch.arange(copies, device=counts.device)[:, None] * most + within


def noised_queries(embed: Callable[[Tensor, Tensor], Queries], targets: Targets, labels: Tensor, boxes: Tensor, most: int) -> Queries:
    """The queries of noised labels [copies, G] and boxes [copies, G, 4]; rows without an object are not valid.

    `embed` makes queries of labels [B, N] and boxes [B, N, 4]. Where the step has no objects there is one invalid row, so that every
    parameter still gets a gradient.
    """
    images, copies = len(targets.counts), len(labels)
    rows = max(copies * most, 1)
    image, row = query_places(targets, copies, most)
    image = image.expand(copies, -1)
    padded_labels = labels.new_zeros(images, rows)
    padded_boxes = boxes.new_full((images, rows, 4), 0.5)
    valid = torch.zeros(images, rows, dtype=torch.bool, device=labels.device)
    padded_labels[image, row], padded_boxes[image, row], valid[image, row] = labels, boxes, True
    queries = embed(padded_labels, padded_boxes)
    return replace(queries, content=torch.where(valid[..., None], queries.content, 0), valid=valid)


def label_queries(student: Detector, layers: LabelLayers, labels: Tensor, boxes: Tensor) -> Queries:
    """Queries that say a class and a box, by layers of the objective. Of a box, a query about a point has the centre (D-211)."""
    content = layers.content(labels)
    return Queries(content, boxes, student.takes_boxes, position=student.position_of(layers.position, boxes, content))


def known_match(targets: Targets, groups: int, most: int, copies: int = 2) -> Match:
    """The positives of every denoising group with their objects, at one stage; P = groups * G. `copies`: of an object in a group."""
    image, row = query_places(targets, copies * groups, most)
    target = torch.arange(len(targets.labels), device=row.device)
    counts = tuple(count * groups for count in targets.counts)
    return Match(image.repeat(groups), row[::copies].flatten(), target.repeat(groups), counts=counts)


def repeat_stages(match: Match, stages: Stages, objects: int) -> Match:
    """The same match at every stage, in folded indices."""
    count, images = stages.logits.shape[:2]
    stage = torch.arange(count, device=match.image.device)[:, None]
    image, target = (match.image + stage * images).flatten(), (match.target + stage * objects).flatten()
    return Match(image, match.query.repeat(count), target, counts=match.counts and match.counts * count)
