"""Where version 0.1 had what stands elsewhere today: scripts that were written for it keep running."""

from steadydetr.data.images import open_picture
from steadydetr.tools.detections import Detections

__all__ = ["Detections", "open_picture"]
