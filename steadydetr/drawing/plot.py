"""Panels drawn with matplotlib: a colour is a run, dashes are averaged weights.

The key to the colours stands beside the panels on the page, so that no legend covers a line.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from steadydetr.drawing.colours import run_colours
from steadydetr.drawing.panels import Line, Panel
from steadydetr.files import one_line, replacing
from steadydetr.runs.records import WEIGHTS_LABELS, Records, without_seed


def panel_svg(panel: Panel, colour: Mapping[str, str]) -> bytes:
    """The panel as SVG, its letters as outlines, so that it needs no font."""
    figure = Figure(figsize=(4.4, 2.9))
    plot_panel(figure.add_axes((0.125, 0.165, 0.845, 0.725)), panel, colour)  # the same in all, so that they line up on the page
    with io.BytesIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def save_panel(panel: Panel, runs: Sequence[Records], output: Path) -> None:
    """The panel as a file of its own, PNG, SVG or PDF by its name, with its key below."""
    colour = run_colours(runs)
    shown = {(name, weights) for line in panel.lines for name, weights in [(without_seed(line.label), line.weights)]}
    figure = Figure(figsize=(5.6, 3.6 + 0.2 * len(shown)), layout="constrained")
    plot_panel(figure.subplots(), panel, colour)
    by_group = {without_seed(run.label): colour[run.label] for run in runs}
    handles = [
        Line2D([], [], color=by_group[name], linestyle=_stroke(weights), label=f"{name}, {WEIGHTS_LABELS[weights]}")
        for name, weights in sorted(shown)
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8, frameon=False)
    save_figure(figure, output, dpi=150)


def save_figure(figure: Figure, output: Path, dpi: int = 110) -> None:
    """The figure as a file, PNG, SVG or PDF by its name, whole or not at all."""
    with replacing(output) as file:
        figure.savefig(file, format=output.suffix.removeprefix("."), dpi=dpi)


def _by_recipe(lines: Sequence[Line]) -> list[list[Line]]:
    """The lines in groups that differ in their seed only."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((without_seed(line.label), line.weights), []).append(line)
    return list(found.values())


def _mean(lines: Sequence[Line]) -> Line:
    """The mean of several lines, over the x that all of them have."""
    points = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    common = [x for x in lines[0].x if all(x in values for values in points)]
    return Line(lines[0].label, lines[0].weights, common, [math.fsum(values[x] for values in points) / len(points) for x in common])


def _stroke(weights: str) -> Any:
    return (0, (4, 2)) if weights == "ema" else "-"


def plot_panel(axes: Axes, panel: Panel, colour: Mapping[str, str]) -> None:
    """Draw the lines of a panel; those of several seeds of one recipe are faint, and their mean stands out."""
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
    for x in panel.drops:
        axes.axvline(x, color="#8a94a0", linewidth=1, linestyle=(0, (1, 2)))
    axes.set_title(_verbatim(panel.title), fontsize=10.5, loc="left", color="#1d2733")
    axes.set_xlabel(panel.x_name, fontsize=9, color="#4a5663")
    _scale(axes, panel)
    _style(axes)


def _scale(axes: Axes, panel: Panel) -> None:
    """Axes from 0, or logarithmic where the panel asks for it and all values are positive."""
    values = [y for line in panel.lines for y in line.y]
    if panel.logarithmic and min(values) > 0:
        span = max(values) / min(values)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if span < 5 else (1, 2, 5) if span < 200 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(min(0.0, *values), (max(values) or 1.0) * 1.06)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if panel.x_names:
        axes.set_xticks(range(len(panel.x_names)), panel.x_names)
        axes.set_xlim(-0.3, len(panel.x_names) - 0.7)
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
    """A title as it stands: the name of a loss may hold dollar signs, which matplotlib would take for the start of a formula.

    Hidden characters, for which there are no letters, are escaped, and what has no end is cut.
    """
    return one_line(text, 100).replace("$", r"\$")
