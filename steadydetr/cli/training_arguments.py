"""The command line of `train`: a recipe with everything that was overridden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import tyro

from steadydetr.checkpoints.start import Start
from steadydetr.cli.overrides import choices, choose
from steadydetr.cli.parsing import Overwrite, parse
from steadydetr.cli.words import take_flag
from steadydetr.config import read_recipe, to_plain
from steadydetr.kinds import nearest
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.recipes import find
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.finetuning import TrainingMethod, with_method

Resume = Literal["no", "yes", "auto"]


@dataclass(frozen=True)
class TrainArguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    data: str | None = None
    """Folder of the data set, its data.yaml or JSON file, or shapes; several are joined by +. Shorthand of --data.source."""
    weights: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Trained weights to start from: a run, a checkpoint, a file of another project, hub:owner/name, or a name of `steadydetr weights`."""
    classes: tuple[str, ...] = ()
    """Classes of these weights that the data call otherwise, as theirs=ours. Shorthand of --start.classes."""
    keep_classes: Overwrite = False
    """Keep the classes of these weights that the data do not have. Shorthand of --start.keep-classes."""
    allow_partial: tuple[str, ...] = ()
    """Parts that may start anew where these weights do not fit. Shorthand of --start.allow-partial."""
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
    method, words = take_method(words)
    return override(find_or_read(name, method), words, f"train {name}")


def override(recipe: Recipe, words: Sequence[str], command: str, more: str = "") -> tuple[Recipe, TrainArguments]:
    """The recipe as the words change it, and the other arguments; `more` stands in the help of the command."""
    start = recipe
    recipe, words = choose(recipe, words)
    words = _with_resume_value(words)
    arguments = parse(TrainArguments, words, command, _description(recipe) + more, TrainArguments(recipe))
    recipe = for_other_parts(arguments.recipe, start)
    recipe = replace(recipe, start=_start(recipe.start, arguments))
    if start.reported and recipe.reported == start.reported and (recipe.start.weights or _learns_something_else(recipe, start)):
        recipe = replace(recipe, reported="")
    if arguments.data is not None:
        recipe = replace(recipe, data=replace(recipe.data, source=arguments.data))
    if arguments.seed is not None:
        recipe = replace(recipe, training=replace(recipe.training, seed=arguments.seed))
    return recipe, arguments


def take_method(words: Sequence[str]) -> tuple[TrainingMethod | None, list[str]]:
    """What --method names, None without it, and the other words."""
    method, rest = take_flag(words, "--method")
    known = get_args(TrainingMethod)
    if method is not None and method not in known:
        raise ValueError(f"--method {method}: there is no such method{nearest(method, known)}")
    return cast("TrainingMethod | None", method), rest


def for_other_parts(recipe: Recipe, start: Recipe) -> Recipe:
    """What follows from flags: what a rate is meant for, where the batch is to be found, and how another backbone was trained."""
    training, usual, detector = recipe.training, start.training.batch_size, recipe.detector
    if training.batch_size == "auto" and usual != "auto" and not training.lr_batch_size:
        training = replace(training, lr_batch_size=usual)
    backbone, old = getattr(detector, "backbone", None), getattr(start.detector, "backbone", None)
    if isinstance(backbone, TimmBackboneConfig) and isinstance(old, TimmBackboneConfig) and backbone.name != old.name:
        mean, std = (None if ours == theirs else ours for ours, theirs in ((backbone.mean, old.mean), (backbone.std, old.std)))
        detector = detector.changed(backbone=replace(backbone, mean=mean, std=std))
    return replace(recipe, training=training, detector=detector)


def _start(start: Start, arguments: TrainArguments) -> Start:
    """What the run starts from, as the shorthands say."""
    given: dict[str, Any] = {
        "weights": arguments.weights,
        "classes": arguments.classes,
        "keep_classes": arguments.keep_classes,
        "allow_partial": arguments.allow_partial,
    }
    start = replace(start, **{name: value for name, value in given.items() if value})
    if start != Start() and not start.weights:
        raise ValueError("there are no weights whose classes or parts could be kept: name them by --from")
    return start


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


def find_or_read(name: str, method: TrainingMethod | None = None) -> Recipe:
    """A recipe of this package, or one that was saved: the config.json of a run, or a recipe alone as `compare` writes it.

    Raises:
        ValueError, FileNotFoundError: there is none, with the nearest names or the file; or it cannot be trained by that method.
    """
    if not name.endswith(".json"):
        return find(name, method)
    recipe = read_recipe(Path(name))
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name} holds no recipe but a {type(recipe).__name__}")
    return recipe if method is None else with_method(recipe, method)


def _description(recipe: Recipe) -> str:
    lines = [f"Train {recipe.name}: {recipe.notes}. Parts that can be exchanged, then set by flags of their own:"]
    lines += [f"  {c.flag} {{{','.join(c.kinds)}}} (default: {c.current})" for c in choices(recipe)]
    return "\n".join(lines)
