"""The figures of the report and of `steadydetr figures`: a panel is a quantity, a colour a run; dashes are averaged weights.

The key to the colours stands beside them on the page, so that no legend covers a curve.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from steadydetr.runs.records import WEIGHTS, Records, by_recipe, without_seed
from steadydetr.runs.training_config import drops_of

COLOURS = ("#2166ac", "#d6604d", "#1b8a5a", "#8e4fb0", "#b8860b", "#0f9aa8", "#c2338a", "#5a6b7b", "#7a9a01", "#8c510a")
MOST_POINTS = 300  # of a curve; more are averaged
Record = dict[str, Any]


@dataclass(frozen=True)
class Line:
    label: str  # of its run
    weights: str  # "model" or "ema"
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """A quantity of all runs. A run that has none of it is named with `needs`."""

    title: str
    x_name: str
    lines: tuple[Line, ...]
    needs: str
    by_orders: bool = False
    names: tuple[str, ...] = ()  # of x = 0, 1, ..., where x is no number
    marks: tuple[float, ...] = ()  # vertical lines: where the learning rate drops


def colours(runs: Sequence[Records]) -> dict[str, str]:
    """By label; the seeds of a recipe share one."""
    return {run.label: COLOURS[i % len(COLOURS)] for i, members in enumerate(by_recipe(runs).values()) for run in members}


def around_the_drop(runs: Sequence[Records]) -> Panel:
    """OD-DETR's Figure 6: AP by epoch, with the drops of the learning rate."""
    plans = [run.recipe["training"] for run in runs]
    drops = {drop for plan in plans for drop in drops_of(plan.get("schedule", ""), plan.get("drop_epochs", ()), plan["epochs"])}
    lines = _over(runs, "eval", "epoch", itemgetter("ap"))
    return Panel("AP around the drop of the learning rate, %", "epoch", lines, "not evaluated yet", marks=tuple(sorted(drops)))


def learning(runs: Sequence[Records]) -> list[Panel]:
    needs = "not evaluated yet"
    names = {"ap": "AP, %", "ap50": "AP50, %", "ap75": "AP75, %"}
    return [Panel(title, "step", _over(runs, "eval", "step", itemgetter(name)), needs) for name, title in names.items()]


def stability(runs: Sequence[Records]) -> list[Panel]:
    """Stable-DINO's Figure 3, DN-DETR's and OD-DETR's Figure 1, OD-DETR's Figure 5, and what lies between them."""
    layers = _names(runs, lambda r: list(r["unstable_score"]))
    pairs = _names(runs, lambda r: [f"{k}–{k + 1}" for k in range(1, len(r["between_stages"]) + 1)])
    stages = _names(runs, lambda r: [str(k) for k in range(1, len(r["consistency"] or ()) + 1)])
    none, average = "not measured yet", "needs averaged weights (training.ema_decay) and a measurement"
    return [
        Panel("Unstable score by layer, %", "decoder layer", _at_end(runs, lambda r: r["unstable_score"], layers), none, names=layers),
        Panel(
            "Unstable score, last layer, %",
            "step",
            _over(runs, "stability", "step", lambda r: list(r["unstable_score"].values())[-1] if r["unstable_score"] else None),
            none,
        ),
        Panel(
            "Instability between stages",
            "stages",
            _at_end(runs, lambda r: dict(zip(pairs, r["between_stages"], strict=False)), pairs),
            "not measured yet, or one stage only",
            names=pairs,
        ),
        Panel(
            "Instability between epochs",
            "epoch",
            _over(runs, "stability", "epoch", lambda r: r["between_epochs"], at_epochs=True),
            "needs two measurements at ends of epochs",
        ),
        Panel(
            "Consistency with the average, last stage, %",
            "step",
            _over(runs, "stability", "step", lambda r: r["consistency"][-1] if r["consistency"] else None),
            average,
        ),
        Panel(
            "Consistency with the average by stage, %",
            "stage",
            _at_end(runs, lambda r: dict(zip(stages, r["consistency"] or (), strict=False)), stages),
            average,
            names=stages,
        ),
    ]


def losses(runs: Sequence[Records]) -> list[Panel]:
    """The total, then every term that any run has."""
    terms = dict.fromkeys(name for run in runs for record in run.by_kind["train"] for name in record["losses"])
    panels = [Panel("Total loss", "step", _logged(runs, itemgetter("loss")), "no step logged yet", True)]
    return panels + [Panel(term, "step", _logged(runs, _term(term)), "has no such term", True) for term in terms]


def _term(name: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        found: float | None = record["losses"].get(name)
        return found

    return value


def optimisation(runs: Sequence[Records]) -> list[Panel]:
    return [
        Panel("Learning rate", "step", _logged(runs, itemgetter("lr")), "no step logged yet"),
        Panel("Gradient norm, before clipping", "step", _logged(runs, itemgetter("gradient_norm")), "no step logged yet", True),
    ]


def speed(runs: Sequence[Records]) -> list[Panel]:
    return [
        Panel("Images per second", "step", _logged(runs, itemgetter("images_per_second")), "no step logged yet"),
        Panel("Peak memory, GiB", "step", _logged(runs, lambda r: r.get("memory_gib")), "its version logged none"),
    ]


def _logged(runs: Sequence[Records], value: Callable[[Record], float | None]) -> tuple[Line, ...]:
    """A line for every run, over its logged steps."""
    lines = (_line(run.label, "model", run.by_kind["train"], "step", value) for run in runs)
    return tuple(line for line in lines if line.x)


def _over(runs: Sequence[Records], kind: str, x: str, value: Callable[[Record], float | None], at_epochs: bool = False) -> tuple[Line, ...]:
    """A line for every run and its trained and averaged weights; `at_epochs` leaves out what was measured between ends of epochs."""
    found = []
    for run in runs:
        ends = {record["step"] for record in run.by_kind["eval"]}
        for weights in WEIGHTS:
            records = [r for r in run.of(kind, weights) if not at_epochs or r["step"] in ends]
            found.append(_line(run.label, weights, records, x, value))
    return tuple(line for line in found if line.x)


def _line(label: str, weights: str, records: Sequence[Record], x: str, value: Callable[[Record], float | None]) -> Line:
    points = [(record[x], y) for record in records if (y := value(record)) is not None and math.isfinite(y)]
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return Line(label, weights, *([math.fsum(p[k] for p in part) / len(part) for part in parts] for k in (0, 1)))


def _names(runs: Sequence[Records], of: Callable[[Record], list[str]]) -> tuple[str, ...]:
    """The longest list of places at the runs' last measurements."""
    found = [of(last) for run in runs for weights in WEIGHTS if (last := run.last("stability", weights))]
    return tuple(sorted({name for names in found for name in names}, key=lambda name: int(name.split("–")[0])))


def _at_end(runs: Sequence[Records], values: Callable[[Record], Mapping[str, float]], names: Sequence[str]) -> tuple[Line, ...]:
    """The last measurement of every run, over the places `names`."""
    found = []
    for run in runs:
        for weights in WEIGHTS:
            last = run.last("stability", weights)
            points = [] if last is None else [(names.index(name), value) for name, value in values(last).items()]
            found.append(Line(run.label, weights, [x for x, _ in points], [y for _, y in points]))
    return tuple(line for line in found if line.x)


def draw(panel: Panel, colour: Mapping[str, str]) -> bytes:
    """The panel as SVG, its letters as outlines, so that it needs no font."""
    figure = Figure(figsize=(4.4, 2.9))
    _plot(figure.add_axes((0.125, 0.165, 0.845, 0.725)), panel, colour)  # the same in all, so that they line up on the page
    with io.BytesIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def save(panel: Panel, runs: Sequence[Records], output: Path) -> None:
    """The panel as a file of its own, PNG, SVG or PDF by its name, with its key below."""
    colour = colours(runs)
    shown = {(name, weights) for line in panel.lines for name, weights in [(without_seed(line.label), line.weights)]}
    figure = Figure(figsize=(5.6, 3.6 + 0.2 * len(shown)), layout="constrained")
    _plot(figure.subplots(), panel, colour)
    by_group = {without_seed(run.label): colour[run.label] for run in runs}
    handles = [
        Line2D([], [], color=by_group[name], linestyle=_stroke(weights), label=f"{name}, {WEIGHTS[weights]}")
        for name, weights in sorted(shown)
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(output, dpi=150)


def _by_recipe(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines that differ in their seed only."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((without_seed(line.label), line.weights), []).append(line)
    return list(found.values())


def _mean(lines: Sequence[Line]) -> Line:
    """Over the x that all have."""
    points = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    common = [x for x in lines[0].x if all(x in values for values in points)]
    return Line(lines[0].label, lines[0].weights, common, [math.fsum(values[x] for values in points) / len(points) for x in common])


def _stroke(weights: str) -> Any:
    return (0, (4, 2)) if weights == "ema" else "-"


def _plot(axes: Axes, panel: Panel, colour: Mapping[str, str]) -> None:
    """Seeds of one recipe are faint, their mean stands out."""
    for members in _by_recipe(panel.lines):
        if len(members) > 1:
            for line in members:
                axes.plot(line.x, line.y, color=colour[line.label], linestyle=_stroke(line.weights), linewidth=0.7, alpha=0.3)
        line = _mean(members)
        axes.plot(
            line.x,
            line.y,
            color=colour[line.label],
            linestyle=_stroke(line.weights),
            linewidth=1.5,
            alpha=0.95,
            marker="o" if len(line.x) <= 24 else "",
            markersize=4.5,
            markerfacecolor="white" if line.weights == "ema" else colour[line.label],
        )
    for x in panel.marks:
        axes.axvline(x, color="#8a94a0", linewidth=1, linestyle=(0, (1, 2)))
    axes.set_title(_verbatim(panel.title), fontsize=10.5, loc="left", color="#1d2733")
    axes.set_xlabel(panel.x_name, fontsize=9, color="#4a5663")
    _scale(axes, panel)
    _style(axes)


def _scale(axes: Axes, panel: Panel) -> None:
    """From 0, or by orders of magnitude for what falls by them, as long as it is positive."""
    values = [y for line in panel.lines for y in line.y]
    if panel.by_orders and min(values) > 0:
        span = max(values) / min(values)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if span < 5 else (1, 2, 5) if span < 200 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(min(0.0, *values), (max(values) or 1.0) * 1.06)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if panel.names:
        axes.set_xticks(range(len(panel.names)), panel.names)
        axes.set_xlim(-0.3, len(panel.names) - 0.7)
    else:
        axes.set_xlim(0, max(x for line in panel.lines for x in line.x) * 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}"))


def _style(axes: Axes) -> None:
    axes.grid(color="#dfe4ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors="#4a5663", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#aab4bf")


def _verbatim(text: str) -> str:
    """A term may hold dollars, which would begin a formula."""
    return text.replace("$", r"\$")
