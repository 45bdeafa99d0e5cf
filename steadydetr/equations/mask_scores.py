"""How sure a detector is of an instance mask.

Legend: K masks, H x W pixels of the image.
"""

from __future__ import annotations

from torch import Tensor

EMPTY = 1e-6  # pixels, so that a mask without any has the quality 0


def mask_quality(logits: Tensor) -> Tensor:
    """[K, H, W] -> [K]: the mean probability of the pixels inside of a mask, those above 0.5.

    Released code of MaskDINO (`instance_inference`); by it the class score is multiplied.
    """
    inside = logits > 0
    total = (logits.sigmoid() * inside).flatten(1).sum(1)
    return total / (inside.flatten(1).sum(1).to(total.dtype) + EMPTY)
