"""Masks in the criterion: what they add to the matching cost and to the losses, at random points, with bounded memory.

Nothing here is of the size queries x height x width. Costs multiply the queries' vectors with those of the pixels at the points of one
image; losses make the masks of matched queries alone, some of one image at a time, and make them again in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.config import check_within
from steadydetr.equations.masks import mask_costs, mask_losses, sample_maps, sample_targets, uncertain_points
from steadydetr.kinds import register
from steadydetr.lazy import torch
from steadydetr.structures import MaskPredictions, Match, Targets, at_least_float32, seed_of, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 256  # masks that are in memory at a time


@register("mask-terms", "masks")
@dataclass(frozen=True)
class MaskTerms:
    """Cross-entropy and dice of masks. Defaults: MaskDINO's."""

    points: int = 12544  # of every mask
    oversampling: float = 3.0  # so many times the points are drawn, of which the least certain ones are taken
    importance: float = 0.75  # share of the points that are taken so; the others are anywhere
    cost_bce: float = 5.0  # weights in the matching cost
    cost_dice: float = 5.0
    bce: float = 5.0  # and in the losses
    dice: float = 5.0

    def __post_init__(self) -> None:
        weights = dict.fromkeys(("cost_bce", "cost_dice", "bce", "dice"), (0, 10**6))
        check_within("criterion.masks", self, points=(1, 10**7), oversampling=(1, 100), importance=(0, 1), **weights)

    def cost(self, masks: MaskPredictions, targets: Targets, name: str) -> Tensor:
        """[R, N], weighed: at random points of an image and stage, which all its queries and objects share.

        Args:
            name: of the problem. No two problems of a step have the same points.
        """
        stages = range(len(masks.queries))
        costs: list[list[Tensor]] = [[masks.queries.new_zeros(0, masks.queries.shape[2], dtype=torch.float32)] for _ in stages]
        for image, (pixels, of_image) in enumerate(zip(masks.pixels, split_masks(targets), strict=True)):
            drawn = random_points((len(stages), self.points, 2), pixels.device, of_image.seeds[0], name, "cost")
            pixels = at_least_float32(pixels)
            for stage in stages if of_image.counts[0] else ():
                points, vectors = drawn[stage][None].to(pixels.dtype), at_least_float32(masks.queries[stage, image])
                every = torch.arange(of_image.counts[0], device=points.device)
                labels = sample_targets(require_masks(of_image), every, points.expand(len(every), -1, -1))
                with without_autocast(pixels):  # sums over thousands of points
                    cross_entropy, dice = mask_costs(vectors @ sample_maps(pixels[None], points)[0], labels)
                costs[stage].append(self.cost_bce * cross_entropy + self.cost_dice * dice)
        return torch.cat([cost for of_stage in costs for cost in of_stage])

    def losses(self, masks: MaskPredictions, targets: Targets, match: Match, name: str) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice of every pair, [P] each, unweighed, at points of its own."""
        images, objects = len(masks.pixels), max(len(targets.labels), 1)
        order = (match.image % images).argsort(stable=True)  # image after image, and within each as in the match
        values = []
        for image, (rows, of_image) in enumerate(zip(order.split(pairs_of_images(match, images)), split_masks(targets), strict=True)):
            for number, chunk in enumerate(rows.split(CHUNK)):
                vectors = masks.queries.flatten(0, 1)[match.image[chunk], match.query[chunk]]
                seed = (of_image.seeds[0], name, number)
                values.append(self._recomputed(vectors, masks.pixels[image], targets, match.target[chunk] % objects, seed))
        back = order.argsort()
        return tuple(torch.cat(parts)[back] for parts in zip(*values, strict=True))  # type: ignore[return-value]

    def _recomputed(
        self, vectors: Tensor, pixels: Tensor, targets: Targets, target: Tensor, seed: tuple[int | str, ...]
    ) -> tuple[Tensor, Tensor]:
        """The losses of some masks of one image, of which nothing is kept for the backward pass but the vectors."""
        from torch.utils.checkpoint import checkpoint

        def losses(vectors: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
            vectors, pixels = at_least_float32(vectors), at_least_float32(pixels)
            with without_autocast(pixels):
                logits = (vectors @ pixels.flatten(1)).unflatten(1, pixels.shape[1:])
            with torch.no_grad():
                points = self._points(logits, seed).to(logits.dtype)
                labels = sample_targets(require_masks(targets), target, points)
            return mask_losses(sample_maps(logits[:, None], points)[:, 0], labels)

        return checkpoint(losses, vectors, pixels, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def _points(self, logits: Tensor, seed: tuple[int | str, ...]) -> Tensor:
        """[n, P, 2] the points of masks [n, h, w]: the least certain ones of many, and others."""
        certain, count = int(self.importance * self.points), len(logits)
        many = random_points((count, int(self.points * self.oversampling), 2), logits.device, *seed, "many")
        others = random_points((count, self.points - certain, 2), logits.device, *seed, "others")
        at_many = sample_maps(logits[:, None], many)[:, 0]
        return torch.cat((uncertain_points(many, at_many, certain), others), 1)


def random_points(shape: tuple[int, ...], device: torch.device, *seed: int | str) -> Tensor:
    """Numbers in 0..1 that are a function of the seed and the kind of device alone."""
    generator = torch.Generator(device).manual_seed(seed_of(*seed))
    return torch.rand(shape, generator=generator, device=device)


def pairs_of_images(match: Match, images: int) -> list[int]:
    """How many pairs every image has at all stages together; fetched from the device where the host does not know them."""
    if match.counts is None:
        return torch.bincount(match.image % images, minlength=images).tolist()
    return [sum(match.counts[image::images]) for image in range(images)]


def require_masks(targets: Targets) -> Tensor:
    """The masks of the objects; a ValueError where they have none."""
    if targets.masks is None or len(targets.seeds) != len(targets.counts):
        raise ValueError(
            "criterion.masks learns masks, which the objects of this batch do not have: read them with --data.masks, or train"
            " without them by --criterion.masks none"
        )
    return targets.masks


def split_masks(targets: Targets) -> list[Targets]:
    """The targets of each image, with masks."""
    require_masks(targets)
    return targets.split()
