"""Data sets in the layouts of many tools, and generated shapes; loading, transforms and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.data.config import DataConfig
from steadydetr.data.transforms import DetrTransform, FixedSize, FixedSizeTransform, LargeScaleJitter, ShortestSide
from steadydetr.lazy import public_names
from steadydetr.limits import Limits

if TYPE_CHECKING:
    from steadydetr.data.dataset import Dataset, first_images, for_training
    from steadydetr.data.index import AnnotationIndex
    from steadydetr.data.loading import EvalLoader, TrainLoader, pad_batch
    from steadydetr.data.opening import open_data

__all__ = [
    "AnnotationIndex",
    "DataConfig",
    "Dataset",
    "DetrTransform",
    "EvalLoader",
    "FixedSize",
    "FixedSizeTransform",
    "LargeScaleJitter",
    "Limits",
    "ShortestSide",
    "TrainLoader",
    "first_images",
    "for_training",
    "open_data",
    "pad_batch",
]

__getattr__ = public_names(
    __name__,
    dataset=("Dataset", "first_images", "for_training"),
    index=("AnnotationIndex",),
    loading=("EvalLoader", "TrainLoader", "pad_batch"),
    opening=("open_data",),
)
