"""Data sets: COCO, Pascal VOC and generated shapes; loading, transforms and checks."""

from steadydetr.data.dataset import Dataset, first_images, for_training
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.loading import DataConfig, EvalLoader, TrainLoader, pad_batch
from steadydetr.data.opening import open_data
from steadydetr.data.transforms import DetrTransform, FixedSize, FixedSizeTransform, ShortestSide
from steadydetr.limits import Limits

__all__ = [
    "AnnotationIndex",
    "DataConfig",
    "Dataset",
    "DetrTransform",
    "EvalLoader",
    "FixedSize",
    "FixedSizeTransform",
    "Limits",
    "ShortestSide",
    "TrainLoader",
    "first_images",
    "for_training",
    "open_data",
    "pad_batch",
]
