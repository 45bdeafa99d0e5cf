"""The metrics of the last evaluation of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from steadydetr.data.hold_out import HoldOut
from steadydetr.drawing.report_sections.base import Cell, Lack, RunName, last_evaluations, mark_highest, name_of
from steadydetr.metrics.table import METRICS
from steadydetr.runs.records import Records


@dataclass(frozen=True)
class MetricRow:
    name: RunName
    step: int
    cells: list[Cell]


@dataclass(frozen=True)
class MetricTable:
    columns: list[str]
    rows: list[MetricRow]
    comparable: bool  # all runs were evaluated on the same data
    not_evaluated: Lack
    without_average: Lack
    title: str = "Average precision"
    layout: str = "metric table"


def metric_table(runs: Sequence[Records]) -> MetricTable:
    """The last evaluation of every run; only the metrics of the table that any run has."""
    found = last_evaluations(runs)
    shown = [metric for metric in METRICS if metric.report_column and (metric.required or any(metric.name in last for *_, last in found))]
    columns = [mark_highest([last.get(metric.name) for *_, last in found]) for metric in shown]
    return MetricTable(
        [metric.report_column for metric in shown],
        [
            MetricRow(name_of(run, runs, weights), last["step"], [column[i] for column in columns])
            for i, (run, weights, last) in enumerate(found)
        ],
        len({evaluation_data(run) for run in runs}) == 1,
        Lack.of([run for run in runs if run.best is None], "not evaluated yet"),
        Lack.of([run for run in runs if run.best and not run.of("eval", "ema")], "no averaged weights (training.ema_decay)"),
    )


def evaluation_data(run: Records) -> tuple[Any, ...]:
    """What a run is evaluated on, as its recipe names it."""
    data = run.recipe.get("data") or {}
    held_out = tuple(data.get(field.name, field.default) for field in fields(HoldOut))
    return data.get("val_source") or data.get("source"), data.get("val_split"), data.get("limit"), held_out, run.classes
