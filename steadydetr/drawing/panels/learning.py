"""Average precision over the steps of the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from steadydetr.drawing.panels.base import LEARNING, Panel, Record, ReportFigure, over_measurements
from steadydetr.metrics.base import Metric
from steadydetr.metrics.table import METRICS
from steadydetr.runs.records import Records
from steadydetr.runs.training_config import drops_of

NEEDS = "not evaluated yet"


def metric_by_step(metric: Metric, runs: Sequence[Records]) -> list[Panel]:
    needs = NEEDS if metric.required else f"{NEEDS}, or by a version without this metric"
    return [Panel(f"{metric.label}, %", "step", over_measurements(runs, "eval", "step", _value(metric.name)), needs)]


def ap_around_drop(runs: Sequence[Records]) -> list[Panel]:
    """AP by epoch, with the drops of the learning rate."""
    plans = [run.recipe["training"] for run in runs]
    drops = {drop for plan in plans for drop in drops_of(plan.get("schedule", ""), plan.get("drop_epochs", ()), plan["epochs"])}
    lines = over_measurements(runs, "eval", "epoch", _value("ap"))
    return [Panel("AP around the drop of the learning rate, %", "epoch", lines, NEEDS, drops=tuple(sorted(drops)))]


def _value(name: str) -> Callable[[Record], float | None]:
    """A metric of a record; None where an older version wrote the record."""

    def value(record: Record) -> float | None:
        found: float | None = record.get(name)
        return found

    return value


FIGURES = (
    *(ReportFigure(metric.name, LEARNING, partial(metric_by_step, metric)) for metric in METRICS if metric.drawn),
    ReportFigure("ap-around-drop", LEARNING, ap_around_drop, paper="OD-DETR Fig. 6"),
)
