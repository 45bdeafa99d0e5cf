"""The losses of the runs over their logged steps."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from steadydetr.drawing.panels.base import LOSSES, Panel, ReportFigure, over_logged_steps
from steadydetr.runs.records import Records


def total_loss(runs: Sequence[Records]) -> list[Panel]:
    return [Panel("Total loss", "step", over_logged_steps(runs, itemgetter("loss")), "no step logged yet", logarithmic=True)]


def loss_terms(runs: Sequence[Records]) -> list[Panel]:
    """A panel for every loss term that any run has."""
    terms = dict.fromkeys(name for run in runs for record in run.by_kind["train"] for name in record["losses"])
    return [loss_term(term, runs) for term in terms]


def loss_term(term: str, runs: Sequence[Records]) -> Panel:
    lines = over_logged_steps(runs, lambda record: record["losses"].get(term))
    return Panel(term, "step", lines, "has no such term", logarithmic=True)


FIGURES = (ReportFigure("loss", LOSSES, total_loss), ReportFigure("loss-terms", LOSSES, loss_terms))
