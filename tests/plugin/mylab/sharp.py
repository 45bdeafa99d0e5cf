"""A class cost and a class target of a criterion."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steadydetr import register
from steadydetr.learning.class_terms import ClassCost, ClassTarget, MatchedPairs
from steadydetr.learning.matching import PairwiseTerms


@register("sharp-cost")
@dataclass(frozen=True)
class SharpCost(ClassCost):
    """Minus a power of the score of the target's class."""

    power: float = 2.0

    def __call__(self, terms: PairwiseTerms) -> Tensor:
        """[R, N]."""
        return -terms.logits.sigmoid().pow(self.power)


@register("softened-target")
@dataclass(frozen=True)
class SoftenedTarget(ClassTarget):
    """The same target below 1 for every matched query."""

    value: float = 0.9

    def __call__(self, pairs: MatchedPairs) -> Tensor:
        """[P]."""
        return pairs.iou.new_full(pairs.iou.shape, self.value)
