"""`steadydetr recipes`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.table import Table

from steadydetr.cli.console import PlainConsole
from steadydetr.cli.parsing import parse
from steadydetr.cli.quick import check_recipe
from steadydetr.files import printable
from steadydetr.kinds import foreign_parts_expected
from steadydetr.recipe_index import RecipeLine, recipe_lines

DESCRIPTION = """List the recipes with what their papers report on COCO val2017, or show one in full.

  steadydetr recipes
  steadydetr recipes dino-4scale-r50-12ep"""


BESIDE = 70  # columns for what stands beside the names


@dataclass(frozen=True)
class RecipesArguments:
    name: tyro.conf.Positional[str] = ""
    """A recipe to show in full; all are listed if not given."""


def run(words: Sequence[str]) -> None:
    arguments = parse(RecipesArguments, words, "recipes", DESCRIPTION)
    if arguments.name:
        check_recipe(arguments.name)
        from steadydetr.config import to_plain
        from steadydetr.recipes import find

        PlainConsole().print_json(json.dumps(to_plain(find(arguments.name))))
        return
    rows = all_lines() if foreign_parts_expected() else recipe_lines()
    table = Table("recipe", "what it is", "epochs", "reported COCO AP")
    table.columns[0].no_wrap = True
    table.columns[1].overflow = "fold"  # where a note names a recipe that is longer than the column
    for row in rows:
        table.add_row(printable(row.name), printable(row.notes), row.epochs, printable(row.reported) or "-")
    longest = max(len(printable(row.name)) for row in rows)
    width = max(PlainConsole().width, longest + BESIDE)  # in a narrower terminal lines go on in the next, but no name is cut
    PlainConsole(width=width).print(table)


def all_lines() -> list[RecipeLine]:
    """The recipes of plugins too, which have to be made for that; one that cannot be made says why and does not cost the list."""
    from steadydetr.recipes import find, names

    lines = recipe_lines()
    for name in names()[len(lines) :]:
        try:
            recipe = find(name)
            lines.append(RecipeLine(name, str(recipe.training.epochs), recipe.reported, recipe.notes))
        except ValueError as error:
            lines.append(RecipeLine(name, "-", "-", str(error)))
    return lines
