"""What part of a feature level is image, and what padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def resize_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest interpolation of the pixel mask [B, H, W] to a level [B, h, w] (F-04)."""
    return nn.functional.interpolate(padding[:, None].float(), size=size)[:, 0].to(torch.bool)


def valid_ratio(padding: Tensor) -> Tensor:
    """[B, h, w] -> [B, 2] (w, h): the share of the first row and column that is image (F-05).

    It is float32 whatever the tokens are, and so is all geometry made from it, because bfloat16 cannot even count the cells of a row.
    The originals use float32 in their float64 runs too.
    """
    height, width = padding.shape[1:]
    return torch.stack(((~padding[:, 0, :]).sum(1).float() / width, (~padding[:, :, 0]).sum(1).float() / height), -1)
