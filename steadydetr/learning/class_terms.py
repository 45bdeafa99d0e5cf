"""The choices of a criterion: what a query's class costs in the matching, and the value that its score then learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from steadydetr.config import check_within
from steadydetr.equations.align import aligned_quality
from steadydetr.equations.detection import focal_cost
from steadydetr.equations.stable import exponential, identity, modulation, rescale_modulation, rescale_targets
from steadydetr.kinds import register
from steadydetr.lazy import torch
from steadydetr.learning.matching import PairwiseTerms

if TYPE_CHECKING:
    from torch import Tensor


class ClassCost(ABC):
    """The class term of the matching cost: a frozen dataclass."""

    @abstractmethod
    def __call__(self, terms: PairwiseTerms) -> Tensor:
        """[R, N], before its weight."""


class ClassTarget(ABC):
    """The value that the class score of a matched query learns: a frozen dataclass. All other entries learn 0."""

    focal_positives: bool = True  # whether the loss of matched entries has the focal factor |t - p|^gamma

    @abstractmethod
    def __call__(self, pairs: MatchedPairs) -> Tensor:
        """[P]."""

    def quality(self, pairs: MatchedPairs) -> Tensor:
        """[P] by which `MixedMatching` ranks the queries of one target: the IoU."""
        return pairs.iou


@register("focal-cost", "focal")
@dataclass(frozen=True)
class FocalCost(ClassCost):
    """The class cost of Deformable DETR and DINO."""

    alpha: float | None = 0.25  # None: both terms weigh 1
    gamma: float = 2.0

    def __call__(self, terms: PairwiseTerms) -> Tensor:
        """[R, N]."""
        return focal_cost(terms.logits.sigmoid(), self.alpha, self.gamma)


@register("position-modulated-cost", "position-modulated")
@dataclass(frozen=True)
class PositionModulatedCost(ClassCost):
    """Stable-DINO Eq. 4: the score is scaled by the box's overlap with the target, so that a far box is not cheap by its score alone.

    It is a quantity of every pair, unlike in the released code, where targets of one class overwrite one another (D-20).
    """

    exponent: float = 0.5  # of (GIoU + 1) / 2
    rescale: bool = False  # True: scaled so that the factor of every image's best pair is 1 (released code)  # D-21
    alpha: float | None = 0.25  # None: the literal formula, without the alpha of the paper's footnote 3
    gamma: float = 2.0

    def __call__(self, terms: PairwiseTerms) -> Tensor:
        """[R, N]."""
        factor = modulation(terms.giou, self.exponent)
        if self.rescale:
            factor = rescale_modulation(factor, terms.image, terms.images, terms.valid)
        return focal_cost(terms.logits.sigmoid() * factor, self.alpha, self.gamma)


@dataclass(frozen=True)
class MatchedPairs:
    """What a class target may depend on: the predictions of matched pairs, without gradients."""

    score: Tensor  # [P] of the target's class
    iou: Tensor  # [P] of the prediction with its target
    image: Tensor  # [P] folded: stage * B + image
    images: int  # F
    largest_iou: Callable[[], Tensor]  # () -> [F] over every query and target of the image at that stage


@register("hard-target", "hard")
@dataclass(frozen=True)
class HardTarget(ClassTarget):
    """1, which makes the focal loss."""

    def __call__(self, pairs: MatchedPairs) -> Tensor:
        """[P]."""
        return torch.ones_like(pairs.iou)


@register("quality-target", "quality")
@dataclass(frozen=True)
class QualityTarget(ClassTarget):
    """The IoU of the prediction with its target. With the criterion's `alpha` None it makes the quality focal loss (OD-DETR Eq. 2)."""

    def __call__(self, pairs: MatchedPairs) -> Tensor:
        """[P]."""
        return pairs.iou


@register("align-target", "align")
@dataclass(frozen=True)
class AlignTarget(ClassTarget):
    """Align-DETR: t = p^alpha IoU^(1 - alpha). With the criterion's `alpha` None it makes the IoU-aware BCE loss."""

    alpha: float = 0.25  # the share of the score; that of the criterion is another
    least: float = 0.01  # no target is below it

    focal_positives = False

    def __post_init__(self) -> None:
        check_within("criterion.class_target", self, alpha=(0, 1), least=(0, 1))

    def __call__(self, pairs: MatchedPairs) -> Tensor:
        """[P]."""
        return aligned_quality(pairs.score, pairs.iou, self.alpha, self.least)

    def quality(self, pairs: MatchedPairs) -> Tensor:
        """[P]."""
        return self(pairs)


@register("position-target", "position")
@dataclass(frozen=True)
class PositionTarget(ClassTarget):
    """Stable-DINO Eq. 3: t = epsilon(f1(s)), f1(s) = warp(s^exponent), with s the IoU of a prediction with its target.

    Its Table 7: exponents 1, 0.5 and 2 without a warp; warp `exponential`, `unit_exponential` or `half_sine` with exponent 1 (released
    code: 2); and a score exponent, by which the paper shows that the score must not be part of the target.
    """

    exponent: float = 2.0
    score_exponent: float = 0.0  # a factor p^score_exponent, p the score
    warp: Callable[[Any], Any] = identity  # of a tensor, value by value
    rescale: Literal["max", "one", "none"] = "max"  # stretch an image's targets until the largest is its largest IoU of any pair, or 1

    def __post_init__(self) -> None:
        if self.warp is exponential and self.rescale == "none":
            raise ValueError("class_target.warp exponential makes targets above 1: it needs class_target.rescale max or one")

    def __call__(self, pairs: MatchedPairs) -> Tensor:
        """[P]."""
        target = pairs.iou.pow(self.exponent)
        if self.score_exponent:
            target = target * pairs.score.pow(self.score_exponent)
        target = self.warp(target)
        if self.rescale == "none":
            return target
        top = pairs.largest_iou().to(target.dtype) if self.rescale == "max" else target.new_ones(pairs.images)
        # a box that does not overlap its target has target 0, also where the warp of 0 is not 0, as e^0 is not
        return rescale_targets(torch.where(pairs.iou > 0, target, 0), pairs.image, top)
