"""Where version 0.1 had what stands in steadydetr.metrics today: scripts that were written for it keep running."""

from steadydetr.metrics.evaluation import evaluate
from steadydetr.metrics.results import Results

__all__ = ["Results", "evaluate"]
