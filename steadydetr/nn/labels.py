"""Layers that make queries of labels and boxes for detectors that have none of their own, as denoising needs them."""

from __future__ import annotations

from torch import nn

from steadydetr.nn.decoder import AnchorPosition


class LabelLayers(nn.Module):
    """Content of labels (DN-DETR 3.3) and, where every query must bring one, the layer that makes position vectors of boxes."""

    def __init__(self, classes: int, width: int, position: AnchorPosition | None) -> None:
        super().__init__()
        self.content = nn.Embedding(classes, width)
        self.position = position
