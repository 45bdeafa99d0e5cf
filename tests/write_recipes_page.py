"""Writes the generated parts of docs/recipes.md: what the papers report, and their tables with commands.

    python -m tests.write_recipes_page

A part stands between `<!-- NAME -->` and `<!-- end -->`; a test holds the page to what this writes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from steadydetr.papers import PLACES, Paper, Row, Table, paper_names, read_paper
from steadydetr.recipe_index import RecipeLine, recipe_lines

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
OWN = ("small-", "desk-", "quickstart")  # recipes of no paper


def page() -> str:
    """The page as it should be, from what it is."""
    parts = {"reported": reported} | {paper: lambda paper=paper: paper_tables(read_paper(paper)) for paper in paper_names()}
    text = PAGE.read_text(encoding="utf-8")
    for name, lines in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        assert mark, f"{PAGE.name} has no <!-- {name} -->"
        text = before + mark + "\n" + "\n".join(lines()) + "\n\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    return text


def reported() -> Iterator[str]:
    """A line for each recipe of a paper, and one for those of our own."""
    yield "| recipe | reported AP |"
    yield "|---|---|"
    lines = recipe_lines()
    for line in lines:
        if not is_own(line):
            yield f"| `{line.name}` | {line.reported or '-'} |"
    own = ", ".join(f"`{line.name}`" for line in lines if is_own(line))
    yield f"| {own} | our own: [own-data.md](own-data.md), [results.md](results.md) |"


def is_own(line: RecipeLine) -> bool:
    return line.name.startswith(OWN)


def paper_tables(paper: Paper) -> Iterator[str]:
    """What its commands abbreviate, and the rows of all its tables."""
    places = " ".join(PLACES["train"])
    yield f"Commands end with `{places}`, and begin with `steadydetr`; a word of capitals is short for"
    yield ""
    for word, words in paper.short.items():
        yield f"- `{word}`: `{shlex.join(words)}`"
    for folder, words in paper.teachers.items():
        yield f"- the teacher `{folder}`: `{shlex.join(words)} --output {folder}`"
    yield ""
    yield "| table | row | reported | command |"
    yield "|---|---|---|---|"
    for table in paper.tables:
        for row in filter(lambda row: row.command, table.rows):
            yield f"| {table.number} | {row.label} | {value(table, row)} | `{row.command}` |"
    for table in paper.tables:
        notes = [table.note, *(f"{row.label}: {row.note}." for row in table.rows if row.note)]
        if any(notes):
            yield ""
            yield f"Table {table.number}: {' '.join(filter(None, notes))}"


def value(table: Table, row: Row) -> str:
    """Its AP, or the first number of a table that has none."""
    if not row.reported:
        return "-"
    ap = [value for column, value in zip(table.columns, row.reported, strict=True) if re.search(r"\bAP\b|mAP", column)]
    return str(ap[-1] if ap else row.reported[0])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
