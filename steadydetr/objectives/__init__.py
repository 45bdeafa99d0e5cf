"""The objectives: a training method is a tuple of them over one criterion."""

from steadydetr.objectives.base import Objective
from steadydetr.objectives.denoising import Denoising
from steadydetr.objectives.detection import Detection

__all__ = ["Denoising", "Detection", "Objective"]
