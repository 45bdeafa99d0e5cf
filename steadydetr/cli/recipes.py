"""`steadydetr recipes`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from steadydetr.cli.parsing import parse
from steadydetr.files import printable

DESCRIPTION = """List the recipes with what their papers report on COCO val2017, or show one in full.

  steadydetr recipes
  steadydetr recipes dino-4scale-r50-12ep"""


@dataclass(frozen=True)
class RecipesArguments:
    name: tyro.conf.Positional[str] = ""
    """A recipe to show in full; all are listed if not given."""


def run(words: Sequence[str]) -> None:
    arguments = parse(RecipesArguments, words, "recipes", DESCRIPTION)
    from steadydetr.config import to_plain
    from steadydetr.recipes import find, names

    console = Console(markup=False, emoji=False)
    if arguments.name:
        console.print_json(json.dumps(to_plain(find(arguments.name))))
        return
    table = Table("recipe", "what it is", "epochs", "reported COCO AP")
    for name in names():
        try:
            recipe = find(name)
            table.add_row(printable(name), printable(recipe.notes), str(recipe.training.epochs), printable(recipe.reported) or "-")
        except ValueError as error:  # one recipe of a plugin does not cost the list
            table.add_row(printable(name), printable(error), "-", "-")
    console.print(table)
