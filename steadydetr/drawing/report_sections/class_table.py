"""AP of every class at the last evaluation of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steadydetr.drawing.report_sections.base import Cell, Lack, RunName, last_evaluations, mark_highest, name_of
from steadydetr.runs.records import Records


@dataclass(frozen=True)
class ClassRow:
    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class ClassTable:
    runs: list[RunName]
    rows: list[ClassRow]
    not_evaluated: Lack
    title: str = "Average precision by class"
    layout: str = "class table"


def class_table(runs: Sequence[Records]) -> ClassTable:
    found = last_evaluations(runs)
    classes = dict.fromkeys(name for *_, last in found for name in last["per_class"])
    rows = [ClassRow(name, mark_highest([last["per_class"].get(name) for *_, last in found])) for name in classes]
    return ClassTable([name_of(run, runs, weights) for run, weights, _ in found], rows, Lack.of([] if found else runs, "not evaluated yet"))
