"""Box formats and overlaps. cxcywh unless a name says xyxy; every overlap takes xyxy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def to_xyxy(boxes: Tensor) -> Tensor:
    """cxcywh -> xyxy, [..., 4]."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), -1)


def to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """xyxy -> cxcywh, [..., 4]."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def area(boxes_xyxy: Tensor) -> Tensor:
    size = boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]
    return size[..., 0] * size[..., 1]


def iou_giou(a_xyxy: Tensor, b_xyxy: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes that broadcast against each other, [..., 4] -> [...].

    `eps` is added to both denominators (the originals: 1e-6 in DINO and detrex, 0 elsewhere). Two boxes without
    area at one point give NaN with eps 0, as the originals do; targets without area never get this far.
    """
    overlap = (torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])).clamp(min=0)
    hull = (torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:]) - torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])).clamp(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    union = area(a_xyxy) + area(b_xyxy) - intersection
    hull_area = hull[..., 0] * hull[..., 1]
    iou = intersection / (union + eps)
    return iou, iou - (hull_area - union) / (hull_area + eps)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit, clamped so that 0 and 1 stay finite. eps: 1e-5 in Deformable DETR, 1e-3 in DINO and detrex."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def shift(delta: Tensor, base: Tensor, sized: bool | Tensor, eps: float, start_size: float = 0.0) -> Tensor:
    """The box `base` [B, N, 4] moved by `delta` [B, N, 4], in logits. Where the base has no size, its sides start from `start_size`."""
    start = inverse_sigmoid(base, eps)
    if sized is False:
        start = torch.cat((start[..., :2], torch.full_like(start[..., 2:], start_size)), -1)
    elif sized is not True:
        start = torch.cat((start[..., :2], torch.where(sized[:, None], start[..., 2:], start_size)), -1)
    return (delta + start).sigmoid()
