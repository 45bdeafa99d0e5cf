"""The detectors: one file each, and their frozen configs, one file a family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.detectors.configs.adamixer import AdaMixerConfig
from steadydetr.detectors.configs.base import DetectorConfig
from steadydetr.detectors.configs.deformable import DABDeformableDETRConfig, DeformableDETRConfig, DINOConfig, TransformerConfig
from steadydetr.lazy import public_names

if TYPE_CHECKING:
    from steadydetr.detectors.adamixer import AdaMixer
    from steadydetr.detectors.base import Detector, postprocess
    from steadydetr.detectors.dab_deformable_detr import DABDeformableDETR
    from steadydetr.detectors.deformable_detr import DeformableDETR
    from steadydetr.detectors.dino import DINO

__all__ = [
    "DINO",
    "AdaMixer",
    "AdaMixerConfig",
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

__getattr__ = public_names(
    __name__,
    adamixer=("AdaMixer",),
    base=("Detector", "postprocess"),
    dab_deformable_detr=("DABDeformableDETR",),
    deformable_detr=("DeformableDETR",),
    dino=("DINO",),
)
