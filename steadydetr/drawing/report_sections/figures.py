"""The figures of drawing/panels, in their sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steadydetr.drawing.colours import run_colours
from steadydetr.drawing.panels import REPORT_FIGURES, Panel, Section
from steadydetr.drawing.report_sections.base import EmbeddedPicture, Lack
from steadydetr.runs.records import WEIGHTS_LABELS, Records, by_recipe


@dataclass(frozen=True)
class KeyEntry:
    label: str
    colour: str
    seeds: int


@dataclass(frozen=True)
class PanelFigure:
    title: str
    picture: EmbeddedPicture | None  # None where no run has such values
    absent: Lack


@dataclass(frozen=True)
class FigureSection:
    title: str
    text: str
    absent: Lack  # runs that have none of the figures
    key: list[KeyEntry]  # what the colours mean, where there are several
    has_averages: bool
    figures: list[PanelFigure]
    layout: str = "figures"


def figure_sections(runs: Sequence[Records]) -> list[FigureSection]:
    """The sections of all figures of the table."""
    panels: dict[Section, list[Panel]] = {}
    for figure in REPORT_FIGURES:
        panels.setdefault(figure.section, []).extend(figure.panels(runs))
    return [figure_section(section, shown, runs) for section, shown in panels.items()]


def figure_section(section: Section, panels: Sequence[Panel], runs: Sequence[Records]) -> FigureSection:
    """A section with its panels. A run that has none of them is named once, for the whole section."""
    with_lines = {line.label for panel in panels for line in panel.lines}
    present = [run for run in runs if run.label in with_lines]
    colour = run_colours(runs)
    key = [KeyEntry(name, colour[members[0].label], len(members)) for name, members in by_recipe(runs).items()]
    return FigureSection(
        section.title,
        section.text,
        Lack.of([run for run in runs if run.label not in with_lines], panels[0].needs),
        key if len(key) > 1 else [],
        any(line.weights == "ema" for panel in panels for line in panel.lines),
        [panel_figure(panel, present, colour) for panel in panels] if present else [],
    )


def panel_figure(panel: Panel, runs: Sequence[Records], colour: Mapping[str, str]) -> PanelFigure:
    from steadydetr.drawing.plot import panel_svg  # loads matplotlib

    with_lines = {line.label for line in panel.lines}
    absent = Lack.of([run for run in runs if run.label not in with_lines], panel.needs)
    if not panel.lines:
        return PanelFigure(panel.title, None, absent)
    ends = (f"{line.label} ({WEIGHTS_LABELS[line.weights]}) ends at {line.y[-1]:.4g}" for line in panel.lines[:12])
    described = f"{panel.title} over {panel.x_name}: {'; '.join(ends)}"
    return PanelFigure(panel.title, EmbeddedPicture.of("svg+xml", panel_svg(panel, colour), described), absent)
