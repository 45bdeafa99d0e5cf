"""The detectors: one file each, one frozen config each."""

from steadydetr.detectors.base import Detector, postprocess
from steadydetr.detectors.configs import DABDeformableDETRConfig, DeformableDETRConfig, DetectorConfig, DINOConfig, TransformerConfig
from steadydetr.detectors.dab_deformable_detr import DABDeformableDETR
from steadydetr.detectors.deformable_detr import DeformableDETR
from steadydetr.detectors.dino import DINO

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
