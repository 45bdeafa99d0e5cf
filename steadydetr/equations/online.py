"""Online distillation (Wu et al. 2024, OD-DETR): the average of a detector's weights as its teacher.

Legend: R problem rows (one for every stage and target), N queries, F folded images (stage * B + image), P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AddedPairs:
    """The pairs that the teacher's match adds to the student's, at most one for every target; [R] bool each."""

    classes: Tensor  # the teacher's query is another than the student's own and learns the target's class too
    boxes: Tensor  # it also learns the box, because it is matched to no target of its own
    costlier: Tensor  # it costs as much as the student's own query or more; False where there is no own


def join_matches(own: Tensor, teacher_query: Tensor, image: Tensor, images: int, cost: Tensor) -> AddedPairs:
    """What the teacher's match of the same targets adds to the student's (OD-DETR Eq. 3, 4, Fig. 3).

    Args:
        own: [R] query of the student's match, -1: none.
        teacher_query: [R] the student's query that is the counterpart of the one in the teacher's match, -1: none.
        image: [R] the folded image of each target.
        images: F.
        cost: [R, N] the student's.
    """
    differ = (teacher_query >= 0) & (teacher_query != own)
    matched = torch.zeros(images + 1, cost.shape[1], dtype=torch.bool, device=cost.device)  # the last row is for targets without a query
    matched[torch.where(own >= 0, image, images), own.clamp(min=0)] = True
    own_cost, other_cost = (cost.gather(1, query.clamp(min=0)[:, None])[:, 0] for query in (own, teacher_query))
    costlier = differ & (own >= 0) & (other_cost >= own_cost)
    return AddedPairs(differ, differ & ~matched[image, teacher_query.clamp(min=0)], costlier)


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
