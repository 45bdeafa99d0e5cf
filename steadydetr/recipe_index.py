"""The list of this package's recipes as a small file, so that names are known without importing all that recipes are made of.

`python -m tests.write_recipe_index` writes it; a test holds it to the recipes.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from steadydetr.kinds import did_you_mean

FILE = Path(__file__).parent / "recipes" / "index.tsv"


class RecipeLine(NamedTuple):
    """What the list says of a recipe."""

    name: str
    epochs: str
    reported: str  # COCO AP, with its source
    notes: str  # what it is


def recipe_lines() -> list[RecipeLine]:
    """All recipes of this package, in the order of their families."""
    with open(FILE, encoding="utf-8", newline="") as file:
        return [RecipeLine(*row) for row in csv.reader(file, "excel-tab")]


def no_such_recipe(name: str, known: Sequence[str]) -> str:
    """The message for a name that no recipe has: the nearest ones."""
    close = difflib.get_close_matches(name, known, cutoff=0.4)
    meant = did_you_mean(close) if close else "; a saved one is named by its file, such as runs/mine/config.json."
    return f"there is no recipe {name!r}{meant} `steadydetr recipes` lists all"
