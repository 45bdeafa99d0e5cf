"""Layers that make queries of labels and boxes for detectors that have none of their own, as denoising needs them."""

from __future__ import annotations

from torch import Tensor, nn

from steadydetr.nn.decoder import AnchorPosition
from steadydetr.nn.initialisation import initialise


class LabelLayers(nn.Module):
    """Content of a label (DN-DETR 3.3) and, where every query must bring one, a position vector of a box (as DAB-DETR Eq. 3)."""

    def __init__(self, classes: int, width: int, places: bool) -> None:
        super().__init__()
        self.content = nn.Embedding(classes, width)
        self.position = AnchorPosition(width, scaled=False) if places else None
        if self.position is not None:
            initialise(self.position)

    def position_of(self, boxes: Tensor, content: Tensor) -> Tensor | None:
        """[B, N, 4] and content [B, N, D] -> [B, N, D]; None: there is no layer for it."""
        return None if self.position is None else self.position(0, content, boxes)
