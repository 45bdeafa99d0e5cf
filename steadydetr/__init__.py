"""SteadyDETR: stable training and distillation for the DETR family of object detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.lazy import public_names

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

__getattr__ = public_names(  # so that `import steadydetr` costs nothing
    __name__,
    data=("open_data",),
    kinds=("register", "use"),
    **{
        "recipes.base": ("Recipe", "recipe"),
        "recipes.distill": ("distilled",),
        "tools.detections": ("Detections",),
        "tools.finetune": ("finetune",),
        "tools.predictor": ("Predictor", "load"),
        "training.loop": ("train",),
        "training.not_finite": ("replay",),
    },
)
