"""The table of the figures that are drawn from runs' records; the report and `steadydetr figures` both read it.

A new figure is a file here with its own FIGURES, which it adds to REPORT_FIGURES.
"""

from __future__ import annotations

from steadydetr.drawing.panels import learning, losses, optimisation, speed, stability
from steadydetr.drawing.panels.base import Line, Panel, ReportFigure, Section

REPORT_FIGURES: tuple[ReportFigure, ...] = (  # in the order in which they are shown
    *learning.FIGURES,
    *stability.FIGURES,
    *losses.FIGURES,
    *optimisation.FIGURES,
    *speed.FIGURES,
)

__all__ = ["REPORT_FIGURES", "Line", "Panel", "ReportFigure", "Section"]
