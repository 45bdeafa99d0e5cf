"""Masks at points, and the boxes of masks (MaskDINO, whose losses are Mask2Former's and PointRend's).

Legend: n masks, P points of a mask, places (x, y) in 0..1 of the padded image; N queries, G objects. Masks are before the sigmoid where
they are predictions, 0 or 1 where they are targets; between cells both are interpolated bilinearly, outside of the map they are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """The values of maps at points: [n, C, h, w] and [n, P, 2] -> [n, C, P]."""
    grid = (2 * points - 1)[:, :, None].to(maps.dtype)
    if not len(maps):  # which grid_sample refuses; the gradient still reaches the maps
        return maps.flatten(2)[..., :1].expand(-1, -1, points.shape[1])
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[..., 0]


def sample_targets(masks: Tensor, target: Tensor, points: Tensor) -> Tensor:
    """The masks [G, H, W], uint8, of chosen objects [n] at points [n, P, 2] -> [n, P] in 0..1, of the type of the points.

    Only the four cells around a point are read, so that masks of the size of the image are never held as floats.
    """
    height, width = masks.shape[-2:]
    place = points * points.new_tensor((width, height)) - 0.5
    corner = place.floor()
    share = place - corner
    x, y = corner.long().unbind(-1)
    flat, first = masks.flatten(), target[:, None] * (height * width)
    found = torch.zeros_like(x, dtype=points.dtype)
    for right in (0, 1):
        for below in (0, 1):
            weight = (share[..., 0] if right else 1 - share[..., 0]) * (share[..., 1] if below else 1 - share[..., 1])
            column, row = x + right, y + below
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            cell = first + row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            found = found + weight * (flat.take(cell) * inside)
    return found


def uncertain_points(points: Tensor, logits: Tensor, count: int) -> Tensor:
    """The points where a mask is the least certain, its logit the nearest to 0 (PointRend): [n, K, 2] and [n, K] -> [n, count, 2]."""
    chosen = logits.abs().topk(count, dim=1, largest=False).indices
    return points.gather(1, chosen[..., None].expand(-1, -1, 2))


def mask_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice loss of masks at their points, [n, P] each -> [n] each. Dice has 1 added above and below."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    scores = logits.sigmoid()
    dice = 1 - (2 * (scores * labels).sum(1) + 1) / (scores.sum(1) + labels.sum(1) + 1)
    return cross_entropy, dice


def mask_costs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same of all pairs of N masks and G targets at common points: [N, P] and [G, P] -> [G, N] each.

    BCE(x, t) = softplus(x) - x t, so that no tensor is G x N x P.
    """
    points = logits.shape[1]
    cross_entropy = (F.softplus(logits).sum(1) - labels @ logits.T) / points
    scores = logits.sigmoid()
    dice = 1 - (2 * labels @ scores.T + 1) / (scores.sum(1) + labels.sum(1)[:, None] + 1)
    return cross_entropy, dice


def boxes_of_masks(masks: Tensor, closed: bool) -> Tensor:
    """The smallest boxes around masks: [..., h, w] bool -> [..., 4] xyxy in cells.

    Args:
        closed: the box ends with the place of the last cell, as the released `mask2box` has it; else behind that cell (`bitmask`).
            A mask without any cell has its box, without a size, in the lower right corner; else in the upper left one.
    """
    first, last = [], []
    for axis in (-2, -1):  # what is left are columns, then rows
        taken = masks.any(axis)
        size, empty = taken.shape[-1], ~taken.any(-1)
        taken = taken.byte()
        start, end = taken.argmax(-1), size - taken.flip(-1).argmax(-1) - int(closed)
        corner = size if closed else 0
        first.append(start.masked_fill(empty, corner))
        last.append(end.masked_fill(empty, corner))
    return torch.stack((*first, *last), -1)
