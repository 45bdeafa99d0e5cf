"""The table of the figures that are drawn from runs' records; the report and `steadydetr figures` both read it.

A new figure is a file here with its own FIGURES, and its name in FILES.
"""

from __future__ import annotations

from importlib import import_module

from steadydetr.drawing.panels.base import Line, Panel, ReportFigure, Section

FILES = (  # in the order in which their figures are shown
    "learning",
    "stability",
    "losses",
    "optimisation",
    "speed",
)
REPORT_FIGURES: tuple[ReportFigure, ...] = tuple(figure for name in FILES for figure in import_module(f"{__name__}.{name}").FIGURES)

__all__ = ["REPORT_FIGURES", "Line", "Panel", "ReportFigure", "Section"]
