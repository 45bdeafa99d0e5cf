"""The types that detectors, objectives and the training loop exchange.

Legend, here and in every file:
    B images     S decoder stages of the student (or of the only model)     T those of its teacher
    N queries    M queries of the teacher    K chosen queries, tokens or predictions; slots for them are as many in every image
    Q identities of queries, which outlive a step: the encoder tokens that they come from, or their numbers
    C classes    D channels of tokens and queries    L tokens, of all levels or of one
    G objects of the batch    P matched pairs of a query and an object
    R problem rows, one for every stage and object, stage by stage: row = stage * G + object
    F folded images, where a stage is one more image: folded image = stage * B + image

Boxes are (centre x, centre y, width, height), normalised by the true size of the image (padding excluded),
unless a name says otherwise (`boxes_xyxy`). A mask that is True means padding.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from steadydetr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


Levels = tuple[tuple[int, int], ...]  # (h, w) of every feature level, fine to coarse


def at_least_float32(tensor: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_autocast(tensor: Tensor) -> torch.autocast:
    """A context for what bfloat16 is too coarse for: operations on the device of `tensor` keep the types of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows of every image (and stage): [..., N, D] and [..., K] -> [..., K, D]."""
    return tensor.gather(-2, rows[..., None].expand(*rows.shape, tensor.shape[-1]))


def seed_of(*parts: int | str) -> int:
    """A seed that is a function of these numbers and texts alone, for example of the run's seed, the step and the image."""
    return hash(tuple(zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts)) % 2**63


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, flat: image after image. `counts` lives on the host, so splitting needs no synchronisation."""

    labels: Tensor  # [G] int64, 0-based class indices
    boxes: Tensor  # [G, 4]
    counts: tuple[int, ...]  # objects of each image
    masks: Tensor | None = None  # [G, H, W] uint8 of the padded images, 1 inside of the object; None: not read
    seeds: tuple[int, ...] = ()  # one for each image, of the places at which masks are compared; see `Batch.seeded_targets`

    @property
    def image(self) -> Tensor:  # [G] the image of every object
        counts = torch.tensor(self.counts, device=self.labels.device)
        return torch.arange(len(self.counts), device=self.labels.device).repeat_interleave(counts, output_size=sum(self.counts))

    def repeat_batch(self, times: int) -> Targets:
        """The targets of `times` copies of the batch: those of folded stages, where a stage is one more image. Masks are not copied."""
        return Targets(self.labels.repeat(times), self.boxes.repeat(times, 1), self.counts * times)

    def split(self) -> list[Targets]:
        """One `Targets` per image."""
        masks = [None] * len(self.counts) if self.masks is None else self.masks.split(self.counts)
        seeds: list[tuple[int, ...]] = [(seed,) for seed in self.seeds] or [()] * len(self.counts)
        parts = zip(self.labels.split(self.counts), self.boxes.split(self.counts), self.counts, masks, seeds, strict=True)
        return [Targets(labels, boxes, (count,), of_image, seed) for labels, boxes, count, of_image, seed in parts]

    @staticmethod
    def cat(parts: Sequence[Targets]) -> Targets:
        """The targets of all images together; with masks where all parts have them, of one size."""
        masks = [part.masks for part in parts if part.masks is not None]
        return Targets(
            torch.cat([part.labels for part in parts]),
            torch.cat([part.boxes for part in parts]),
            tuple(n for part in parts for n in part.counts),
            torch.cat(masks) if masks and len(masks) == len(parts) else None,
            tuple(seed for part in parts for seed in part.seeds),
        )

    def with_box_masks(self, size: tuple[int, int]) -> Targets:
        """The same with masks that fill the boxes, of images of (height, width) without padding: for made-up batches."""
        height, width = size
        y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
        cx, cy, w, h = (self.boxes.cpu() * torch.tensor([width, height, width, height])).unbind(-1)
        inside = (2 * (x - cx[:, None, None]).abs() < w[:, None, None]) & (2 * (y - cy[:, None, None]).abs() < h[:, None, None])
        return replace(self, masks=inside.byte().to(self.boxes.device))

    def pin_memory(self) -> Targets:
        """A copy in page-locked memory."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(self, labels=self.labels.pin_memory(), boxes=self.boxes.pin_memory(), masks=masks)

    def to(self, device: torch.device | str) -> Targets:
        """A copy on the device; the host does not wait for it, if this lies in page-locked memory."""
        labels, boxes = (tensor.to(device, non_blocking=True) for tensor in (self.labels, self.boxes))
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return replace(self, labels=labels, boxes=boxes, masks=masks)


@dataclass(frozen=True)
class Totals:
    """What one optimiser step sees over all ranks and accumulated micro-batches; losses are divided by these numbers alone."""

    objects: int
    most_objects: int  # of any single image
    images: int
    counts: tuple[int, ...] = ()  # objects of every image, in any order; empty in files of versions that kept their sum alone

    @classmethod
    def of(cls, counts: Sequence[int]) -> Totals:
        """Those of a step whose images have so many objects."""
        return cls(sum(counts), max(counts, default=0), len(counts), tuple(counts))

    @property
    def object_counts(self) -> tuple[int, ...]:
        """Objects of every image; where only their sum is known it is spread evenly."""
        if self.counts:
            return self.counts
        least, more = divmod(self.objects, max(self.images, 1))
        return (least + 1,) * more + (least,) * (self.images - more)

    @property
    def normaliser(self) -> float:
        """Objects of the whole step, but at least 1. The minimum is applied to the sum over all ranks, not on each."""
        return float(max(self.objects, 1))


@dataclass(frozen=True)
class Batch:
    """Padded images with their objects, and what the random numbers of their step are seeded by."""

    images: Tensor  # [B, 3, H, W] RGB in 0..1 (float) or 0..255 (uint8); anything in the padding is ignored
    padding: Tensor  # [B, H, W] bool
    targets: Targets
    image_ids: tuple[int | str, ...]  # unique in the data set; they seed the denoising noise
    original_sizes: tuple[tuple[int, int], ...]  # (h, w) of the file, what results are reported in
    totals: Totals | None = None  # None: this batch is the whole step
    step: int = 0
    seed: int = 0

    @property
    def global_totals(self) -> Totals:
        """The totals of the step: those that were given, or this batch's own."""
        return self.totals or Totals.of(self.targets.counts)

    @property
    def seeded_targets(self) -> Targets:
        """The targets with a seed for every image, if they have masks: a function of seed, step and image id, on whatever rank it is."""
        if self.targets.masks is None:
            return self.targets
        return replace(self.targets, seeds=tuple(seed_of(self.seed, self.step, image_id) for image_id in self.image_ids))

    def split(self) -> list[Batch]:
        """One `Batch` per image, as a part of the same step."""
        parts = zip(self.images.split(1), self.padding.split(1), self.targets.split(), self.image_ids, self.original_sizes, strict=True)
        step = replace(self, totals=self.global_totals)
        return [replace(step, images=i, padding=p, targets=t, image_ids=(n,), original_sizes=(size,)) for i, p, t, n, size in parts]

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory."""
        return replace(self, images=self.images.pin_memory(), padding=self.padding.pin_memory(), targets=self.targets.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """A copy on the device; the host does not wait for it, if this lies in page-locked memory."""
        images, padding = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.padding))
        return replace(self, images=images, padding=padding, targets=self.targets.to(device))


@dataclass(frozen=True)
class Memory:
    """What the decoder reads: the image as tokens. Levels run fine to coarse, the tokens of a level row by row."""

    tokens: Tensor  # [B, L, D] encoder output
    padding: Tensor  # [B, L] bool
    levels: Levels
    valid_ratios: Tensor  # [B, levels, 2] float32 (w, h): the share of a level that is image
    inputs: Tensor  # [B, L, D] tokens before the encoder


@dataclass(frozen=True)
class MeasuredMemory(Memory):
    """The memory of a detector whose decoder counts in pixels."""

    sizes: Tensor  # [B, 2] float32 (w, h) of each image in pixels, padding excluded


@dataclass(frozen=True)
class TwoStageMemory(Memory):
    """The memory of a two-stage detector, whose encoder also predicts a box and class scores for every token."""

    dense: DenseProposals

    @staticmethod
    def of(memory: Memory, dense: DenseProposals) -> TwoStageMemory:
        """The memory with the encoder's predictions."""
        return TwoStageMemory(memory.tokens, memory.padding, memory.levels, memory.valid_ratios, memory.inputs, dense)


@dataclass(frozen=True)
class MaskMemory(TwoStageMemory):
    """The memory of a detector that predicts masks: the product of a query's vector with the vector of every pixel."""

    pixels: Tensor  # [B, D, h, w] over the padded image, at a part of its size
    pixel_padding: Tensor  # [B, h, w] bool


@dataclass(frozen=True)
class DenseProposals:
    """A box and class scores for every token: the encoder's own predictions of a two-stage detector."""

    logits: Tensor  # [B, L, C]
    boxes_unsigmoid: Tensor  # [B, L, 4], +inf at invalid tokens
    anchors: Tensor  # [B, L, 4] after the sigmoid, the boxes that the deltas were added to; 1 at invalid tokens
    content: Tensor  # [B, L, D] normalised projection that the heads saw


def dense_proposals(memory: Memory) -> DenseProposals:
    """The encoder's predictions for every token; a TypeError where a one-stage detector made the memory."""
    if not isinstance(memory, TwoStageMemory):
        raise TypeError("this memory has no proposals: it was made by a one-stage detector")
    return memory.dense


@dataclass(frozen=True)
class Queries:
    """What goes into the first decoder stage: for every query a content vector and a reference point or box."""

    content: Tensor  # [B, N, D] what the first decoder stage receives
    reference: Tensor  # [B, N, 4] in 0..1; only the centre means something where not `sized`
    sized: bool = True
    valid: Tensor | None = None  # [B, N] bool, None: all are
    position: Tensor | None = None  # [B, N, D] a position vector of their own; None: the decoder makes it from the reference
    token: Tensor | None = None  # [B, N] the encoder token that each query comes from


@dataclass(frozen=True)
class Match:
    """Pairs of a query and a target, in folded indices: `image` is stage * B + image and `target` is stage * G + object."""

    image: Tensor  # [P]
    query: Tensor  # [P]
    target: Tensor  # [P]
    weight: Tensor | None = None  # [P] of the losses, None: 1
    share: Tensor | None = None  # [P] of the target that is learned: a factor of the class target and of the box losses, None: 1
    counts: tuple[int, ...] | None = None  # pairs of every folded image, where the host knows them

    @staticmethod
    def cat(parts: Sequence[Match]) -> Match:
        """The pairs of all parts, one part after the other. Where only some have weights or shares, those of the others are 1."""

        def joined(values: Sequence[Tensor | None]) -> Tensor | None:
            if all(value is None for value in values):
                return None
            given = zip(values, parts, strict=True)
            return torch.cat([torch.ones_like(part.query, dtype=torch.float32) if value is None else value for value, part in given])

        image, query, target = (torch.cat([getattr(part, name) for part in parts]) for name in ("image", "query", "target"))
        known = [part.counts for part in parts if part.counts is not None]
        counts = tuple(map(sum, zip(*known, strict=True))) if len(known) == len(parts) else None
        return Match(image, query, target, joined([part.weight for part in parts]), joined([part.share for part in parts]), counts)


@dataclass(frozen=True)
class MatchResult:
    """The solution of an assignment problem with the costs that it was solved for."""

    match: Match
    cost: Tensor  # [R, N] every target against the queries of its own image


@dataclass(frozen=True)
class MatchedQueries:
    """The query of every object at every stage, at most one each: a match as a table instead of a list of pairs."""

    query: Tensor  # [S, G] -1: the object has none
    image: Tensor  # [G] the image of every object
    images: int  # B

    @staticmethod
    def of(match: Match, targets: Targets, stages: int) -> MatchedQueries:
        """The table of a match between the targets of a batch and the queries of `stages` stages."""
        query = match.query.new_full((stages * sum(targets.counts),), -1)
        query[match.target] = match.query
        return MatchedQueries(query.view(stages, sum(targets.counts)), targets.image, len(targets.counts))

    @property
    def valid(self) -> Tensor:
        """[S, G] bool: which objects have a query."""
        return self.query >= 0

    @property
    def folded_image(self) -> Tensor:
        """[S, G] stage * B + image."""
        stage = torch.arange(len(self.query), device=self.image.device)
        return stage[:, None] * self.images + self.image

    def pairs(self, chosen: Tensor | None = None) -> Match:
        """The pairs of the chosen objects ([S, G] bool, or flat), stage by stage; None: of all that have a query."""
        target = (self.valid if chosen is None else chosen).flatten().nonzero()[:, 0]
        return Match(self.folded_image.flatten()[target], self.query.flatten()[target], target)

    def at_stages(self, stages: Sequence[int]) -> MatchedQueries:
        """The table of the given stages, in that order; a stage may come several times."""
        return replace(self, query=self.query[list(stages)])

    def repeated(self, times: int) -> MatchedQueries:
        """The stages of this table, `times` times one after the other."""
        return replace(self, query=self.query.repeat(times, 1))

    def renumbered(self, numbers: Tensor) -> MatchedQueries:
        """The table with other numbers for the queries: query n of an image becomes `numbers[image, n]`; -1 means that it has none.

        Args:
            numbers: [B, N], or [S, B, N] with numbers of each stage.
        """
        stage = torch.arange(len(self.query), device=self.image.device)[:, None]
        found = numbers.expand(len(self.query), -1, -1)[stage, self.image, self.query.clamp(min=0)]
        return replace(self, query=torch.where(self.valid, found, -1))


@dataclass(frozen=True)
class Assignment:
    """Which query learns which target. With more than one class match a query learns the union of their class targets (OD-DETR Eq. 3)."""

    classes: tuple[Match, ...]
    boxes: Match

    @staticmethod
    def of(match: Match) -> Assignment:
        """Class and box are learned of the same pairs."""
        return Assignment((match,), match)


@dataclass(frozen=True)
class QueryGroup:
    """Queries that go through the decoder together. They see each other and the groups named in `sees`."""

    name: str
    queries: Queries
    sees: tuple[str, ...] = ()
    blocks: Tensor | None = None  # [N] int: queries of different blocks do not see each other


@dataclass(frozen=True)
class MaskPredictions:
    """Instance masks of every query, not yet computed: a mask is the product of its query's vector with the vector of every pixel.

    N masks of an image would be the largest tensor of a step by far, and the losses need those of matched queries alone.
    """

    queries: Tensor  # [S, B, N, D]
    pixels: Tensor  # [B, D, h, w] over the padded image, at a part of its size

    def of(self, query: Tensor) -> Tensor:
        """[F, K, h, w] the masks, before the sigmoid, of chosen queries of every folded image: [F, K]."""
        vectors = take_rows(self.queries.flatten(0, 1), query)
        pixels = self.pixels.flatten(2).repeat(len(vectors) // len(self.pixels), 1, 1)
        return torch.bmm(vectors, pixels).unflatten(-1, self.pixels.shape[-2:])

    def __getitem__(self, stages: slice) -> MaskPredictions:
        """Those of some of the stages."""
        return replace(self, queries=self.queries[stages])

    @staticmethod
    def stack(parts: Sequence[MaskPredictions | None]) -> MaskPredictions | None:
        """The stages of all parts, which are of the same images, one part after the other; None where one has none."""
        given = [part for part in parts if part is not None]
        if not given or len(given) < len(parts):
            return None
        return replace(given[0], queries=torch.cat([part.queries for part in given]))


@dataclass(frozen=True)
class Stages:
    """Class scores and boxes at every stage; the proposals of an encoder are one stage. All stages are one tensor up to the losses."""

    logits: Tensor  # [S, B, N, C]
    boxes: Tensor  # [S, B, N, 4]
    valid: Tensor | None = None  # [B, N] bool, or [S, B, N]; None: all are
    masks: MaskPredictions | None = None  # of detectors that predict masks

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Logits [F, N, C] and boxes [F, N, 4]: a stage is one more image."""
        return self.logits.flatten(0, 1), self.boxes.flatten(0, 1)

    @property
    def flat_valid(self) -> Tensor | None:
        """[F, N] bool."""
        return None if self.valid is None else self.valid.expand(self.logits.shape[:3]).flatten(0, 1)

    def in_float32(self) -> Self:
        """Predictions in float32 or better."""
        return replace(self, logits=at_least_float32(self.logits), boxes=at_least_float32(self.boxes))

    def __getitem__(self, stages: slice) -> Self:
        """Some of the stages, such as `[-1:]`, the last one alone."""
        valid = self.valid if self.valid is None or self.valid.dim() == 2 else self.valid[stages]
        masks = None if self.masks is None else self.masks[stages]
        return replace(self, logits=self.logits[stages], boxes=self.boxes[stages], valid=valid, masks=masks)


@dataclass(frozen=True)
class DecodedStages(Stages):
    """What the decoder predicts, with the content and the reference of every stage."""

    content: Tensor = field(kw_only=True)  # [S, B, N, D] what the next stage receives
    reference: Tensor = field(kw_only=True)  # [S, B, N, 4] the base that each stage refined

    def in_float32(self) -> Self:
        """Predictions and content in float32 or better."""
        return replace(super().in_float32(), content=at_least_float32(self.content))

    def __getitem__(self, stages: slice) -> Self:
        """Some of the stages, such as `[-1:]`, the last one alone."""
        return replace(super().__getitem__(stages), content=self.content[stages], reference=self.reference[stages])


class Losses:
    """Loss terms by name, each with a value for every stage and a weight, and measures, which are only logged. No name may come twice."""

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
