"""The detection loss that all objectives share: given an assignment, the class, L1 and GIoU losses of every stage at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steadydetr.equations.align import prime_weights
from steadydetr.equations.detection import L1Format, box_terms, classification_loss
from steadydetr.kinds import register
from steadydetr.lazy import torch
from steadydetr.learning.class_terms import ClassCost, ClassTarget, FocalCost, HardTarget, MatchedPairs
from steadydetr.learning.mask_terms import MaskTerms
from steadydetr.learning.matching import MixedMatching, PairwiseTerms, Problem, largest_iou, paired_iou, pairwise_terms
from steadydetr.structures import Assignment, Losses, Match, Stages, Targets, at_least_float32, without_autocast

if TYPE_CHECKING:
    from torch import Tensor

CERTAIN_BACKGROUND = -1e4  # a logit for which the loss of background and its gradient are exactly 0


@register("loss-weights", "weights")
@dataclass(frozen=True)
class Weights:
    """Of the class, L1 and GIoU terms, in a cost or in a loss."""

    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0


@register("criterion")
@dataclass(frozen=True)
class Criterion:
    """The matching cost of a query with a target, and the losses of what it then learns.

    Defaults: the focal loss and cost of Deformable DETR and DINO (DINO: label weight 1; Deformable DETR: 2).
    """

    class_cost: ClassCost = FocalCost()
    class_target: ClassTarget = HardTarget()
    cost_weights: Weights = Weights(2.0, 5.0, 2.0)
    loss_weights: Weights = Weights(1.0, 5.0, 2.0)
    alpha: float | None = 0.25  # None: positives and negatives weigh the same
    gamma: float = 2.0
    giou_eps: float = 0.0  # added to the denominators of IoU and GIoU; 1e-6 in DINO and detrex  # D-33
    matching: MixedMatching | None = None  # several queries learn a target, at all stages but the last; None: one
    l1_format: L1Format = "cxcywh"  # what L1 compares, in cost and losses; corners, xyxy, in AdaMixer
    masks: MaskTerms | None = None  # what masks cost and lose, of detectors that predict them; None: nothing

    @property
    def matcher(self) -> tuple[ClassCost | Weights | MaskTerms | float | str, ...]:
        """All that the cost of a pair depends on. What is usual of L1 and masks is left out: runs of released versions go by this."""
        usual = (self.class_cost, self.cost_weights, self.giou_eps)
        with_format = usual if self.l1_format == "cxcywh" else (*usual, self.l1_format)
        return with_format if self.masks is None else (*with_format, self.masks)

    def cost(self, terms: PairwiseTerms) -> Tensor:
        """[R, N]. The 1 of 1 - GIoU is left out, because a constant changes no assignment."""
        weights = self.cost_weights
        return weights.label * self.class_cost(terms) + weights.l1 * terms.l1 - weights.giou * terms.giou

    def box_terms(self, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """L1 and 1 - GIoU of boxes that broadcast against each other, [..., 4] -> [...]."""
        l1, giou, _ = box_terms(predicted, target, self.giou_eps, self.l1_format)
        return l1, giou

    def problem(self, stages: Stages, targets: Targets, name: str) -> Problem:
        """The one-to-one assignment of every stage to the targets of the batch; costs are in float32 or better."""
        with torch.no_grad(), without_autocast(stages.logits):
            logits, boxes = (at_least_float32(tensor) for tensor in (stages.logits, stages.boxes))
            terms = pairwise_terms(Stages(logits, boxes, stages.valid), targets, self.giou_eps, self.l1_format)
            cost = self.cost(terms)
            if self.masks is not None and stages.masks is not None and targets.masks is not None:  # D-197
                cost = cost + self.masks.cost(stages.masks, targets, name)
            return Problem.of(cost, terms, targets.counts * len(logits), name)

    def mixed_problem(self, stages: Stages, targets: Targets, name: str, last: bool) -> Problem:
        """The same by the rule of `matching`; without one, one to one.

        Args:
            last: whether the decoder's last stage is among the stages; the encoder's proposals are a stage before it.
        """
        problem = self.problem(stages, targets, name)
        if self.matching is None:
            return problem
        queries = self.matching.of_stages(len(stages.logits), last)
        return replace(problem, queries=tuple(n for n in queries for _ in targets.counts), at_most_half=True)

    def shared(self, match: Match, stages: Stages, targets: Targets) -> Match:
        """The solution of a mixed problem with the share that each query of a target learns; without `matching` as it is."""
        if self.matching is None:
            return match
        with torch.no_grad(), without_autocast(stages.logits):
            pairs = self._pairs(stages, (match,), targets, targets.repeat_batch(len(stages.logits)))
            return replace(match, share=prime_weights(self.class_target.quality(pairs), match.target, self.matching.tau))

    def add_losses(
        self,
        losses: Losses,
        name: str,
        stages: Stages,
        assignment: Assignment,
        targets: Targets,
        normaliser: float,
        weights: Weights | None = None,
        factor: float = 1.0,
    ) -> None:
        """Add `name`/class, `name`/l1 and `name`/giou, and with masks `name`/mask and `name`/dice, [S] each.

        Args:
            assignment: in folded indices; masks are learned by those who learn boxes.
            targets: those of the batch; every stage learns from them.
            normaliser: what the sums are divided by, the objects of the whole step.
            weights: of class and boxes, instead of the criterion's own.
            factor: of all weights.
        """
        weights = weights or self.loss_weights
        with without_autocast(stages.logits):
            folded = targets.repeat_batch(stages.logits.shape[0])
            label = self._class_loss(stages, assignment, targets, folded)
            l1, giou = self._box_losses(stages, assignment.boxes, folded)
            losses.add(f"{name}/class", label / normaliser, factor * weights.label)
            losses.add(f"{name}/l1", l1 / normaliser, factor * weights.l1)
            losses.add(f"{name}/giou", giou / normaliser, factor * weights.giou)
            if self.masks is not None and stages.masks is not None:
                values = self.masks.losses(stages.masks, targets, assignment.boxes, name)
                cross_entropy, dice = (self._by_stage(value, assignment.boxes, stages) for value in values)
                losses.add(f"{name}/mask", cross_entropy / normaliser, factor * self.masks.bce)
                losses.add(f"{name}/dice", dice / normaliser, factor * self.masks.dice)

    def _class_loss(self, stages: Stages, assignment: Assignment, targets: Targets, folded: Targets) -> Tensor:
        logits = at_least_float32(stages.logits)
        if stages.valid is not None:  # replaced before the loss, because masking it afterwards would let 0 * NaN into the gradient
            logits = torch.where(stages.valid[..., None], logits, CERTAIN_BACKGROUND)
        logits = logits.flatten(0, 1)
        wanted = torch.zeros_like(logits)
        positive = torch.zeros_like(logits, dtype=torch.bool)
        weight: Tensor | None = None
        values, share = self.class_target(self._pairs(stages, assignment.classes, targets, folded)), Match.cat(assignment.classes).share
        values = (values if share is None else values * share).to(wanted.dtype)
        targeted = zip(assignment.classes, values.split([len(match.query) for match in assignment.classes]), strict=True)
        for match, value in reversed(list(targeted)):  # where both set one entry, the first match decides  # D-30
            at = (match.image, match.query, folded.labels[match.target])
            wanted[at] = value
            positive[at] = True
            if match.weight is not None or weight is not None:
                weight = torch.ones_like(wanted) if weight is None else weight
                weight[at] = 1.0 if match.weight is None else match.weight.to(wanted.dtype)
        loss = classification_loss(logits, wanted, positive, self.alpha, self.gamma, self.class_target.focal_positives)
        if weight is not None:
            loss = loss * weight
        return loss.unflatten(0, stages.logits.shape[:2]).sum((1, 2, 3))

    def _pairs(self, stages: Stages, matches: Sequence[Match], targets: Targets, folded: Targets) -> MatchedPairs:
        """The pairs of all matches together, because the largest target of an image is the largest of all its pairs."""
        pairs = Match.cat(matches)
        image, query, target = pairs.image, pairs.query, pairs.target
        logits, boxes = (at_least_float32(tensor).detach() for tensor in stages.flat)
        score = logits[image, query, folded.labels[target]].sigmoid()
        iou = paired_iou(boxes[image, query], folded.boxes[target], self.giou_eps)
        detached = Stages(stages.logits.detach(), at_least_float32(stages.boxes.detach()), stages.valid)
        return MatchedPairs(score, iou, image, len(logits), lambda: largest_iou(detached, targets, self.giou_eps))

    def _box_losses(self, stages: Stages, match: Match, folded: Targets) -> tuple[Tensor, Tensor]:
        boxes = at_least_float32(stages.flat[1])[match.image, match.query]
        l1, giou = self.box_terms(boxes, folded.boxes[match.target].to(boxes.dtype))
        return self._by_stage(l1, match, stages), self._by_stage(giou, match, stages)

    @staticmethod
    def _by_stage(values: Tensor, match: Match, stages: Stages) -> Tensor:
        """The sums of every stage [S] of what each pair loses [P], times its weight and share."""
        for factor in (match.weight, match.share):
            if factor is not None:
                values = values * factor
        stage_count, images = stages.logits.shape[:2]
        return values.new_zeros(stage_count).index_add(0, match.image // images, values)
