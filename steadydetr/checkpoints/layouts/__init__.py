"""The layouts of checkpoints that are known: each is one file, which says what its project calls our parameters."""

from __future__ import annotations

from importlib import import_module

from steadydetr.checkpoints.layouts.base import KeyLayout

MODULES = (  # files of this folder; a checkpoint is of the first layout whose mark one of its keys matches
    "hugging_face",
    "mmdet",
    "detrex",
    "original",
)
LAYOUTS: tuple[KeyLayout, ...] = tuple(import_module(f"{__name__}.{module}").LAYOUT for module in MODULES)
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def known_layouts() -> str:
    """Which checkpoints can be read, for messages."""
    return ", ".join(layout.described for layout in reversed(LAYOUTS))
