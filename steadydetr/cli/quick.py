"""Mistakes in names and places that are told at once, before torch is imported, which takes seconds.

Whatever is not found wrong here is looked at again by the code that uses it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.checkpoints.official import check_weights
from steadydetr.cli.words import take_flag
from steadydetr.files import printable
from steadydetr.kinds import foreign_parts_expected, normal
from steadydetr.limits import DEFAULT_LIMITS, Limits
from steadydetr.recipe_index import no_such_recipe, recipe_lines
from steadydetr.runs.occupied import refuse_another_run

if TYPE_CHECKING:
    from steadydetr.recipes.base import Recipe

RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")  # by which launchers tell a process that it may be one of several


def one_of_several() -> bool:
    """Whether a launcher says that this process may be one of several."""
    return any(name in os.environ for name in RANKS)


def check_recipe(name: str) -> None:
    """Raise ValueError for a name that no recipe of this package has. Plugins have others, which only importing them tells."""
    if name.endswith(".json") or ":" in name or foreign_parts_expected():
        return
    known = [line.name for line in recipe_lines()]
    if normal(name) not in known:
        raise ValueError(no_such_recipe(normal(name), known))


def check_new_run(words: Sequence[str], default: str = "") -> None:
    """Raise FileExistsError where a new run would meet something in its folder. Of several processes the main one looks, later.

    Args:
        default: the folder if the words name none; empty: not known yet.
    """
    folder = take_flag(words, "--output")[0] or default
    asked = {word.partition("=")[0] for word in words}
    if folder and not asked & {"--resume", "--help", "-h"} and not one_of_several():
        refuse_another_run(Path(folder).expanduser())


def check_start(weights: str | None, words: Sequence[str]) -> None:
    """Raise ValueError or FileNotFoundError for WEIGHTS that are not there. A run that goes on needs them no more.

    Of several processes the main one looks, later.
    """
    if weights and "--resume" not in {word.partition("=")[0] for word in words} and not one_of_several():
        check_weights(weights)


def check_source(where: str, limits: Limits = DEFAULT_LIMITS, masks: bool = False) -> None:
    """Raise ValueError for a place of data at which there is no folder, or one whose layout is not recognised or has no masks.

    Of several processes the main one looks, later.
    """
    from steadydetr.data.layouts import joined_places
    from steadydetr.data.opening import layout_to_train_on

    if not one_of_several():
        for place in joined_places(where):
            layout_to_train_on(place, limits, masks)


def check_use(checkpoint: Path, where: str, limits: Limits) -> None:
    """Raise ValueError or FileNotFoundError where a checkpoint is not there or has a damaged card, or data are not there."""
    from steadydetr.checkpoints.card import read_card

    read_card(find_checkpoint(checkpoint.expanduser()))
    check_source(where, limits)


def check_ingredients(recipe: Recipe) -> None:
    """Raise ValueError or FileNotFoundError where data or a trained teacher of the recipe are not where it says."""
    for where in filter(None, (recipe.data.source, recipe.data.val_source)):
        check_source(where, recipe.data, recipe.data.masks)
    for teacher in recipe.teachers:
        teacher.check()


def check_places(places: Iterable[str | Path], what: str) -> None:
    """Raise FileNotFoundError for a path at which there is nothing; an address of the network is none."""
    for place in places:
        if "://" not in str(place) and not os.path.lexists(Path(place).expanduser()):
            raise FileNotFoundError(f"there is no {what} {printable(place)}")
