"""The detectors: one file each, and their frozen configs, one file a family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.detectors.configs.adamixer import AdaMixerConfig
from steadydetr.detectors.configs.base import DetectorConfig
from steadydetr.detectors.configs.conditional import ConditionalDETRConfig, PlainTransformerConfig
from steadydetr.detectors.configs.deformable import (
    DABDeformableDETRConfig,
    DeformableDETRConfig,
    DINOConfig,
    DNDABDeformableDETRConfig,
    TransformerConfig,
)
from steadydetr.detectors.configs.h_deformable_detr import HDeformableDETRConfig
from steadydetr.detectors.configs.maskdino import MaskDINOConfig
from steadydetr.lazy import public_names

if TYPE_CHECKING:
    from steadydetr.detectors.adamixer import AdaMixer
    from steadydetr.detectors.base import Detector, Prediction, postprocess
    from steadydetr.detectors.conditional_detr import ConditionalDETR
    from steadydetr.detectors.dab_deformable_detr import DABDeformableDETR
    from steadydetr.detectors.deformable_detr import DeformableDETR
    from steadydetr.detectors.dino import DINO
    from steadydetr.detectors.h_deformable_detr import HDeformableDETR
    from steadydetr.detectors.maskdino import MaskDINO

__all__ = [
    "DINO",
    "AdaMixer",
    "AdaMixerConfig",
    "ConditionalDETR",
    "ConditionalDETRConfig",
    "DABDeformableDETR",
    "DABDeformableDETRConfig",
    "DINOConfig",
    "DNDABDeformableDETRConfig",
    "DeformableDETR",
    "DeformableDETRConfig",
    "Detector",
    "DetectorConfig",
    "HDeformableDETR",
    "HDeformableDETRConfig",
    "MaskDINO",
    "MaskDINOConfig",
    "PlainTransformerConfig",
    "Prediction",
    "TransformerConfig",
    "postprocess",
]

__getattr__ = public_names(
    __name__,
    adamixer=("AdaMixer",),
    base=("Detector", "Prediction", "postprocess"),
    conditional_detr=("ConditionalDETR",),
    dab_deformable_detr=("DABDeformableDETR",),
    deformable_detr=("DeformableDETR",),
    dino=("DINO",),
    h_deformable_detr=("HDeformableDETR",),
    maskdino=("MaskDINO",),
)
