"""The tables of the three papers as they report them, each row with the command that trains or counts it.

One TOML file a paper: what its commands abbreviate, and its tables. `steadydetr paper` shows them and docs/recipes.md is made of them.
"""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steadydetr.kinds import nearest

FOLDER = Path(__file__).parent
PLACES = {"train": ("--data", "path/to/coco"), "distill": ("--data", "path/to/coco"), "cost": ()}  # what a command ends with
Value = float | str  # a number, or what stands in its place


@dataclass(frozen=True)
class Row:
    """One row of a table: what the paper calls it, what it reports, and the words of the command, without `steadydetr`."""

    label: str
    reported: tuple[Value, ...]  # one for each column; empty: nothing, or the text that we have lacks it
    command: str = ""  # abbreviated; empty: a method that this project does not have, or a teacher of another row
    words: tuple[str, ...] = ()  # the same, written out
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of a paper."""

    paper: str  # od-detr, stable-dino, detrdistill
    number: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def name(self) -> str:
        """By which the command line calls it."""
        return f"{self.paper}:{self.number}"


@dataclass(frozen=True)
class Paper:
    """A paper with those of its tables that have rows to train or to count."""

    name: str
    title: str
    note: str
    short: dict[str, tuple[str, ...]]  # what the first word of a command may stand for, written out
    teachers: dict[str, tuple[str, ...]]  # folder of a run -> the words that train it
    tables: tuple[Table, ...]


def paper_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_paper(name: str) -> Paper:
    """The paper of that name. Raises ValueError where there is none; names the nearest."""
    if name not in paper_names():
        raise ValueError(f"there is no paper {name!r}{nearest(name, paper_names())}")
    content = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    short: dict[str, tuple[str, ...]] = {}
    for word, command in content.get("short", {}).items():  # one may begin with another that stands above it
        short[word] = written_out(command, short)
    tables = tuple(_table(name, table, short) for table in content["table"])
    teachers = {folder: written_out(command, short) for folder, command in content.get("teachers", {}).items()}
    return Paper(name, content["title"], content.get("note", ""), short, teachers, tables)


def find_table(name: str) -> tuple[Paper, Table]:
    """The table called `paper:number`. Raises ValueError where there is none; names those that there are."""
    paper, _, number = name.partition(":")
    found = read_paper(paper)
    for table in found.tables:
        if table.number.lower() == number.lower():
            return found, table
    raise ValueError(f"there is no table {name}; of {paper} there are {', '.join(table.name for table in found.tables)}")


def written_out(command: str, short: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The words of a command, with what its first word stands for."""
    first, *rest = shlex.split(command)
    return (*short.get(first, (first,)), *rest)


def _table(paper: str, content: dict[str, Any], short: dict[str, tuple[str, ...]]) -> Table:
    rows = []
    for row in content["rows"]:
        command = row.get("run", "")
        words = written_out(command, short) if command else ()
        rows.append(Row(row["row"], tuple(row.get("reported", ())), command, words, row.get("note", "")))
    return Table(paper, str(content["number"]), content["title"], tuple(content["columns"]), tuple(rows), content.get("note", ""))
