"""The few types that everything meets at.

Legend, here and in every file:
    B images   S decoder stages   N queries   C classes   D width   L tokens   P matched pairs   G objects in the batch
    R problem rows: one per (stage, object), stage by stage: R = S * G

Boxes are (centre x, centre y, width, height), normalised by the true size of the image (padding excluded),
unless a name says otherwise (`boxes_xyxy`). A mask that is True means padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, flat: image after image. `counts` lives on the host, so splitting needs no synchronisation."""

    labels: Tensor  # [G] int64, 0-based class indices
    boxes: Tensor  # [G, 4]
    counts: tuple[int, ...]  # objects of each image
    masks: Tensor | None = None  # [G, H, W] bool

    @property
    def image(self) -> Tensor:  # [G] the image of every object
        counts = torch.tensor(self.counts, device=self.labels.device)
        return torch.arange(len(self.counts), device=self.labels.device).repeat_interleave(counts, output_size=sum(self.counts))

    def repeat_batch(self, times: int) -> Targets:
        """The targets of `times` copies of the batch: those of folded stages, where a stage is one more image."""
        masks = None if self.masks is None else self.masks.repeat(times, 1, 1)
        return Targets(self.labels.repeat(times), self.boxes.repeat(times, 1), self.counts * times, masks)

    def split(self) -> list[Targets]:
        """One `Targets` per image."""
        labels, boxes = self.labels.split(self.counts), self.boxes.split(self.counts)
        masks: Sequence[Tensor | None] = [None] * len(self.counts) if self.masks is None else self.masks.split(self.counts)
        return [Targets(l, b, (n,), m) for l, b, n, m in zip(labels, boxes, self.counts, masks, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Targets]) -> Targets:
        masks = [part.masks for part in parts]
        return Targets(
            torch.cat([part.labels for part in parts]),
            torch.cat([part.boxes for part in parts]),
            tuple(n for part in parts for n in part.counts),
            None if any(m is None for m in masks) else torch.cat([m for m in masks if m is not None]),
        )

    def to(self, device: torch.device | str) -> Targets:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Targets(move(self.labels), move(self.boxes), self.counts, None if self.masks is None else move(self.masks))


@dataclass(frozen=True)
class Totals:
    """What one optimiser step sees over all ranks and accumulated micro-batches; the normalisers come from here alone."""

    objects: int
    most_objects: int  # of any single image
    images: int

    @property
    def normaliser(self) -> float:
        """Objects of the whole step, at least 1: the clamp acts on the global sum."""
        return float(max(self.objects, 1))


@dataclass(frozen=True)
class Batch:
    images: Tensor  # [B, 3, H, W] RGB in 0..1 (float) or 0..255 (uint8); anything in the padding is ignored
    padding: Tensor  # [B, H, W] bool
    targets: Targets
    image_ids: tuple[int, ...]  # unique in the data set; they seed the denoising noise
    sizes: tuple[tuple[int, int], ...]  # (h, w) without padding
    original_sizes: tuple[tuple[int, int], ...]  # (h, w) of the file, what results are reported in
    totals: Totals | None = None  # None: this batch is the whole step
    step: int = 0
    seed: int = 0

    @property
    def global_totals(self) -> Totals:
        counts = self.targets.counts
        return self.totals or Totals(sum(counts), max(counts, default=0), len(counts))

    def to(self, device: torch.device | str) -> Batch:
        images, padding = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.padding))
        return replace(self, images=images, padding=padding, targets=self.targets.to(device))


@dataclass(frozen=True)
class Memory:
    """What the decoder looks at. Levels run fine to coarse, tokens row by row."""

    tokens: Tensor  # [B, L, D] encoder output
    padding: Tensor  # [B, L] bool
    levels: tuple[tuple[int, int], ...]  # (h, w) of every level
    valid_ratios: Tensor  # [B, levels, 2] float32 (w, h): the share of a level that is image
    inputs: Tensor  # [B, L, D] tokens before the encoder
    dense: DenseProposals | None = None  # two-stage detectors only


@dataclass(frozen=True)
class DenseProposals:
    """A box and class scores for every token: the encoder's own predictions of a two-stage detector."""

    logits: Tensor  # [B, L, C]
    boxes_unsigmoid: Tensor  # [B, L, 4], +inf at invalid tokens
    anchors: Tensor  # [B, L, 4] after the sigmoid, the boxes that the deltas were added to; 1 at invalid tokens
    content: Tensor  # [B, L, D] normalised projection that the heads saw


@dataclass(frozen=True)
class Queries:
    content: Tensor  # [B, N, D] what the first decoder stage receives
    reference: Tensor  # [B, N, 4] in 0..1; only the centre means something where not `sized`
    sized: bool = True
    valid: Tensor | None = None  # [B, N] bool, None: all are
    position: Tensor | None = None  # [B, N, D] a position vector of their own; None: the decoder makes it from the reference
    token: Tensor | None = None  # [B, N] the encoder token that each query comes from


@dataclass(frozen=True)
class Match:
    """Pairs of a query and a target. In folded stages `image` is stage * B + image and `target` is stage * G + object."""

    image: Tensor  # [P]
    query: Tensor  # [P]
    target: Tensor  # [P]
    weight: Tensor | None = None  # [P], None: 1


@dataclass(frozen=True)
class MatchResult:
    match: Match
    cost: Tensor  # [R, N] every target against the queries of its own image


@dataclass(frozen=True)
class Assignment:
    """Who learns what. More than one class match: the union of their class targets (OD-DETR Eq. 3)."""

    classes: tuple[Match, ...]
    boxes: Match


@dataclass(frozen=True)
class QueryGroup:
    """Queries that go through the decoder together and see each other, and the groups named in `sees`."""

    name: str
    queries: Queries
    sees: tuple[str, ...] = ()
    blocks: Tensor | None = None  # [N] int: rows of other blocks are invisible
    known: Match | None = None  # of one stage, where the assignment needs no solving (denoising)


@dataclass(frozen=True)
class Stages:
    """What the decoder (or, as one stage, the encoder's proposals) predicts. Stages stay folded up to the losses."""

    logits: Tensor  # [S, B, N, C]
    boxes: Tensor  # [S, B, N, 4]
    content: Tensor | None = None  # [S, B, N, D] what the next stage receives
    reference: Tensor | None = None  # [S, B, N, 4] the base that each stage refined
    valid: Tensor | None = None  # [B, N] bool, or [S, B, N]
    masks: Tensor | None = None  # [S, B, N, h, w]

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Logits [S*B, N, C] and boxes [S*B, N, 4]: a stage is one more image."""
        return self.logits.flatten(0, 1), self.boxes.flatten(0, 1)

    @property
    def flat_valid(self) -> Tensor | None:
        """[S*B, N] bool."""
        return None if self.valid is None else self.valid.expand(self.logits.shape[:3]).flatten(0, 1)

    def in_float32(self) -> Stages:
        """Logits, boxes and content in float32 or better."""
        content = None if self.content is None else at_least_float32(self.content)
        return replace(self, logits=at_least_float32(self.logits), boxes=at_least_float32(self.boxes), content=content)

    def __getitem__(self, stages: slice) -> Stages:
        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[stages]

        return Stages(self.logits[stages], self.boxes[stages], pick(self.content), pick(self.reference), self.valid, pick(self.masks))


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class Losses:
    """Named loss terms, each a value per stage with its weight, and measures beside them. A name used twice is an error."""

    def __init__(self) -> None:
        self._terms: dict[str, tuple[Tensor, float]] = {}
        self.measures: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, weight: float) -> None:
        """`values`: [S] unweighted, already normalised."""
        if name in self._terms:
            raise ValueError(f"loss {name!r} was added twice; two objectives share a name")
        self._terms[name] = (values, weight)

    def measure(self, name: str, value: Tensor) -> None:
        """A number to be logged: a scalar, detached."""
        if name in self.measures:
            raise ValueError(f"measure {name!r} was taken twice; two objectives share a name")
        self.measures[name] = value.detach()

    def __iter__(self) -> Iterator[tuple[str, Tensor, float]]:
        return ((name, values, weight) for name, (values, weight) in self._terms.items())

    def __getitem__(self, name: str) -> Tensor:
        return self._terms[name][0]

    @property
    def total(self) -> Tensor:
        """The scalar that is back-propagated."""
        return torch.stack([values.sum() * weight for values, weight in self._terms.values()]).sum()

    def weighted(self) -> dict[str, Tensor]:
        """Each term summed over its stages, times its weight, detached."""
        return {name: values.detach().sum() * weight for name, (values, weight) in self._terms.items()}
