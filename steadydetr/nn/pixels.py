"""A vector for every pixel of a fine map, made of that map and of what an encoder made of the coarser ones (MaskDINO)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PixelEmbedding(nn.Module):
    """One step of a feature pyramid: the encoder's finest level, enlarged, is added to the projected map of the backbone."""

    def __init__(self, channels: int, dim: int, groups: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(channels, dim, 1, bias=False)
        self.lateral_norm = nn.GroupNorm(groups, dim)
        self.smooth = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.smooth_norm = nn.GroupNorm(groups, dim)
        self.project = nn.Conv2d(dim, dim, 1)
        for conv in (self.lateral, self.smooth, self.project):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]  # it has one

    def forward(self, fine: Tensor, level: Tensor) -> Tensor:
        """The backbone's map [B, channels, h, w] and the encoder's finest level [B, D, h', w'] -> [B, D, h, w]."""
        enlarged = F.interpolate(level, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        both = self.lateral_norm(self.lateral(fine)) + enlarged
        return self.project(self.smooth_norm(self.smooth(both)).relu())
