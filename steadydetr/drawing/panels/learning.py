"""Average precision over the steps of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import itemgetter

from steadydetr.drawing.panels.base import LEARNING, Panel, ReportFigure, over_measurements
from steadydetr.metrics.base import Metric
from steadydetr.metrics.table import METRICS
from steadydetr.runs.records import Records
from steadydetr.runs.training_config import drops_of

NOT_EVALUATED = "not evaluated yet"


def metric_by_step(metric: Metric, runs: Sequence[Records]) -> list[Panel]:
    """One metric over the steps; no panel of one that not every run has, as AP of masks, where none does."""
    needs = NOT_EVALUATED if metric.required else f"{NOT_EVALUATED}, or without this metric"
    lines = over_measurements(runs, "eval", "step", lambda record: record.get(metric.name))
    return [Panel(f"{metric.label}, %", "step", lines, needs)] if metric.required or lines else []


def ap_around_drop(runs: Sequence[Records]) -> list[Panel]:
    """AP by epoch, with the drops of the learning rate."""
    plans = [run.recipe["training"] for run in runs]
    drops = {drop for plan in plans for drop in drops_of(plan.get("schedule", ""), plan.get("drop_epochs", ()), plan["epochs"])}
    lines = over_measurements(runs, "eval", "epoch", itemgetter("ap"))
    return [Panel("AP around the drop of the learning rate, %", "epoch", lines, NOT_EVALUATED, drops=tuple(sorted(drops)))]


FIGURES = (
    *(ReportFigure(metric.name, LEARNING, partial(metric_by_step, metric)) for metric in METRICS if metric.drawn),
    ReportFigure("ap-around-drop", LEARNING, ap_around_drop, paper="OD-DETR Fig. 6"),
)
