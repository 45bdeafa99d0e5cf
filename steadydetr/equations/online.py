"""Online distillation (Wu et al. 2024, OD-DETR): what the average of the weights teaches the weights.

Legend: R rows (one per stage and target), N queries, M folded images (stage * B + image).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class JoinedMatches:
    """What the teacher's match adds to the student's, target by target; [R] bool each."""

    taught: Tensor  # another query than the student's own learns the target's class too
    taught_box: Tensor  # and its box, because it holds no target of its own
    costlier: Tensor  # that query costs more than the student's own (at equal cost too); False where there is no own


def join_matches(own: Tensor, taught: Tensor, image: Tensor, images: int, cost: Tensor) -> JoinedMatches:
    """Both matches of the same targets (OD-DETR Eq. 3, 4, Fig. 3).

    Args:
        own: [R] query of the student's match, -1: none.
        taught: [R] the student's query that is the counterpart of the one in the teacher's match, -1: none.
        image: [R] the folded image of each target.
        cost: [R, N] the student's.
    """
    differ = (taught >= 0) & (taught != own)
    holds = torch.zeros(images + 1, cost.shape[1], dtype=torch.bool, device=cost.device)  # the last row takes what has no query
    holds[torch.where(own >= 0, image, images), own.clamp(min=0)] = True
    own_cost, taught_cost = (cost.gather(1, query.clamp(min=0)[:, None])[:, 0] for query in (own, taught))
    return JoinedMatches(differ, differ & ~holds[image, taught.clamp(min=0)], differ & (own >= 0) & (taught_cost >= own_cost))


def task_weight(score: Tensor, iou: Tensor, alpha: float = 0.25, beta: float = 0.75) -> Tensor:
    """c'[c_g]^alpha IoU'^beta, elementwise (OD-DETR Eq. 5, after TOOD)."""
    return score.pow(alpha) * iou.pow(beta)


def distillation_terms(
    own_iou: Tensor, teacher_iou: Tensor, weight: Tensor, l1: Tensor, giou_loss: Tensor, listen: bool = True
) -> tuple[Tensor, Tensor]:
    """The box terms of Eq. 6, elementwise: c'[c_g] L1 and c'[c_g] L_GIoU, only where the teacher's box is strictly better.

    Args:
        own_iou, teacher_iou: of the student's and of the teacher's box with the target that the teacher matched.
        weight: c'[c_g].
        listen: False: also where the student is better (Table 5, without Listen2stu).
    """
    if listen:
        weight = torch.where(teacher_iou > own_iou, weight, 0)
    return weight * l1, weight * giou_loss
