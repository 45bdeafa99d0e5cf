"""`steadydetr report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from steadydetr.cli.parsing import Overwrite, parse
from steadydetr.cli.quick import check_places

DESCRIPTION = """One HTML page of one run or of several side by side: curves, AP, stability, losses, speed, predictions, what differs.

  steadydetr report runs/quickstart                         writes runs/quickstart/report.html
  steadydetr report runs/a runs/b --output a-and-b.html
  steadydetr report runs/compare                            every run below the folder, the seeds of a recipe in one colour

The page needs no network and no other file. A run may still be going on."""


@dataclass(frozen=True)
class ReportArguments:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of runs, or folders with runs below them."""
    output: Path | None = None
    """The page; report.html in the run's folder, for several runs in the current one, if not given. An earlier report is replaced."""
    overwrite: Overwrite = False
    """Replace --output even if it is no report."""


def run(words: Sequence[str]) -> None:
    arguments = parse(ReportArguments, words, "report", DESCRIPTION)
    if not arguments.runs:
        raise ValueError("name at least one run, as in `steadydetr report runs/quickstart`")
    check_places(arguments.runs, "run or folder")
    from steadydetr.drawing.report import write_report

    print(f"Wrote {write_report(arguments.runs, arguments.output, arguments.overwrite)}: open it in a browser")
