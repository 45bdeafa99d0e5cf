"""Boxes at fixed places: one for every token of a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.lazy import torch
from steadydetr.structures import Memory

if TYPE_CHECKING:
    from torch import Tensor


def token_anchors(memory: Memory, coarse_first: bool = False) -> tuple[Tensor, Tensor]:
    """The box around each token's cell [B, L, 4], sides 0.05 * 2^level, and whether it may be used [B, L].

    Encoders that make proposals add their deltas to these boxes (Deformable DETR A.4). Unusable are those of padded tokens and those with
    a coordinate outside of (0.01, 0.99) (F-13).

    Args:
        coarse_first: levels count from the coarsest one here, so that the finest has the largest boxes.
    """
    start, boxes = 0, []
    dtype = memory.valid_ratios.dtype
    for level, (height, width) in enumerate(memory.levels):
        number = len(memory.levels) - 1 - level if coarse_first else level
        padding = memory.padding[:, start : start + height * width].view(-1, height, width)
        start += height * width
        valid = torch.stack(((~padding[:, 0, :]).sum(1), (~padding[:, :, 0]).sum(1)), -1).to(dtype)
        y, x = torch.meshgrid(
            torch.arange(height, device=valid.device, dtype=dtype), torch.arange(width, device=valid.device, dtype=dtype), indexing="ij"
        )
        centres = (torch.stack((x, y), -1).flatten(0, 1) + 0.5) / valid[:, None]
        boxes.append(torch.cat((centres, torch.full_like(centres, 0.05 * 2.0**number)), -1))
    anchors = torch.cat(boxes, 1)
    return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding
