"""What a figure of the report consists of: a panel shows one quantity of all runs, and each line in it belongs to one run.

This file has the types, the sections of the report that show figures, and the functions that make lines of runs' records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from steadydetr.runs.folder import Record
from steadydetr.runs.records import WEIGHTS_LABELS, Records

MOST_POINTS = 300  # of a line; of more, neighbours are averaged
LARGEST = 1e100  # of what is drawn; a run that has diverged has larger values, infinite ones and NaN


@dataclass(frozen=True)
class Line:
    label: str  # of its run
    weights: str  # "model" or "ema"
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One quantity of all runs."""

    title: str
    x_name: str
    lines: tuple[Line, ...]
    needs: str  # what a run without a line here would need, or why it has none
    logarithmic: bool = False  # where all values are positive
    x_names: tuple[str, ...] = ()  # of x = 0, 1, ..., where x is no number
    drops: tuple[float, ...] = ()  # vertical lines where the learning rate drops


@dataclass(frozen=True)
class Section:
    """A part of the report that shows panels."""

    title: str
    text: str | Markup  # Markup may hold HTML; it is never made of a run's values


@dataclass(frozen=True)
class ReportFigure:
    """An entry of the table of figures."""

    name: str  # of its file
    section: Section
    panels: Callable[[Sequence[Records]], list[Panel]]  # from all runs; one panel, or as many as the runs have losses
    paper: str = ""  # where a paper has this figure; `steadydetr figures` draws the figures that have such a place


LEARNING = Section("Learning", "AP on the held-out images at every evaluation. Dotted lines: the learning rate drops.")
STABILITY = Section(
    "Stability of matching",
    Markup(
        "The same held-out images, matched at every decoder stage. <b>Unstable score</b> (Stable-DINO): objects whose query is another one"
        " than a layer before; layer 1 is compared with the encoder's proposals. <b>Instability</b> (DN-DETR, DETRDistill): queries of an"
        " image, on average, that hold another object than a stage, or an epoch, before. <b>Consistency</b> (OD-DETR): matched queries"
        " that hold the same object in the trained and in the averaged weights. By layer or stage: at the last measurement."
    ),
)
LOSSES = Section(
    "Losses",
    "Weighted, summed over decoder stages; logarithmic, where no value is 0. The part before the stroke is the objective: main is the"
    " detection loss of the detector's queries, denoising that of noised boxes, proposals that of the encoder's proposals.",
)
OPTIMISATION = Section("Learning rate and gradient", "Of the detector; a backbone may have a rate of its own.")
SPEED = Section("Speed and memory", "Memory: on a GPU the most that tensors took, on a CPU that the process took.")


def over_logged_steps(runs: Sequence[Records], value: Callable[[Record], float | None]) -> tuple[Line, ...]:
    """A line for every run, over its logged steps."""
    lines = (_line(run.label, "model", run.by_kind["train"], "step", value) for run in runs)
    return tuple(line for line in lines if line.x)


def over_measurements(
    runs: Sequence[Records], kind: str, x: str, value: Callable[[Record], float | None], at_epochs: bool = False
) -> tuple[Line, ...]:
    """A line for the trained and one for the averaged weights of every run.

    Args:
        kind: "eval" or "stability", the records that are drawn.
        x: "step" or "epoch".
        at_epochs: leave out what was measured between ends of epochs.
    """
    found = []
    for run in runs:
        ends = {record["step"] for record in run.by_kind["eval"]}
        for weights in WEIGHTS_LABELS:
            records = [r for r in run.of(kind, weights) if not at_epochs or r["step"] in ends]
            found.append(_line(run.label, weights, records, x, value))
    return tuple(line for line in found if line.x)


def at_last_measurement(runs: Sequence[Records], values: Callable[[Record], Mapping[str, float]], names: Sequence[str]) -> tuple[Line, ...]:
    """The last measurement of stability of every run, over `names`: layers, stages, or pairs of stages."""
    found = []
    for run in runs:
        for weights in WEIGHTS_LABELS:
            last = run.last("stability", weights)
            points = [] if last is None else [(names.index(name), value) for name, value in values(last).items() if abs(value) < LARGEST]
            found.append(Line(run.label, weights, [x for x, _ in points], [y for _, y in points]))
    return tuple(line for line in found if line.x)


def measured_stages(runs: Sequence[Records], of: Callable[[Record], list[str]]) -> tuple[str, ...]:
    """All layers, stages or pairs of stages, in order, that the last measurements of stability have values for."""
    found = [of(last) for run in runs for weights in WEIGHTS_LABELS if (last := run.last("stability", weights))]
    return tuple(sorted({name for names in found for name in names}, key=lambda name: int(name.split("–")[0])))


def _line(label: str, weights: str, records: Sequence[Record], x: str, value: Callable[[Record], float | None]) -> Line:
    points = [(record[x], y) for record in records if (y := value(record)) is not None and abs(y) < LARGEST]
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return Line(label, weights, *([math.fsum(p[k] for p in part) / len(part) for part in parts] for k in (0, 1)))
