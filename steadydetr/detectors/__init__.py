"""The detectors: one file each, one frozen config each."""

from steadydetr.detectors.base import Detector, DetectorConfig, postprocess
from steadydetr.detectors.dab_deformable_detr import DABDeformableDETR, DABDeformableDETRConfig
from steadydetr.detectors.deformable import TransformerConfig
from steadydetr.detectors.deformable_detr import DeformableDETR, DeformableDETRConfig
from steadydetr.detectors.dino import DINO, DINOConfig

__all__ = [
    "DINO",
    "DABDeformableDETR",
    "DABDeformableDETRConfig",
    "DINOConfig",
    "DeformableDETR",
    "DeformableDETRConfig",
    "Detector",
    "DetectorConfig",
    "TransformerConfig",
    "postprocess",
]
