"""`steadydetr paper`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.table import Table as RichTable

from steadydetr.cli.console import PlainConsole
from steadydetr.cli.parsing import parse
from steadydetr.config import check_within
from steadydetr.papers import PLACES, Paper, Row, Table, at_small_scale, find_table, paper_names, read_paper

if TYPE_CHECKING:
    from steadydetr.recipes.base import Recipe

DESCRIPTION = """The tables of the papers: what each row reports, the command that trains it, and what runs of yours measured.

  steadydetr paper                                           # which tables there are
  steadydetr paper od-detr:2
  steadydetr paper detrdistill:5 --data path/to/coco --runs runs
  steadydetr paper od-detr:2 --run --scale small --data shapes --seeds 3

Runs count for a row if their recipe is that of its command, whatever their data and seed. --run trains all rows of a table with several
seeds, by `steadydetr compare`, and teachers before them; with --scale small by the small sisters of their recipes, which learn on a CPU."""


@dataclass(frozen=True)
class PaperArguments:
    table: tyro.conf.Positional[str] = ""
    """PAPER:NUMBER, or a paper alone; all are listed if not given."""
    data: str | None = None
    """Folder of the data set, its data.yaml or JSON file, or shapes, for the commands and for --run."""
    runs: Path = Path("runs")
    """Folder in which finished runs of the rows are looked for."""
    run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Train the rows. The same command again goes on: finished runs are kept, interrupted ones resumed."""
    scale: Literal["paper", "small"] = "paper"
    """small: the same rows of small recipes, trained as long as these, to see the differences within hours."""
    seeds: int = 3
    """How many with --run, from 0 on."""
    output: Path | None = None
    """Folder of the runs with --run; RUNS/PAPER-NUMBER if not given, RUNS/PAPER-NUMBER-small at small scale."""
    jobs: int = 1
    """Runs at a time with --run; they share the cores."""
    device: str = "auto"
    """What --run trains on: auto (a GPU if there is one), cpu, cuda, cuda:1 or mps."""


def run(words: Sequence[str]) -> None:
    arguments = parse(PaperArguments, words, "paper", DESCRIPTION)
    check_within("", arguments, seeds=(1, 10**6), jobs=(1, 1000))
    if ":" not in arguments.table:
        if arguments.run:
            raise ValueError("--run needs a table, such as `steadydetr paper od-detr:2 --run`")
        show_tables([arguments.table] if arguments.table else paper_names())
        return
    paper, table = find_table(arguments.table)
    if arguments.scale == "small":
        paper, table = at_small_scale(paper, table)
    if arguments.run:
        train_rows(paper, table, arguments)
    show_table(table, arguments)


def show_tables(papers: Sequence[str]) -> None:
    """The list of tables."""
    shown = RichTable("table", "what it compares", "rows", "of these trained or counted here")
    shown.columns[0].no_wrap = True
    for name in papers:
        for table in read_paper(name).tables:
            shown.add_row(table.name, table.title, str(len(table.rows)), str(sum(bool(row.words) for row in table.rows)))
    PlainConsole().print(shown)


def show_table(table: Table, arguments: PaperArguments) -> None:
    """The table as the paper has it, below each row what runs measured, and the commands."""
    from steadydetr.tools.papers import measured

    recipes = {row.label: recipe_of(row) for row in table.rows if row.words and row.words[0] != "cost"}
    found = measured(recipes, {row.label: row.weights for row in table.rows}, table.columns, arguments.runs)
    console = PlainConsole(soft_wrap=True)
    console.print(f"{table.name}: {table.title}")
    console.print(grid_of(table, found))
    for line in filter(None, (table.note, *(f"{row.label}: {row.note}" for row in table.rows if row.note))):
        console.print(line)
    for row in table.rows:
        console.print(f"\n{row.label}\n  {command(row, arguments.data) if row.words else 'no part of this project'}")


def grid_of(table: Table, found: Mapping[str, tuple[int, Sequence[str]]]) -> RichTable:
    """What each row reports and, by its label, how many runs measured what; a word of a column's name on each line, so that many fit."""
    shown = RichTable("", *(column.replace(" ", "\n") for column in table.columns))
    shown.columns[0].overflow = "fold"
    for row in table.rows:
        shown.add_row(row.label, *(map(str, row.reported) if row.reported else ["-"] * len(table.columns)))
        if row.label in found:
            runs, values = found[row.label]
            shown.add_row(f"  {runs} run{'s' * (runs != 1)} here", *values)
    return shown


def command(row: Row, data: str | None) -> str:
    """The command of a row, for a terminal."""
    places = PLACES[row.words[0]]
    if places and data:
        places = ("--data", data)
    return shlex.join(("steadydetr", *row.words, *places))


def recipe_of(row: Row, teachers: Mapping[str, str] | None = None) -> Recipe:
    """What the command of a row trains.

    Args:
        teachers: other places of teachers, by those that the command names.
    """
    from steadydetr.cli.distill import take_teacher
    from steadydetr.cli.training_arguments import find_or_read, override
    from steadydetr.recipes.distill import distilled

    kind, name, *flags = row.words
    if kind != "distill":
        return override(find_or_read(name), flags, f"train {name}")[0]
    teacher, flags = take_teacher(flags)
    return override(distilled(find_or_read(name), (teachers or {}).get(teacher, teacher)), flags, f"distill {name}")[0]


def train_rows(paper: Paper, table: Table, arguments: PaperArguments) -> None:
    """Train the teachers that the rows name, and then the rows."""
    from steadydetr.devices import choose_device
    from steadydetr.tools.papers import train_table

    choose_device(arguments.device)
    rows = [row for row in table.rows if row.words and row.words[0] != "cost"]
    if not rows:
        raise ValueError(f"no row of {table.name} is trained")
    small = "-small" * (arguments.scale == "small")
    output = arguments.output or arguments.runs / f"{table.paper}-{table.number}{small}"
    named = {row.words[row.words.index("--teacher") + 1] for row in rows if "--teacher" in row.words}
    teachers = {folder: recipe_of(Row("", (), "", paper.teachers[folder])) for folder in sorted(named)}
    train_table(
        teachers=teachers,
        rows=lambda places: {row.label: recipe_of(row, places) for row in rows},
        data=arguments.data,
        output=output,
        seeds=arguments.seeds,
        jobs=arguments.jobs,
        device=arguments.device,
    )
