"""The layouts of checkpoints that are known: each is one file, which says what its project calls our parameters."""

from __future__ import annotations

from steadydetr.checkpoints.layouts import (
    adamixer,
    conditional,
    conditional_detrex,
    conditional_hugging_face,
    conditional_mmdet,
    detrex,
    hugging_face,
    maskdino,
    mmdet,
    original,
)
from steadydetr.checkpoints.layouts.base import KeyLayout

# a checkpoint is of the first layout whose mark one of its keys matches
LAYOUTS: tuple[KeyLayout, ...] = (
    conditional_hugging_face.LAYOUT,
    conditional.LAYOUT,
    conditional_detrex.LAYOUT,
    conditional_mmdet.LAYOUT,
    hugging_face.LAYOUT,
    adamixer.LAYOUT,
    maskdino.LAYOUT,
    mmdet.LAYOUT,
    detrex.LAYOUT,
    original.LAYOUT,
)
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def known_layouts() -> str:
    """Which checkpoints can be read, for messages."""
    return ", ".join(layout.described for layout in reversed(LAYOUTS))
