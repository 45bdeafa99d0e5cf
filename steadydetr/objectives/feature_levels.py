"""What all feature objectives share: the levels that student and teacher both have, and how much of the gradient an objective makes.

Legend: L tokens of a level (h * w, row by row), d_S and d_T channels of student and teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steadydetr.lazy import torch
from steadydetr.learning.context import StepContext
from steadydetr.objectives.base import require_teacher
from steadydetr.structures import Losses, Memory, at_least_float32

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector

FeatureSource = Literal["encoder", "inputs"]  # what comes out of the encoder, or what went into it


@dataclass(frozen=True)
class Level:
    """A level of one stride, as both models see it."""

    student: Tensor  # [B, L, d_S]
    teacher: Tensor  # [B, L, d_T], without gradient
    padding: Tensor  # [B, L] bool
    size: tuple[int, int]  # (h, w)
    extent: Tensor  # [B, 2] (w, h) in cells, of the part that is image
    start: int  # of its tokens among all tokens of the student

    def as_map(self, tokens: Tensor) -> Tensor:
        """[B, L, d] -> [B, d, h, w]."""
        return tokens.transpose(1, 2).unflatten(2, self.size)


def common_strides(student: Detector, teacher: Detector) -> list[int]:
    """The strides of the levels that both have, fine to coarse."""
    return [stride for stride in student.strides if stride in teacher.strides]


def check_levels(name: str, teacher: str, student: Detector, teachers: Mapping[str, Detector]) -> None:
    """Raises ValueError where there is no such teacher, or one without any level of the student's, or with maps of other sizes."""
    require_teacher(name, teacher, teachers)
    theirs = teachers[teacher]
    if not common_strides(student, theirs):
        raise ValueError(
            f"objective {name} compares feature levels of the same stride, but the student's strides are {list(student.strides)}"
            f" and those of {teacher!r} {list(theirs.strides)}"
        )
    size = odd_size(max(*student.strides, *theirs.strides))
    ours, given = map_sizes(student, size), map_sizes(theirs, size)
    apart = [f"stride {s}: {ours[s]} and {given[s]}" for s in common_strides(student, theirs) if ours[s] != given[s]]
    if apart:
        raise ValueError(
            f"objective {name} compares feature maps cell by cell, but of an image whose sides are no multiple of the strides student and"
            f" {teacher!r} have maps of other sizes, because their backbones round differently (height and width of the maps of an image"
            f" of {size[0]} x {size[1]} pixels at {'; '.join(apart)}). Take backbones that round alike, or --objectives.{name} none"
        )


def odd_size(stride: int) -> tuple[int, int]:
    """(height, width) of an image for which two models have maps of different sizes, if they have so for any image.

    A height one pixel above a multiple of `stride` shows whether sizes are rounded up or down. A width one pixel below it also shows this
    where the first layer rounds up and only a later one rounds down.
    """
    return 2 * stride + 1, 2 * stride - 1


def map_sizes(detector: Detector, size: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """(h, w) of the map of every stride, from an empty image. Neither the model nor the random numbers of the run are changed."""
    from steadydetr.detectors.base import evaluating

    images = detector.mean.new_zeros(1, detector.image_channels, *size)
    with torch.no_grad(), evaluating(detector):
        memory = detector.encode(images, torch.zeros(1, *size, dtype=torch.bool, device=images.device))
    return dict(zip(detector.strides, memory.levels, strict=True))


def shared_levels(
    context: StepContext, objective: str, teacher: str, source: FeatureSource, losses: Losses, with_padding: bool = False
) -> list[Level]:
    """The levels of every stride that both models have, in float32 or better, 0 in the padding unless `with_padding`.

    Logs `objective`/gradient_share.
    """
    teacher_output = context.teacher_outputs[teacher]
    mine = _by_stride(watched(_tokens(context.memory, source), objective, losses), context.memory, context.student)
    theirs = _by_stride(_tokens(teacher_output.memory, source), teacher_output.memory, context.teachers[teacher])
    padding = _by_stride(context.memory.padding, context.memory, context.student)
    levels = []
    for stride in common_strides(context.student, context.teachers[teacher]):
        size, start, student = mine[stride]
        if size != theirs[stride][0]:
            raise ValueError(f"at stride {stride} the student's map has {size}, the teacher's {theirs[stride][0]} cells")
        empty = padding[stride][2]
        student, given = at_least_float32(student), at_least_float32(theirs[stride][2])
        if not with_padding:
            student, given = (tokens.masked_fill(empty[..., None], 0) for tokens in (student, given))
        index = context.student.strides.index(stride)
        extent = context.memory.valid_ratios[:, index] * torch.tensor(size[::-1], device=empty.device)
        levels.append(Level(student, given, empty, size, extent, start))
    return levels


def _tokens(memory: Memory, source: FeatureSource) -> Tensor:
    return memory.tokens if source == "encoder" else memory.inputs


def _by_stride(tokens: Tensor, memory: Memory, detector: Detector) -> dict[int, tuple[tuple[int, int], int, Tensor]]:
    """Size, first token and tokens [B, L, ...] of every level."""
    lengths = [h * w for h, w in memory.levels]
    parts = tokens.split(lengths, dim=1)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return dict(zip(detector.strides, zip(memory.levels, starts, parts, strict=True), strict=True))


def watched(tokens: Tensor, name: str, losses: Losses) -> Tensor:
    """The same tokens for one objective alone, which logs its share of their gradient as `name`/gradient_share.

    The share is ||g|| / (||g|| + ||rest||), where g is the gradient of the objective with respect to the tokens and rest that of all other
    terms. The backward pass writes it into the measure.
    """
    if not tokens.requires_grad:
        return tokens
    share = torch.zeros((), device=tokens.device)
    losses.measure(f"{name}/gradient_share", share)
    mine = tokens.view_as(tokens)
    own: list[Tensor] = []

    def measure_share(total: Tensor) -> None:
        gradient = own.pop() if own else torch.zeros_like(total)
        a, b = gradient.float().norm(), (total - gradient).float().norm()
        share.copy_(a / (a + b).clamp(min=torch.finfo(a.dtype).tiny))

    mine.register_hook(own.append)
    tokens.register_hook(measure_share)
    return mine
