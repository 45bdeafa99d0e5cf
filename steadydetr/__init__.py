"""SteadyDETR: stable training and distillation for the DETR family of object detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steadydetr.data import open_data
    from steadydetr.kinds import register, use
    from steadydetr.recipes.base import Recipe, recipe
    from steadydetr.recipes.distill import distilled
    from steadydetr.tools.detections import Detections
    from steadydetr.tools.finetune import finetune
    from steadydetr.tools.predictor import Predictor, load
    from steadydetr.training.loop import train
    from steadydetr.training.not_finite import replay

__version__ = "0.2.0.dev0"
__all__ = [
    "Detections",
    "Predictor",
    "Recipe",
    "__version__",
    "distilled",
    "finetune",
    "load",
    "open_data",
    "recipe",
    "register",
    "replay",
    "train",
    "use",
]

_HOMES = {
    "Detections": "tools.detections",
    "Predictor": "tools.predictor",
    "Recipe": "recipes.base",
    "distilled": "recipes.distill",
    "finetune": "tools.finetune",
    "load": "tools.predictor",
    "open_data": "data",
    "recipe": "recipes.base",
    "register": "kinds",
    "replay": "training.not_finite",
    "train": "training.loop",
    "use": "kinds",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `import steadydetr` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'steadydetr' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"steadydetr.{_HOMES[name]}"), name)
