"""`steadydetr finetune`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steadydetr.cli.quick import check_new_run, check_start
from steadydetr.cli.words import take_flag
from steadydetr.files import counted

if TYPE_CHECKING:
    from steadydetr.checkpoints.weights import TrainedWeights
    from steadydetr.recipes.base import Recipe

USAGE = """steadydetr finetune WEIGHTS --data DATA [--method plain|od|stable|steady|align] [--output FOLDER] [--resume [auto]] [--dry-run]

  steadydetr finetune runs/quickstart --data path/to/mine            a run of ours: its best weights
  steadydetr finetune dino_r50_4scale_12ep.pth --data path/to/mine   a file of another project, which is converted on the way
  steadydetr finetune hub:SenseTime/deformable-detr --data path/to/mine
  steadydetr finetune NAME --data path/to/mine                       a name of `steadydetr weights`
  steadydetr finetune WEIGHTS --data path/to/mine --dry-run          show what would be done, and stop

The recipe is made from the weights (architecture, size of images, losses) and the number of images (steps, batch, rates). Every field of
it is a flag, as in `steadydetr train`: --training.epochs 30 --training.freeze backbone --detector.queries 300.
--method adds OD-DETR (od), the loss and cost of Stable-DINO (stable), OD-DETR with that cost (steady), or Align-DETR (align).
Classes keep their weights where their names agree, whatever their case, spaces, hyphens and underscores; --classes automobile=car maps
others, --keep-classes keeps those that the data do not have. Nothing else starts anew unless --allow-partial names it."""


def run(words: Sequence[str]) -> None:
    if not words or {"-h", "--help"} & set(words[:1]):
        print(USAGE)
        return
    if words[0].startswith("-"):
        raise ValueError("name the weights first, as in `steadydetr finetune runs/quickstart --data path/to/mine`")
    where, rest = words[0], list(words[1:])
    check_new_run(rest)
    check_start(where, rest)
    from steadydetr.cli.train import start
    from steadydetr.cli.training_arguments import override, take_method

    method, rest = take_method(rest)
    dry, rest = "--dry-run" in rest, [word for word in rest if word not in ("--dry-run", "--dry_run")]
    if not dry and (before := started_run(rest)) is not None:
        start(*override(before, rest, f"finetune {where}"))
        return
    from steadydetr.checkpoints.start import Start
    from steadydetr.checkpoints.weights import read_weights
    from steadydetr.recipes.finetuning import finetuned
    from steadydetr.tools.finetune import finetune_recipe, recipe_before

    weights = read_weights(where)
    # where the data are has to be known before the schedule can be made for their number, which is any until then
    first = finetuned(weights.card, Start(where), images=1000, method=method, before=recipe_before(where))
    asked, _ = override(first, rest, f"finetune {where}")
    if "--data" not in {word.partition("=")[0] for word in rest} and asked.data.source == first.data.source:
        raise ValueError("--data is missing: the folder of the images to train on, as in `steadydetr finetune runs/quickstart --data mine`")
    recipe, arguments = override(finetune_recipe(weights, Start(where), asked.data, method), rest, f"finetune {where}")
    if dry:
        show(recipe, weights)
    else:
        start(recipe, arguments)


def started_run(words: Sequence[str]) -> Recipe | None:
    """The recipe of the run in --output that is to go on, for which the weights are not needed any more; None for a new run."""
    from steadydetr.recipes.base import Recipe
    from steadydetr.runs.folder import RunFolder

    output, rest = take_flag(words, "--output")
    folder = RunFolder(Path(output or ".").expanduser())
    if not output or "--resume" not in {word.partition("=")[0] for word in rest} or not folder.holds_run:
        return None
    recipe = folder.read_config().recipe()
    return recipe if isinstance(recipe, Recipe) else None


def show(recipe: Recipe, weights: TrainedWeights) -> None:
    """The recipe, and what the detector would take from the weights."""
    from steadydetr.cli.console import PlainConsole
    from steadydetr.config import to_plain
    from steadydetr.training.preparation import open_both

    console = PlainConsole(soft_wrap=True, highlight=False)
    splits = open_both(recipe, console.print)
    classes = splits.train.index.classes
    student = recipe.build_student(len(classes))
    transfer = recipe.start.load(student, recipe.detector, classes, weights)
    console.print_json(json.dumps(to_plain(recipe)))
    for sentence in (f"{recipe.name} would start from {weights.where}:", *transfer.sentences()):
        console.print(sentence)
    console.print(f"{plan(recipe, len(splits.train.index))}. Without --dry-run it is trained; every field above is a flag")


def plan(recipe: Recipe, images: int) -> str:
    """How long it would be trained, on how many images."""
    training = recipe.training
    length = f"of {training.epoch_steps} steps" if training.epoch_steps else "of one pass over the data"
    return f"{images} training images: {counted(training.epochs, 'epoch')} {length}, {training.batch_size} images in a step"
