"""Where version 0.1 had what stands in steadydetr.tools today: scripts that were written for it keep running."""

from steadydetr.tools.evaluate import align_classes, relabel
from steadydetr.tools.predictor import Predictor, load

__all__ = ["Predictor", "align_classes", "load", "relabel"]
