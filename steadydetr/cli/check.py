"""`steadydetr check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from steadydetr.cli.parsing import parse

DESCRIPTION = """Look for what is wrong with a data set before training. Exit code 1 if training would stop at something.

  steadydetr check path/to/data
  steadydetr check path/to/data --splits train --output findings.json"""


@dataclass(frozen=True)
class CheckArguments:
    data: tyro.conf.Positional[str]
    """Folder of the data set, or shapes."""
    splits: tuple[str, ...] = ("train", "val", "test")
    """Splits to look at, those that are there."""
    output: Path | None = None
    """JSON file for every finding; the console shows the first of each kind."""


def run(words: Sequence[str]) -> None:
    arguments = parse(CheckArguments, words, "check", DESCRIPTION)
    from steadydetr.data.check import check_data, print_report
    from steadydetr.files import write_json

    report = check_data(arguments.data, arguments.splits)
    print_report(report)
    if arguments.output is not None:
        write_json(arguments.output, dataclasses.asdict(report))
    if report.fatal:
        raise SystemExit(1)
