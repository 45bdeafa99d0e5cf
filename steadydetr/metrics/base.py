"""What a metric is: its name in files, its label for people, and the function that computes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from steadydetr.data.index import AnnotationIndex
from steadydetr.metrics.results import Results

Values = Mapping[str, float | dict[str, float]]  # by a metric's name: one number, or a number for every class


@dataclass(frozen=True)
class Metric:
    """How a metric is written and where it is shown. All metrics are percentages; -1 where the data has no such objects."""

    name: str  # in files
    label: str  # for people
    report_column: str = ""  # its heading in the report's table of the last evaluation; not in that table if empty
    drawn: bool = False  # over the steps of a run, in the report
    in_summary: bool = False  # copied into summary.json at the end of a run, and read from there by `steadydetr compare`
    required: bool = False  # an evaluation's record in metrics.jsonl is damaged without it; only what version 0.1 wrote can be


@dataclass(frozen=True)
class Measurer:
    """A function that computes metrics from detections and annotations, and what it computes."""

    measure: Callable[[Results, AnnotationIndex], Values]
    metrics: tuple[Metric, ...]  # one number each
    by_class: tuple[Metric, ...] = ()  # a number for every class that has objects
