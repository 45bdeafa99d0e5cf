"""The values of the report, section by section. How they look is up to report.html.jinja.

The `layout` of a section names the macro of the template that shows it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from steadydetr.drawing.colours import run_colours
from steadydetr.drawing.panels import REPORT_FIGURES, Panel, Section
from steadydetr.drawing.recipe_text import flatten, recipe_outline
from steadydetr.files import check_regular
from steadydetr.metrics.table import METRICS
from steadydetr.runs.folder import PREDICTIONS, SAMPLING
from steadydetr.runs.records import WEIGHTS, Records, by_recipe

MOST_PIXELS = 50_000_000  # of a picture that a run has drawn; a small file can claim any number
PREDICTIONS_TEXT = "Ground truth above, detections of the trained weights below, for the first held-out images that have objects."
SAMPLING_TEXT = (
    "Where the query of an image's largest object looks in the last decoder stage, in the trained and the averaged weights: sampling"
    " points, the brighter the more they count; reference point (star), predicted box (white) and true box (green)."
)


@dataclass(frozen=True)
class RunName:
    label: str
    colour: str | None  # of its lines; None where there is only one
    weights: str = ""  # "trained" or "average", where both have a row


@dataclass(frozen=True)
class Lack:
    """The runs that have nothing to show in one place of the page, and the reason."""

    labels: tuple[str, ...]
    what: str

    @staticmethod
    def of(runs: Sequence[Records], what: str) -> Lack:
        return Lack(tuple(run.label for run in runs), what)


@dataclass(frozen=True)
class EmbeddedPicture:
    source: str  # data: URL
    description: str

    @staticmethod
    def of(kind: str, content: bytes, description: str) -> EmbeddedPicture:
        return EmbeddedPicture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", description)


def page_sections(runs: Sequence[Records]) -> list[Any]:
    """Every section of the page, in order."""
    learning, *other_figures = figure_sections(runs)
    sections = [overview(runs), learning, metric_table(runs), class_table(runs), *other_figures]
    sections.append(picture_section("Predictions", PREDICTIONS_TEXT, runs, PREDICTIONS, "Ground truth and detections"))
    sections.append(picture_section("Where queries look", SAMPLING_TEXT, runs, SAMPLING, "Sampling points"))
    if len(runs) > 1:
        sections.append(differing(runs))
    sections.append(Configurations([Configuration(run.label, configuration_text(run)) for run in runs]))
    return sections


def name_of(run: Records, runs: Sequence[Records], weights: str = "") -> RunName:
    colour = run_colours(runs)[run.label] if len(by_recipe(runs)) > 1 else None
    return RunName(run.label, colour, WEIGHTS[weights] if weights else "")


# the runs


@dataclass(frozen=True)
class RunFacts:
    name: RunName
    recipe: str
    best_ap: float | None
    best_epoch: int | None
    best_weights: str
    finished: bool
    epochs_done: int
    planned_epochs: int
    step: int
    planned_steps: int | None
    images_seen: int
    seconds: float | None  # of training
    estimated: bool  # the seconds, from the speed
    images_per_second: float | None
    memory_gib: float | None
    parameters: int | None
    seed: object


@dataclass(frozen=True)
class Overview:
    runs: list[RunFacts]
    title: str = "Runs"
    layout: str = "overview"


def overview(runs: Sequence[Records]) -> Overview:
    return Overview([run_facts(run, runs) for run in runs])


def run_facts(run: Records, runs: Sequence[Records]) -> RunFacts:
    best, speed = run.best or {}, run.images_per_second
    measured = None if run.summary is None else run.summary.get("seconds")
    estimate = run.images_seen / speed if speed else None
    return RunFacts(
        name=name_of(run, runs),
        recipe=str(run.recipe.get("name", "?")),
        best_ap=best.get("ap"),
        best_epoch=best.get("epoch"),
        best_weights=WEIGHTS[best["weights"]] if best else "",
        finished=run.summary is not None,
        epochs_done=run.epochs_done,
        planned_epochs=run.planned_epochs,
        step=run.step,
        planned_steps=run.planned_steps,
        images_seen=run.images_seen,
        seconds=estimate if measured is None else float(measured),
        estimated=measured is None,
        images_per_second=speed,
        memory_gib=run.memory_gib,
        parameters=run.parameters,
        seed=run.recipe["training"]["seed"],
    )


# average precision


@dataclass(frozen=True)
class Cell:
    value: float | None
    highest: bool  # of its column, or of its row where a column is a run


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


def last_evaluations(runs: Sequence[Records]) -> list[tuple[Records, str, dict[str, Any]]]:
    """Run, weights and their last evaluation, where there is one."""
    return [(run, weights, last) for run in runs for weights in WEIGHTS if (last := run.last("eval", weights)) is not None]


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


def class_table(runs: Sequence[Records]) -> ClassTable:
    found = last_evaluations(runs)
    classes = dict.fromkeys(name for *_, last in found for name in last["per_class"])
    rows = [ClassRow(name, mark_highest([last["per_class"].get(name) for *_, last in found])) for name in classes]
    return ClassTable([name_of(run, runs, weights) for run, weights, _ in found], rows, Lack.of([] if found else runs, "not evaluated yet"))


def mark_highest(values: Sequence[Any]) -> list[Cell]:
    """The values, the highest marked if there are several."""
    known = [value for value in values if isinstance(value, (int, float)) and value != -1]
    highest = max(known) if len(known) > 1 else None
    return [Cell(value, value is not None and value == highest) for value in values]


def evaluation_data(run: Records) -> tuple[Any, ...]:
    """What a run is evaluated on, as its recipe names it."""
    data = run.recipe.get("data") or {}
    return data.get("val_source") or data.get("source"), data.get("val_split"), data.get("limit"), run.classes


# figures


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
    from steadydetr.drawing.plot import panel_svg

    with_lines = {line.label for line in panel.lines}
    absent = Lack.of([run for run in runs if run.label not in with_lines], panel.needs)
    if not panel.lines:
        return PanelFigure(panel.title, None, absent)
    ends = (f"{line.label} ({WEIGHTS[line.weights]}) ends at {line.y[-1]:.4g}" for line in panel.lines[:12])
    described = f"{panel.title} over {panel.x_name}: {'; '.join(ends)}"
    return PanelFigure(panel.title, EmbeddedPicture.of("svg+xml", panel_svg(panel, colour), described), absent)


# pictures that the runs have drawn


@dataclass(frozen=True)
class RunPicture:
    name: RunName | None  # None where there is only one run
    picture: EmbeddedPicture | None
    absent: Lack  # why there is none


@dataclass(frozen=True)
class PictureSection:
    title: str
    text: str
    pictures: list[RunPicture]
    layout: str = "pictures"


def picture_section(title: str, text: str, runs: Sequence[Records], file_name: str, described: str) -> PictureSection:
    pictures = []
    for run in runs:
        found = run_picture(run, file_name, described)
        name = name_of(run, runs) if len(runs) > 1 else None
        if isinstance(found, EmbeddedPicture):
            pictures.append(RunPicture(name, found, Lack((), "")))
        else:
            pictures.append(RunPicture(name, None, Lack.of([run], found)))
    return PictureSection(title, text, pictures)


def run_picture(run: Records, file_name: str, described: str) -> EmbeddedPicture | str:
    """A picture in a run's folder as JPEG, which takes a fifth of the space, or why there is none."""
    path = run.folder / file_name
    if not path.exists():
        return f"no {file_name}; a run draws it when it is finished"
    try:
        check_regular(path)
        with Image.open(path, formats=["PNG"]) as image, io.BytesIO() as file:
            if image.width * image.height > MOST_PIXELS:
                return f"its {file_name} is too large"
            image.convert("RGB").save(file, "JPEG", quality=88)
            return EmbeddedPicture.of("jpeg", file.getvalue(), f"{described} of {run.label}")
    except Exception:  # Pillow has errors of many kinds for damaged files
        return f"its {file_name} cannot be read"


# recipes


@dataclass(frozen=True)
class DifferingRow:
    field: str
    values: list[list[str | None]]  # by recipe: the values of its seeds, None where it has no such field


@dataclass(frozen=True)
class Differing:
    columns: list[str]
    rows: list[DifferingRow]
    title: str = "What differs"
    layout: str = "differing"


@dataclass(frozen=True)
class Configuration:
    label: str
    text: str


@dataclass(frozen=True)
class Configurations:
    runs: list[Configuration]
    title: str = "Configuration"
    layout: str = "configurations"


def differing(runs: Sequence[Records]) -> Differing:
    """The fields that are not the same in all runs, a column for every recipe."""
    flat = {run.label: flatten(run.recipe) | {"classes": ", ".join(run.classes)} for run in runs}
    fields = sorted({field for values in flat.values() for field in values})
    changed = [field for field in fields if len({values.get(field) for values in flat.values()}) > 1]
    recipes = by_recipe(runs)
    return Differing(list(recipes), list(differing_rows(changed, flat, recipes)))


def differing_rows(
    fields: Sequence[str], flat: Mapping[str, Mapping[str, str]], recipes: Mapping[str, Sequence[Records]]
) -> Iterator[DifferingRow]:
    for field in fields:
        yield DifferingRow(field, [list(dict.fromkeys(flat[run.label].get(field) for run in members)) for members in recipes.values()])


def configuration_text(run: Records) -> str:
    """The recipe and the classes of a run."""
    return "\n".join([*recipe_outline(run.recipe), "", f"{len(run.classes)} classes: {', '.join(run.classes)}"])
