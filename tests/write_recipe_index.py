"""Writes steadydetr/recipes/index.tsv, the list of recipes: `python -m tests.write_recipe_index`."""

from __future__ import annotations

import csv
import io

from steadydetr.recipe_index import FILE, RecipeLine
from steadydetr.recipes import find
from steadydetr.recipes.base import RECIPES


def lines() -> list[RecipeLine]:
    """What the list must say."""
    recipes = [(name, find(name)) for name in RECIPES if ":" not in name]
    return [RecipeLine(name, str(recipe.training.epochs), recipe.reported, recipe.notes) for name, recipe in recipes]


if __name__ == "__main__":
    text = io.StringIO()
    csv.writer(text, "excel-tab", lineterminator="\n").writerows(lines())
    FILE.write_text(text.getvalue(), encoding="utf-8", newline="\n")
