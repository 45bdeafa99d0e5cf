"""The choices of a criterion: what a query's class costs in the matching, and what its score then learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steadydetr.equations.detection import focal_cost
from steadydetr.equations.stable import exponential, identity, modulation, rescale_modulation, rescale_targets
from steadydetr.kinds import register
from steadydetr.learning.matching import PairwiseTerms


@register("focal-cost", "focal")
@dataclass(frozen=True)
class FocalCost:
    """The class cost of Deformable DETR and DINO."""

    alpha: float | None = 0.25  # None: both terms weigh 1
    gamma: float = 2.0

    def __call__(self, terms: PairwiseTerms) -> Tensor:
        """[R, N]."""
        return focal_cost(terms.logits.sigmoid(), self.alpha, self.gamma)


@register("position-modulated-cost", "position-modulated")
@dataclass(frozen=True)
class PositionModulatedCost:
    """Stable-DINO Eq. 4: a query whose box is far from the target cannot be cheap by its class score. A quantity per pair (D-20)."""

    exponent: float = 0.5  # of (GIoU + 1) / 2
    rescale: bool = False  # True: the best pair of every image counts as exact (released code)  # D-21
    alpha: float | None = 0.25  # None: the literal formula, without the alpha of the paper's footnote 3
    gamma: float = 2.0

    def __call__(self, terms: PairwiseTerms) -> Tensor:
        """[R, N]."""
        factor = modulation(terms.giou, self.exponent)
        if self.rescale:
            factor = rescale_modulation(factor, terms.image, terms.images, terms.valid)
        return focal_cost(terms.logits.sigmoid() * factor, self.alpha, self.gamma)


@dataclass(frozen=True)
class Pairs:
    """What a class target may depend on: the predictions of matched pairs, detached."""

    score: Tensor  # [P] of the target's class
    iou: Tensor  # [P] of the prediction with its target
    image: Tensor  # [P] folded: stage * B + image
    images: int  # S * B
    largest_iou: Callable[[], Tensor]  # () -> [S * B] over every query and target of the image at that stage


@register("hard-target", "hard")
@dataclass(frozen=True)
class HardTarget:
    """1: the focal loss."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """[P]."""
        return torch.ones_like(pairs.iou)


@register("quality-target", "quality")
@dataclass(frozen=True)
class QualityTarget:
    """The IoU itself: with `alpha` None the quality focal loss (OD-DETR Eq. 2)."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """[P]."""
        return pairs.iou


@register("position-target", "position")
@dataclass(frozen=True)
class PositionTarget:
    """Stable-DINO Eq. 3: t = epsilon(f1(s)), f1(s) = warp(s^exponent), with s the IoU of a prediction with its target.

    Its Table 7: exponents 1, 0.5 and 2 without a warp; warp `exponential`, `unit_exponential` or `half_sine` with exponent 1 (released
    code: 2); a score exponent, to see that scores harm.
    """

    exponent: float = 2.0
    score_exponent: float = 0.0  # p^a in front of s^exponent
    warp: Callable[[Tensor], Tensor] = identity
    rescale: Literal["max", "one", "none"] = "max"  # the largest target of an image: the largest IoU of any pair in it, 1, or as it is

    def __post_init__(self) -> None:
        if self.warp is exponential and self.rescale == "none":
            raise ValueError("class_target.warp exponential makes targets above 1: it needs class_target.rescale max or one")

    def __call__(self, pairs: Pairs) -> Tensor:
        """[P]."""
        target = pairs.iou.pow(self.exponent)
        if self.score_exponent:
            target = target * pairs.score.pow(self.score_exponent)
        target = self.warp(target)
        if self.rescale == "none":
            return target
        top = pairs.largest_iou().to(target.dtype) if self.rescale == "max" else target.new_ones(pairs.images)
        # a box that misses its target has nothing to teach, whatever the warp makes of 0
        return rescale_targets(torch.where(pairs.iou > 0, target, 0), pairs.image, top)


ClassCost = FocalCost | PositionModulatedCost
ClassTarget = HardTarget | QualityTarget | PositionTarget
