"""Speed and memory over the logged steps of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from steadydetr.drawing.panels.base import SPEED, Panel, ReportFigure, over_logged_steps
from steadydetr.runs.records import Records


def images_per_second(runs: Sequence[Records]) -> list[Panel]:
    return [Panel("Images per second", "step", over_logged_steps(runs, itemgetter("images_per_second")), "no step logged yet")]


def peak_memory_by_step(runs: Sequence[Records]) -> list[Panel]:
    lines = over_logged_steps(runs, lambda record: record.get("memory_gib"))
    return [Panel("Peak memory, GiB", "step", lines, "its version logged none")]


FIGURES = (ReportFigure("images-per-second", SPEED, images_per_second), ReportFigure("peak-memory", SPEED, peak_memory_by_step))
