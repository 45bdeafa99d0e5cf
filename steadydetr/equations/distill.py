"""Offline distillation (Chang et al. 2023, DETRDistill), and the methods of feature distillation that it is compared with.

Legend: B images, F folded images (stage * B + image), L tokens of a feature level (h * w, row by row), d channels of the teacher,
M queries of the teacher, K of its predictions of an image, N queries of the student, P pairs, C classes, G objects of all images.
`padding` is True where a token is no image. Sums of a level go over its valid tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.equations.detection import L1Format
from steadydetr.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

# Hungarian-matching logits distillation, Eq. 2-4, and query-prior assignment distillation, Eq. 9


def teacher_stages(student: int, teacher: int) -> Tensor:
    """The teacher's stage that each stage of the student learns from: ceil((s + 1) T / S) - 1 (DETRDistill Fig. 5)."""
    return -(-(torch.arange(1, student + 1) * teacher) // student) - 1


def grouped_stages(student: int, teacher: int) -> list[tuple[int, int]]:
    """(student's stage, teacher's stage) wherever both cover the same part of their decoders: the groups of Fig. 5 in full."""
    last = teacher_stages(student, teacher).tolist()
    return [(s, t) for s in range(student) for t in range(s * teacher // student, last[s] + 1)]


def soft_label_cost(logits: Tensor, target: Tensor) -> Tensor:
    """BCE of every student's scores to every teacher's, summed over classes: the class term of L_match in Eq. 2.

    Args:
        logits: [F, N, C] of the student.
        target: [F, K, C] the teacher's sigmoid scores.

    Returns:
        [F, K, N].
    """
    # BCE(x, t) = softplus(x) - t x, so the sum over classes is a matrix product
    return F.softplus(logits).sum(-1)[:, None] - target @ logits.transpose(1, 2)


def soft_label_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The same for matched pairs: [P, C] each -> [P]."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)


def pairwise_boxes(predicted: Tensor, target: Tensor, giou_eps: float = 0.0, l1_format: L1Format = "cxcywh") -> tuple[Tensor, Tensor]:
    """L1 and GIoU of every target box with every predicted one (Eq. 2, 3): [F, N, 4] and [F, K, 4] -> [F, K, N] each."""
    predicted_xyxy, target_xyxy = to_xyxy(predicted), to_xyxy(target)
    _, giou = iou_giou(predicted_xyxy[:, None], target_xyxy[:, :, None], giou_eps)
    if l1_format == "xyxy":
        return torch.cdist(target_xyxy, predicted_xyxy, p=1), giou
    return torch.cdist(target, predicted, p=1), giou


# Target-aware feature distillation, Eq. 5-8, and the methods that it is compared with


def quality_score(score: Tensor, iou: Tensor, gamma: float = 0.5) -> Tensor:
    """q = c^gamma IoU^(1 - gamma), elementwise (DETRDistill Eq. 7)."""
    return score.pow(gamma) * iou.pow(1 - gamma)


def query_masks(features: Tensor, queries: Tensor) -> Tensor:
    """psi_i = F . Q_i of every query: [B, L, d], [B, M, d] -> [B, M, L] (DETRDistill Eq. 6)."""
    return queries @ features.transpose(1, 2)


def weighted_squares(features: Tensor, queries: Tensor, weight: Tensor) -> Tensor:
    """sum_i q_i psi_i^2 at every token: [B, L, d], [B, M, d], [B, M] -> [B, L] (DETRDistill Eq. 8 without 1 / M).

    Either by the masks themselves or, because q_i (F . Q_i)^2 = F^T (q_i Q_i Q_i^T) F, by one d x d matrix for all queries, whichever
    multiplies less. So nothing larger than all features and queries together, or than d x d, is ever held.
    """
    (length, width), count = features.shape[1:], queries.shape[1]
    if count * length <= width * (count + length):
        return (query_masks(features, queries).square() * weight[..., None]).sum(1)
    gram = queries.transpose(1, 2) @ (queries * weight[..., None])
    return ((features @ gram) * features).sum(-1)


def token_error(student: Tensor, teacher: Tensor, padding: Tensor) -> Tensor:
    """||(F_T - phi(F_S))_hw||^2 / d at every token, 0 in the padding: [B, L, d] -> [B, L] (DETRDistill Eq. 5)."""
    return (teacher - student).masked_fill(padding[..., None], 0).square().mean(-1)


def over_tokens(values: Tensor, padding: Tensor) -> Tensor:
    """Mean over the valid tokens, 1 / HW sum_hw: [..., B, L], [B, L] -> [..., B]."""
    return values.masked_fill(padding, 0).sum(-1) / (~padding).sum(-1)


def released_mask(features: Tensor, queries: Tensor, quality: Tensor, floor: float = 0.01) -> Tensor:
    """The one mask of an image and level in the released DETRDistill: [B, L, d], [B, M, d], [B, M] -> [B, L] in 0..1.

    sum_i q_i cos(F, Q_i), at least `floor`, divided by its largest value.
    """
    direction = (quality[..., None] * F.normalize(queries, dim=-1)).sum(1)
    mask = (F.normalize(features, dim=-1) @ direction[..., None])[..., 0].clamp(min=floor)
    return mask / mask.amax(-1, keepdim=True)


def spatial_attention(features: Tensor) -> Tensor:
    """Mean of |F| over the channels: [B, L, d] -> [B, L] (FKD and FGD, G^s)."""
    return features.abs().mean(-1)


def channel_attention(features: Tensor, padding: Tensor) -> Tensor:
    """Mean of |F| over the valid tokens: [B, L, d] -> [B, d] (FKD and FGD, G^c)."""
    return over_tokens(features.abs().transpose(1, 2), padding[:, None])


def spatial_weights(attention: Tensor, padding: Tensor, temperature: float) -> Tensor:
    """HW softmax(G^s / T) over the valid tokens, 0 elsewhere: [B, L] (Zhang and Ma 2021, FKD; Yang et al. 2022, FGD)."""
    weights = (attention / temperature).masked_fill(padding, -torch.inf).softmax(-1)
    return weights * (~padding).sum(-1, keepdim=True)


def channel_weights(attention: Tensor, temperature: float) -> Tensor:
    """d softmax(G^c / T): [B, d] (the same)."""
    return attention.shape[-1] * (attention / temperature).softmax(-1)


def foreground(boxes_xyxy: Tensor, image: Tensor, images: int, size: tuple[int, int]) -> Tensor:
    """At every cell the largest 1 / (h w) of the boxes that touch it, 0 where none does: [images, L] (FGD, S in its Eq. 3).

    A box covers the cells from its floor to its ceiling, both included, as in FGD's code.

    Args:
        boxes_xyxy: [G, 4] in cells of the level.
        image: [G].
        size: (h, w) of the level.
    """
    height, width = size
    x0, y0 = boxes_xyxy[:, :2].floor().unbind(1)
    x1, y1 = boxes_xyxy[:, 2:].ceil().unbind(1)
    column = torch.arange(width, device=boxes_xyxy.device)
    line = torch.arange(height, device=boxes_xyxy.device)
    inside_x = (column >= x0[:, None]) & (column <= x1[:, None])
    inside_y = (line >= y0[:, None]) & (line <= y1[:, None])
    share = 1 / ((x1 + 1 - x0) * (y1 + 1 - y0))
    covered = (inside_y[:, :, None] & inside_x[:, None]).flatten(1) * share[:, None]
    empty = boxes_xyxy.new_zeros(images, height * width)
    return empty.scatter_reduce(0, image[:, None].expand_as(covered), covered, "amax")


def background(foreground: Tensor, padding: Tensor) -> Tensor:
    """The cells that no box touches, 1 in sum over an image: [B, L] (FGD)."""
    free = ((foreground == 0) & ~padding).to(foreground.dtype)
    return free / free.sum(-1, keepdim=True).clamp(min=1)


def imitated(iou: Tensor, image: Tensor, images: int, threshold: float = 0.5) -> Tensor:
    """The cells whose anchor overlaps an object by more than `threshold` times its best anchor: [images, L] bool (FGFI, Sec. 3.1).

    Args:
        iou: [G, L] of every object with the anchor of every cell, 0 where a cell is not to be taken.
        image: [G].
    """
    near = (iou > threshold * iou.amax(1, keepdim=True)).to(iou.dtype)
    return iou.new_zeros(images, iou.shape[1]).scatter_reduce(0, image[:, None].expand_as(near), near, "amax") > 0
