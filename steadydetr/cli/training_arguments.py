"""The command line of `train`: a recipe with everything that was overridden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from steadydetr.cli.overrides import choices, choose
from steadydetr.cli.parsing import parse
from steadydetr.config import to_plain
from steadydetr.recipes import find
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import read_recipe

Resume = Literal["no", "yes", "auto"]


@dataclass(frozen=True)
class TrainArguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    data: str | None = None
    """Folder of the data set, its data.yaml or JSON file, or shapes; several are joined by +. Shorthand of --data.source."""
    output: Path | None = None
    """Folder of the run; runs/RECIPE if not given. An existing run is never overwritten."""
    resume: Resume = "no"
    """Alone or with yes: go on from the last checkpoint in --output. auto: go on if a run is there, start one if not."""
    seed: int | None = None
    """Shorthand of --training.seed."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1 or mps."""


def read_training_arguments(name: str, words: Sequence[str]) -> tuple[Recipe, TrainArguments]:
    """The recipe called `name`, or saved in that file, as the words change it, and the other arguments."""
    return override(find_or_read(name), words, f"train {name}")


def override(recipe: Recipe, words: Sequence[str], command: str, more: str = "") -> tuple[Recipe, TrainArguments]:
    """The recipe as the words change it, and the other arguments; `more` stands in the help of the command."""
    start = recipe
    recipe, words = choose(recipe, words)
    words = _with_resume_value(words)
    arguments = parse(TrainArguments, words, command, _description(recipe) + more, TrainArguments(recipe))
    recipe = arguments.recipe
    if start.reported and recipe.reported == start.reported and _learns_something_else(recipe, start):
        recipe = replace(recipe, reported="")
    if arguments.data is not None:
        recipe = replace(recipe, data=replace(recipe.data, source=arguments.data))
    if arguments.seed is not None:
        recipe = replace(recipe, training=replace(recipe.training, seed=arguments.seed))
    return recipe, arguments


def _learns_something_else(recipe: Recipe, start: Recipe) -> bool:
    """Whether a flag changed more than the seed and what decides nothing: what was reported for `start` is then not of this recipe."""
    seeded = replace(recipe, training=replace(recipe.training, seed=start.training.seed))
    return to_plain(seeded, "recipe", decisive=True) != to_plain(start, "recipe", decisive=True)


def _with_resume_value(words: Sequence[str]) -> list[str]:
    """`--resume` without a value means yes."""
    found: list[str] = []
    for word in reversed(words):
        if word == "--resume" and (not found or found[0] not in get_args(Resume)):
            found.insert(0, "yes")
        found.insert(0, word)
    return found


def find_or_read(name: str) -> Recipe:
    """A recipe of this package, or one that was saved: the config.json of a run, or a recipe alone as `compare` writes it.

    Raises:
        ValueError, FileNotFoundError: there is none; names the nearest, or the file.
    """
    if not name.endswith(".json"):
        return find(name)
    recipe = read_recipe(Path(name))
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name} holds no recipe but a {type(recipe).__name__}")
    return recipe


def _description(recipe: Recipe) -> str:
    lines = [f"Train {recipe.name}: {recipe.notes}. Parts that can be exchanged, then set by flags of their own:"]
    lines += [f"  {c.flag} {{{','.join(c.kinds)}}} (default: {c.current})" for c in choices(recipe)]
    return "\n".join(lines)
