"""`steadydetr check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Group, RenderableType
from rich.table import Table

from steadydetr.cli.console import PlainConsole
from steadydetr.cli.parsing import Overwrite, parse
from steadydetr.data.hold_out import DEFAULT_HOLD_OUT, HoldOut
from steadydetr.files import counted, printable, refuse_existing, write_json
from steadydetr.limits import Limits

if TYPE_CHECKING:
    from steadydetr.data.check import CheckReport
    from steadydetr.data.layouts import Finding

DESCRIPTION = """Look for what is wrong with a data set before training. Exit code 1 if training, or other tools, would stop at something.

  steadydetr check path/to/data
  steadydetr check path/to/data --splits train --output findings.json"""

SIZES = {  # rows of the table of splits, and the fields that they show
    **{"images": "images", "without objects": "empty_images", "most in an image": "most_in_image"},
    **{name: name for name in ("small", "medium", "large", "crowd", "difficult")},
}


@dataclass(frozen=True)
class CheckArguments:
    data: tyro.conf.Positional[str]
    """Folder of the data set, its data.yaml or JSON file, or shapes."""
    splits: tuple[str, ...] = ("train", "val", "test")
    """Splits to look at, those that are there."""
    masks: bool = False
    """Look at the masks of objects too (COCO, LVIS, polygons of YOLO and labelme), as train --data.masks reads them."""
    output: Path | None = None
    """JSON file for every finding; the console shows the first of each kind."""
    overwrite: Overwrite = False
    """Replace --output if it is there."""
    hold_out: Annotated[HoldOut, tyro.conf.arg(name="")] = DEFAULT_HOLD_OUT
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()


def run(words: Sequence[str]) -> None:
    arguments = parse(CheckArguments, words, "check", DESCRIPTION)
    from steadydetr.data.check import check_data

    refuse_existing(arguments.output, arguments.overwrite)
    report = check_data(arguments.data, arguments.splits, limits=arguments.limits, hold_out=arguments.hold_out, masks=arguments.masks)
    PlainConsole(soft_wrap=True, highlight=False).print(render(report))
    if arguments.output is not None:
        write_json(arguments.output, dataclasses.asdict(report))
    if report.failed:
        raise SystemExit(1)


def render(report: CheckReport, limit: int = 20) -> RenderableType:
    """Tables for the console; `limit` findings of each kind are shown, all are in the report."""
    parts: list[RenderableType] = []
    if report.splits:
        overview = Table("split", *(s.name for s in report.splits), title="Splits")
        for label, field in SIZES.items():
            overview.add_row(label, *(str(getattr(s, field)) for s in report.splits))
        parts.append(overview)
        classes = Table(title="Objects of each class")
        for heading in ("class", *(s.name for s in report.splits)):
            classes.add_column(heading, overflow="fold")
        for name in dict.fromkeys(name for s in report.splits for name in s.class_counts):
            classes.add_row(printable(name), *(str(s.class_counts.get(name, "-")) for s in report.splits))
        parts.append(classes)
    for kind in dict.fromkeys(finding.kind for finding in report.findings):
        parts.append(_render_kind([finding for finding in report.findings if finding.kind == kind], limit))
    parts += report.held_out
    parts.append(_verdict(report))
    return Group(*parts)


def _verdict(report: CheckReport) -> str:
    """The last line, which says that a data set is ready only where training would start on it."""
    ready = {s.name for s in report.splits} >= {"train", "val"} and not report.fatal
    if not report.findings:
        return "Nothing is wrong: ready to train." if ready else "Nothing is wrong with these splits."
    said = "Something stops training." if report.fatal else "None of them stops training." if ready else ""
    return f"{counted(len(report.findings), 'finding')}. {said}".rstrip()


def _render_kind(rows: list[Finding], limit: int) -> str:
    """A line for each finding, none of which a narrow terminal cuts."""
    title = f"{rows[0].kind}: {len(rows)}" + (" (stops training)" if rows[0].fatal else "")
    more = [f"  ... and {len(rows) - limit} more; --output FILE keeps all"] if len(rows) > limit else []
    return "\n".join([title, *(f"  {finding}" for finding in rows[:limit]), *more, ""])
