"""What the optimiser did, over the logged steps of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from steadydetr.drawing.panels.base import OPTIMISATION, Panel, ReportFigure, over_logged_steps
from steadydetr.runs.records import Records

NOT_LOGGED = "no step logged yet"


def learning_rate(runs: Sequence[Records]) -> list[Panel]:
    return [Panel("Learning rate", "step", over_logged_steps(runs, itemgetter("lr")), NOT_LOGGED)]


def gradient_norm(runs: Sequence[Records]) -> list[Panel]:
    lines = over_logged_steps(runs, itemgetter("gradient_norm"))
    return [Panel("Gradient norm, before clipping", "step", lines, NOT_LOGGED, logarithmic=True)]


FIGURES = (ReportFigure("learning-rate", OPTIMISATION, learning_rate), ReportFigure("gradient-norm", OPTIMISATION, gradient_norm))
