"""The criterion of the released Stable-DINO, whose matcher mixes up targets of one class; ours prices every pair by itself (D-20)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadydetr.equations.detection import focal_cost
from steadydetr.equations.stable import half_sine, identity, unit_exponential
from steadydetr.learning.class_terms import ClassTarget, FocalCost, HardTarget, MatchedPairs, PositionTarget
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import Problem, pairwise_terms
from steadydetr.structures import Stages, Targets
from tests.reference.stable import released_modulations

WARPS = {"none": identity, "exp": unit_exponential, "sin": half_sine}  # target_post_process
DENOISING_WEIGHTS = Weights(1.0, 5.0, 2.0)


@dataclass(frozen=True)
class ReleasedTarget(PositionTarget):
    """It divides by the largest target + 1e-8, which shows where all boxes of an image are poor."""

    def __call__(self, pairs: MatchedPairs) -> Tensor:
        plain = PositionTarget(self.exponent, self.score_exponent, self.warp, "none")(pairs)
        largest = plain.new_zeros(pairs.images).scatter_reduce(0, pairs.image, plain, "amax")
        return super().__call__(pairs) * (largest / (largest + 1e-8))[pairs.image]


@dataclass(frozen=True)
class ReleasedCriterion(Criterion):
    cec_beta: float = 0.5  # exponent of the modulation; below 0: none

    @torch.no_grad()
    def problem(self, stages: Stages, targets: Targets, name: str) -> Problem:
        if self.cec_beta < 0:
            return super().problem(stages, targets, name)
        terms = pairwise_terms(stages, targets, self.giou_eps)
        cost = self.cost_weights.l1 * terms.l1 - self.cost_weights.giou * terms.giou
        return Problem.of(
            cost + self.cost_weights.label * self.class_costs(stages, targets), terms, targets.counts * len(stages.logits), name
        )

    def class_costs(self, stages: Stages, targets: Targets) -> Tensor:
        """[R, N]: every image sees the targets of the whole batch, stage by stage."""
        logits, boxes = stages.flat
        images, classes = len(targets.counts), logits.shape[-1]
        wanted, labels = targets.boxes.tolist(), targets.labels.tolist()
        factor = torch.tensor([released_modulations(image, wanted, labels, classes, self.cec_beta) for image in boxes.tolist()])
        cost = focal_cost(logits.sigmoid() * factor.to(logits.dtype), self.alpha, self.gamma)
        parts = [image[:, part.labels].T for image, part in zip(cost, targets.split() * (len(logits) // images), strict=True)]
        return torch.cat(parts)


def class_target(config: Mapping[str, Any]) -> ClassTarget:
    """Of a case's metadata; the released code always stretches the best target of an image to 1."""
    if config.get("use_ce_loss_type", "stable-dino") == "none":
        return HardTarget()
    return ReleasedTarget(config["ta_beta"], config["ta_alpha"], WARPS[config["target_post_process"]], rescale="one")


def stable_criterion(config: Mapping[str, Any]) -> Criterion:
    """Of the metadata of a model case."""
    return ReleasedCriterion(
        class_cost=FocalCost(),
        class_target=class_target(config),
        loss_weights=Weights(6.0, 5.0, 2.0),
        giou_eps=1e-6,
        cec_beta=config["cec_beta"],
    )
