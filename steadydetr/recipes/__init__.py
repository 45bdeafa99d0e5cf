"""Recipes: functions that return a `Recipe`; a variant is its difference to another.

`find("dino-4scale-r50-12ep")` gives one, `names()` all of them. Every module of this folder is a family; its functions that are marked
`@recipe` are found by their names.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from steadydetr.kinds import load_installed, normal, not_found, package_of
from steadydetr.recipe_index import no_such_recipe
from steadydetr.recipes.base import RECIPES, Recipe
from steadydetr.recipes.finetuning import TrainingMethod, with_method

for _family in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_family.name}")


def names() -> list[str]:
    """All recipes, those of plugins last, as `mylab:its-name`."""
    load_installed()
    return list(RECIPES)


def find(name: str, method: TrainingMethod | None = None) -> Recipe:
    """The recipe of that name, with - or _.

    Args:
        method: to train by; left out: the recipe's own.

    Raises:
        ValueError: there is none, with the nearest ones or the plugin that is not in use; or it has a method that cannot be exchanged.
    """
    name = normal(name)
    if name not in names():
        if package_of(name):
            raise ValueError(not_found(name, names(), "recipe"))
        raise ValueError(no_such_recipe(name, names()))
    make = RECIPES[name]
    own = {"method": method} if method is not None and "method" in inspect.signature(make).parameters else {}
    try:
        found = make(**own)
    except Exception as error:
        if ":" in name:  # a function of somebody else's
            raise ValueError(f"the recipe {name} cannot be made: {type(error).__name__}: {error}") from error
        raise
    if not isinstance(found, Recipe):
        raise ValueError(f"the recipe {name} cannot be made: its function gave a {type(found).__name__}, not a Recipe")
    return found if method is None or own else with_method(found, method)
