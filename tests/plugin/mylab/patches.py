"""A backbone: patches of 8 x 8 pixels, halved twice."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from steadydetr import register
from steadydetr.nn.backbone import BackboneConfig


@register("patch-backbone")
@dataclass(frozen=True)
class PatchBackboneConfig(BackboneConfig):
    """Channels of the maps of stride 8, 16 and 32."""

    channels: tuple[int, ...] = (16, 32, 48)

    def build(self) -> PatchBackbone:
        return PatchBackbone(self)


class PatchBackbone(nn.Module):
    """Pixels [B, 3, H, W], normalised, to maps [B, c, h, w], fine to coarse. `channels` and `strides` tell what they are.

    `mean` and `std` would tell by what pixels in 0..1 are normalised, where that is not ImageNet's.
    """

    def __init__(self, config: PatchBackboneConfig) -> None:
        super().__init__()
        self.channels, self.strides = list(config.channels), [8 * 2**k for k in range(len(config.channels))]
        self.first = nn.Conv2d(3, self.channels[0], 8, 8)
        self.rest = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(self.channels, self.channels[1:], strict=False))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = [self.first(pixels).relu()]
        for layer in self.rest:
            maps.append(layer(maps[-1]).relu())
        return maps
