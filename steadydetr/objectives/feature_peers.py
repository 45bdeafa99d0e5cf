"""Feature distillation of detectors with convolutions, which DETRDistill is compared with (its Tables 1 and 3): FGD, MGD, FKD, FGFI.

Each compares the levels that student and teacher share with trained modules for every level, sums over levels and divides by the images
of the step. Padding is left out everywhere.  # D-49

Legend: B images, L tokens of a level, d channels of the teacher, G objects. Terms are [1], summed over the images of the batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.detectors.base import Detector
from steadydetr.equations.distill import (
    background,
    channel_attention,
    channel_weights,
    foreground,
    imitated,
    spatial_attention,
    spatial_weights,
)
from steadydetr.kinds import register
from steadydetr.learning.context import StepContext
from steadydetr.nn.anchors import token_anchors
from steadydetr.objectives.base import Matched, Objective, Predicted
from steadydetr.objectives.feature_levels import Level, Source, check_levels, common_strides, shared_levels
from steadydetr.structures import Batch, Losses, Targets, seed_of, without_autocast

COARSEST = 64  # FKD pools its maps to this stride, because its non-local block relates every cell to every other


@dataclass(frozen=True)
class FeaturePeer(Objective):
    """What the four have in common: shared levels, a trained module for each, and terms that are summed over levels."""

    teacher: str = "teacher"
    source: Source = "encoder"

    def check(self, student: Detector, teachers: Mapping[str, Detector]) -> None:
        check_levels(self.name, self.teacher, student, teachers)

    def prepare(self, student: Detector, teachers: Mapping[str, Detector]) -> nn.Module:
        teacher = teachers[self.teacher]
        return nn.ModuleList(self.module(student.width, teacher.width, stride) for stride in common_strides(student, teacher))

    @abstractmethod
    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        """The module that is trained for one level, for a student and a teacher with so many channels."""

    @abstractmethod
    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        """The terms of one level with their weights, by name; `module` is what `self.module` made for it."""

    def add_losses(self, losses: Losses, context: StepContext, stages: Predicted, matched: Matched) -> None:
        levels = shared_levels(context, self.name, self.teacher, self.source, losses)
        modules = cast(nn.ModuleList, context.adapters[self.name])
        with without_autocast(context.memory.tokens):
            found = [self.terms(module, level, context) for module, level in zip(modules, levels, strict=True)]
        for part, (_, weight) in found[0].items():
            total = torch.stack([terms[part][0] for terms in found]).sum(0)
            losses.add(f"{self.name}/{part}", total / context.batch.global_totals.images, weight)


def align(student: int, teacher: int) -> nn.Module:
    """A linear layer from the student's channels to the teacher's; nothing where their numbers are the same."""
    return nn.Linear(student, teacher) if student != teacher else nn.Identity()


def square_sum(values: Tensor, padding: Tensor) -> Tensor:
    """The sum of squares over all valid tokens: [B, L, d] -> [1]."""
    return values.masked_fill(padding[..., None], 0).square().sum().reshape(1)


def boxes_in_cells(targets: Targets, level: Level) -> Tensor:
    """The targets' boxes in cells of the level, [G, 4] xyxy."""
    return to_xyxy(targets.boxes) * level.extent[targets.image].repeat(1, 2).to(targets.boxes)


# FGD


@register("fgd")
@dataclass(frozen=True)
class FGD(FeaturePeer):
    """Focal and global distillation (Yang et al. 2022). Weights: those for anchor-based one-stage detectors, as in DETRDistill's code."""

    foreground: float = 1e-3  # alpha
    background: float = 5e-4  # beta
    attention: float = 5e-4  # gamma
    context: float = 5e-6  # lambda
    temperature: float = 0.5
    focal: bool = True  # squared differences are weighted by the teacher's attention

    @property
    def name(self) -> str:
        return "fgd"

    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        return nn.ModuleDict({"align": align(student, teacher), "student": ContextBlock(teacher), "teacher": ContextBlock(teacher)})

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        parts = cast(nn.ModuleDict, module)
        student, teacher, padding = parts["align"](level.student), level.teacher, level.padding
        boxes = boxes_in_cells(context.targets, level).to(teacher.dtype)
        covered = foreground(boxes, context.targets.image, len(teacher), level.size)
        places, kinds = self._attention(teacher, padding)
        places_s, kinds_s = self._attention(student, padding)
        error = (teacher - student).masked_fill(padding[..., None], 0).square()
        error = (error * kinds[:, None]).sum(-1) * places if self.focal else error.sum(-1)
        attention = (kinds_s - kinds).abs().sum() + (places_s - places).abs().sum()
        global_context = parts["student"](student, padding) - parts["teacher"](teacher, padding)
        return {
            "foreground": ((error * covered).sum().reshape(1), self.foreground),
            "background": ((error * background(covered, padding)).sum().reshape(1), self.background),
            "attention": (attention.reshape(1), self.attention),
            "context": (square_sum(global_context, padding), self.context),
        }

    def _attention(self, features: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """The attention of places [B, L] and of channels [B, d]."""
        places = spatial_weights(spatial_attention(features), padding, self.temperature)
        return places, channel_weights(channel_attention(features, padding), self.temperature)


class ContextBlock(nn.Module):
    """The global context block (Cao et al. 2019) of FGD: one context of the whole map is added to every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.where = nn.Linear(width, 1)
        self.what = nn.Sequential(nn.Linear(width, width // 2), nn.LayerNorm(width // 2), nn.ReLU(), nn.Linear(width // 2, width))
        nn.init.kaiming_normal_(self.where.weight, mode="fan_in")
        for parameter in (self.where.bias, *self.what[3].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, padding: Tensor) -> Tensor:
        """[B, L, d], [B, L] -> [B, L, d]."""
        weights = self.where(features)[..., 0].masked_fill(padding, -torch.inf).softmax(-1)
        return features + self.what(weights[:, None] @ features)


# MGD


@register("mgd")
@dataclass(frozen=True)
class MGD(FeaturePeer):
    """Masked generative distillation (Yang et al. 2022): the teacher's map is generated from the student's, parts of which are left out."""

    weight: float = 2e-5  # alpha, of its detectors
    masked: float = 0.65  # share of the places that are left out, lambda

    @property
    def name(self) -> str:
        return "mgd"

    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        return Generator(student, teacher)

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        kept = (random_places(context.batch, level) <= 1 - self.masked).to(level.student)
        return {"generated": (square_sum(module(level, kept) - level.teacher, level.padding), self.weight)}


class Generator(nn.Module):
    """Two convolutions that fill in what is left out of a map."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.align = align(student, teacher)
        self.first, self.second = (nn.Conv2d(teacher, teacher, 3, padding=1) for _ in range(2))

    def forward(self, level: Level, kept: Tensor) -> Tensor:
        """`kept`: [B, L], 0 where the student's token is left out -> [B, L, d]."""
        padding = level.padding.unflatten(1, level.size)[:, None]
        seen = level.as_map(self.align(level.student) * kept[..., None]).masked_fill(padding, 0)
        return self.second(self.first(seen).relu().masked_fill(padding, 0)).flatten(2).transpose(1, 2)


def random_places(batch: Batch, level: Level) -> Tensor:
    """A random number in 0..1 for every token, [B, L]: a function of seed, step, image and level, however images are dealt to ranks."""
    numbers = []
    for image_id in batch.image_ids:
        generator = torch.Generator().manual_seed(seed_of(batch.seed, batch.step, image_id, level.start))
        numbers.append(torch.rand(level.padding.shape[1], generator=generator))
    return torch.stack(numbers).to(level.padding.device, non_blocking=True)


# FKD


@register("fkd")
@dataclass(frozen=True)
class FKD(FeaturePeer):
    """Attention-guided and non-local distillation (Zhang and Ma 2021). Weights and temperature: those for two-stage detectors."""

    feature: float = 7e-5
    attention: float = 4e-3
    relation: float = 7e-5
    temperature: float = 0.1

    @property
    def name(self) -> str:
        return "fkd"

    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        pool = max(COARSEST // stride, 1)
        return nn.ModuleDict(
            {
                "align": align(student, teacher),
                "student": NonLocalBlock(teacher, pool),
                "teacher": NonLocalBlock(teacher, pool),
                "relation": nn.Linear(teacher, teacher),
            }
        )

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        parts = cast(nn.ModuleDict, module)
        student, teacher, padding = parts["align"](level.student), level.teacher, level.padding
        difference = (teacher - student).masked_fill(padding[..., None], 0)
        places_s, places_t = (spatial_attention(features).masked_fill(padding, 0) for features in (student, teacher))
        kinds_s, kinds_t = (channel_attention(features, padding) for features in (student, teacher))
        with torch.no_grad():
            places = spatial_weights(places_s + places_t, padding, self.temperature)
            kinds = channel_weights(kinds_s + kinds_t, self.temperature)
            focus = (places[..., None] * kinds[:, None]).sqrt()
        cells, empty = parts["student"](student, level)
        relation = (parts["relation"](cells) - parts["teacher"](teacher, level)[0]).masked_fill(empty, 0)
        return {
            "feature": (norms(difference * focus), self.feature),
            "attention": (norms(places_s - places_t) + norms(kinds_s - kinds_t), self.attention),
            "relation": (norms(relation), self.relation),
        }


def norms(values: Tensor) -> Tensor:
    """The norms of every image's values, summed: [B, ...] -> [1]."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1).sum().reshape(1)


class NonLocalBlock(nn.Module):
    """Every cell of the pooled map attends to every other one (Wang et al. 2018, embedded Gaussian); the result is added to the cell."""

    def __init__(self, width: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.query, self.key, self.value = (nn.Linear(width, width // 2) for _ in range(3))
        self.output = nn.Linear(width // 2, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """[B, L, d] -> cells [B, n, d], and whether a cell has no valid token [B, n, 1]."""
        valid = (~level.padding).to(features.dtype)[..., None]
        pooled, share = (self._pool(level.as_map(x)) for x in (features * valid, valid))
        empty = share == 0
        cells = pooled / share.masked_fill(empty, 1)
        affinity = self.query(cells) @ self.key(cells).transpose(1, 2)
        weights = affinity.masked_fill(empty.transpose(1, 2), -torch.inf).softmax(-1)
        return cells + self.output(weights @ self.value(cells)), empty

    def _pool(self, maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, self.pool, ceil_mode=True).flatten(2).transpose(1, 2)


# FGFI


@register("fgfi")
@dataclass(frozen=True)
class FGFI(FeaturePeer):
    """Fine-grained feature imitation (Wang et al. 2019): only near objects, as the overlaps of anchors tell.

    DETRs have no anchors. The boxes that encoders add their proposals to (Deformable DETR A.4) are used instead: one a token, at fixed
    places, which need no detector with proposals.  # D-50
    """

    weight: float = 0.01
    threshold: float = 0.5  # of the best anchor's overlap, psi

    @property
    def name(self) -> str:
        return "fgfi"

    def module(self, student: int, teacher: int, stride: int) -> nn.Module:
        return nn.Conv2d(student, teacher, 3, padding=1)

    def terms(self, module: nn.Module, level: Level, context: StepContext) -> dict[str, tuple[Tensor, float]]:
        near = self.near(level, context)
        adapted = module(level.as_map(level.student)).flatten(2).transpose(1, 2)
        error = (adapted - level.teacher).square().sum(-1)
        value = (error * near).sum(1) / (2 * near.sum(1)).clamp(min=1)
        return {"imitated": (value.sum().reshape(1), self.weight)}

    def near(self, level: Level, context: StepContext) -> Tensor:
        """The cells that are learned, [B, L] bool."""
        part = slice(level.start, level.start + level.padding.shape[1])
        anchors, usable = (values[:, part] for values in token_anchors(context.memory))
        targets = context.targets
        iou, _ = iou_giou(to_xyxy(anchors)[targets.image], to_xyxy(targets.boxes.to(anchors.dtype))[:, None])
        return imitated(iou * usable[targets.image], targets.image, len(anchors), self.threshold)
