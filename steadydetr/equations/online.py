"""Online distillation (Wu et al. 2024, OD-DETR): the average of a detector's weights as its teacher.

Legend: R problem rows (one for every stage and target), N queries, F folded images (stage * B + image), P pairs of the student's match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.structures import Match


@dataclass(frozen=True)
class AddedPairs:
    """The pairs that the teacher's match adds to the student's, at most one for every target."""

    classes: Tensor  # [R] bool: the teacher's query is none of the student's own and learns the target's class too
    boxes: Tensor  # [R] bool: it also learns the box, because it is matched to no target of its own
    costlier: Tensor  # [R] bool: it costs as much as each of the student's own queries or more; False where there is no own
    own_costlier: Tensor  # [P] bool: the student's own pair is the costliest of its target, the added one included
    both: Tensor  # [P] bool: the student's own pair is one of the teacher's match too


def join_matches(own: Match, teacher_query: Tensor, image: Tensor, images: int, cost: Tensor) -> AddedPairs:
    """What the teacher's match of the same targets adds to the student's (OD-DETR Eq. 3, 4, Fig. 3).

    Args:
        own: the student's match, in which a target may have several queries (D-213).
        teacher_query: [R] the student's query that is the counterpart of the one in the teacher's match, -1: none.
        image: [R] the folded image of each target.
        images: F.
        cost: [R, N] the student's.
    """
    rows, column = len(teacher_query), teacher_query.clamp(min=0)
    both = own.query == teacher_query[own.target]
    agreed = torch.zeros(rows, dtype=torch.uint8, device=cost.device).scatter_reduce(0, own.target, both.byte(), "amax").bool()
    differ = (teacher_query >= 0) & ~agreed
    matched = torch.zeros(images, cost.shape[1], dtype=torch.bool, device=cost.device)
    matched[own.image, own.query] = True
    own_cost, other_cost = cost[own.target, own.query], cost.gather(1, column[:, None])[:, 0]
    highest = cost.new_full((rows,), -torch.inf).scatter_reduce(0, own.target, own_cost, "amax")
    costlier = differ & (highest > -torch.inf) & (other_cost >= highest)
    own_costlier = (differ & ~costlier)[own.target] & (own_cost == highest[own.target])
    return AddedPairs(differ, differ & ~matched[image, column], costlier, own_costlier, both)


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
