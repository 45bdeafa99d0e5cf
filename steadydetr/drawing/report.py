"""One HTML page of one run or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from steadydetr.drawing.report_sections.base import PageSection
from steadydetr.drawing.report_sections.class_table import class_table
from steadydetr.drawing.report_sections.configurations import configurations
from steadydetr.drawing.report_sections.differing import differing
from steadydetr.drawing.report_sections.figures import figure_sections
from steadydetr.drawing.report_sections.metric_table import metric_table
from steadydetr.drawing.report_sections.overview import overview
from steadydetr.drawing.report_sections.pictures import predictions, sampling_points
from steadydetr.files import printable, refuse_existing, write_text
from steadydetr.runs.records import Records, read_runs

GENERATOR = "steadydetr report"  # by which the page of an earlier report is known


def write_report(runs: Sequence[Path], output: Path | None = None, overwrite: bool = False) -> Path:
    """Write the page of `runs`, each the folder of a run or one with runs below it, and return where it is.

    Args:
        output: report.html in the folder of a single run, of several in the current folder, if not given. An earlier report is replaced.
        overwrite: whether another file may be replaced too.

    Raises:
        FileNotFoundError: a folder holds no run.
        FileExistsError: `output` is there and no report.
        ValueError: a file of a run is damaged; names it, and the line.
    """
    found = read_runs(runs)
    if output is None:
        output = (found[0].folder if len(found) == 1 else Path()) / "report.html"
    if not is_report(output):
        refuse_existing(output, overwrite)
    write_text(output, report_page(found))
    return output


def is_report(path: Path) -> bool:
    """Whether a file was written by `write_report`."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(1000)


def report_page(runs: Sequence[Records]) -> str:
    """The HTML of the page. The template escapes every value."""
    from jinja2 import Environment, StrictUndefined

    template = files("steadydetr.drawing").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=without_hidden)
    environment.filters |= {"number": format_number, "duration": format_duration}
    environment.tests["missing"] = is_missing
    return environment.from_string(template).render(
        generator=GENERATOR,
        title=f"Run {runs[0].label}" if len(runs) == 1 else f"{len(runs)} runs side by side",
        written=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        left_out=[line for run in runs for line in run.left_out[:20]],
        sections=page_sections(runs),
    )


def page_sections(runs: Sequence[Records]) -> list[PageSection]:
    """Every section of the page, in order."""
    learning, *other_figures = figure_sections(runs)
    sections: list[PageSection] = [overview(runs), learning, metric_table(runs), class_table(runs), *other_figures]
    sections += [predictions(runs), sampling_points(runs)]
    if len(runs) > 1:
        sections.append(differing(runs))
    return [*sections, configurations(runs)]


def without_hidden(value: object) -> object:
    """A text of a run without the hidden characters that could turn the page's own text around, or that no file can hold."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\n".join(printable(line) for line in value.split("\n"))


def is_missing(value: object) -> bool:
    """Whether there is no number. COCO's metrics are -1 where there is no object of that size."""
    return value is None or value == -1


def format_number(value: float, digits: int = 1) -> str:
    """A number with commas between thousands."""
    return f"{value:,.{digits}f}"


def format_duration(seconds: float) -> str:
    if not 0 <= seconds < 1e12:  # of a damaged run
        return f"{seconds:g} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.0f} s"
