"""The tables of the three papers as they report them, each row with the command that trains or counts it.

One TOML file a paper: what its commands abbreviate, and its tables. `steadydetr paper` shows them and docs/recipes.md is made of them.
"""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from steadydetr.kinds import nearest

FOLDER = Path(__file__).parent
PLACES = {"train": ("--data", "path/to/coco"), "distill": ("--data", "path/to/coco"), "cost": ()}  # what a command ends with
OWN = ("--training.", "--data.", "--detector.backbone.")  # flags that small recipes do not take over
SMALL = {  # the small sister of a recipe
    "deformable-detr-refine-r50-24ep": "small-refine-deformable-detr",
    "od-deformable-detr-r50-24ep": "small-od-deformable-detr",
    "stable-dino-4scale-r50-12ep": "small-stable-dino",
    "dino-4scale-r50-12ep": "small-dino",
    "dino-4scale-r50-24ep": "small-dino",
    "od-dino-4scale-r50-12ep": "small-od-dino",
    "od-dino-4scale-r50-24ep": "small-od-dino",
    "deformable-detr-two-stage-r50-12ep": "small-deformable-detr",
    "stable-deformable-detr-r50-12ep": "small-stable-deformable-detr",
    "deformable-detr-r50-50ep": "small-deformable-detr",
    "deformable-detr-r101-50ep": "small-teacher-deformable-detr",
    "detrdistill-deformable-detr-r101-r50-50ep": "small-distill-deformable-detr",
    "adamixer-r50-100q-12ep": "small-adamixer",
    "adamixer-r50-300q-36ep": "small-adamixer",
    "adamixer-r101-100q-12ep": "small-teacher-adamixer",
    "detrdistill-adamixer-r101-r50-12ep": "small-distill-adamixer",
    "conditional-detr-r50-12ep": "small-conditional-detr",
    "conditional-detr-r50-50ep": "small-conditional-detr",
    "h-deformable-detr-r50-12ep": "small-h-deformable-detr",
    "h-deformable-detr-r50-36ep": "small-h-deformable-detr",
    "dn-dab-deformable-detr-r50-12ep": "small-dn-dab-deformable-detr",
    "dn-dab-deformable-detr-r50-50ep": "small-dn-dab-deformable-detr",
    "align-dino-4scale-r50-12ep": "small-align-dino",
    "align-dino-4scale-r50-24ep": "small-align-dino",
    "group-dino-4scale-r50-36ep": "small-group-dino",
    "maskdino-r50-12ep": "small-maskdino",
    "stable-maskdino-r50-12ep": "small-stable-maskdino",
}
Value = float | str  # a number, or what stands in its place


@dataclass(frozen=True)
class Row:
    """One row of a table: what the paper calls it, what it reports, and the words of the command, without `steadydetr`."""

    label: str
    reported: tuple[Value, ...]  # one for each column; empty: nothing, or the text that we have lacks it
    command: str = ""  # abbreviated; empty: a method that this project does not have, or a teacher of another row
    words: tuple[str, ...] = ()  # the same, written out
    note: str = ""
    weights: str = "model"  # whose metrics these are; "ema": of the average


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


def at_small_scale(paper: Paper, table: Table) -> tuple[Paper, Table]:
    """The same with the small sisters of all recipes, trained as these are: flags of training, data and backbone are left out.

    Rows of recipes without one have no command then.
    """
    teachers = {folder: words for folder, command in paper.teachers.items() if (words := _small(command))}
    rows = (replace(row, words=_small(row.words), reported=()) for row in table.rows)
    return replace(paper, teachers=teachers), replace(table, rows=tuple(rows))


def _small(words: tuple[str, ...]) -> tuple[str, ...]:
    if len(words) < 2 or words[0] == "cost" or words[1] not in SMALL:
        return ()
    kept, flag = [words[0], SMALL[words[1]]], ""
    for word in words[2:]:
        flag = word if word.startswith("--") else flag
        if not flag.startswith(OWN):
            kept.append(word)
    return tuple(kept)


def _table(paper: str, content: dict[str, Any], short: dict[str, tuple[str, ...]]) -> Table:
    rows = []
    for row in content["rows"]:
        command = row.get("run", "")
        words = written_out(command, short) if command else ()
        rows.append(Row(row["row"], tuple(row.get("reported", ())), command, words, row.get("note", ""), row.get("weights", "model")))
    return Table(paper, str(content["number"]), content["title"], tuple(content["columns"]), tuple(rows), content.get("note", ""))
