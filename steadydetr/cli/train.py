"""`steadydetr train`."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steadydetr.cli.quick import check_ingredients, check_new_run, check_recipe, check_start
from steadydetr.cli.words import take_flag, take_recipe
from steadydetr.files import listed, printable
from steadydetr.kinds import normal

if TYPE_CHECKING:
    from steadydetr.cli.training_arguments import TrainArguments
    from steadydetr.recipes.base import Recipe

USAGE = """steadydetr train RECIPE [--data DATA] [--method plain|od|stable|steady|align] [--output FOLDER] [--resume [auto]] [flags]

  steadydetr train desk-small --data path/to/data                    your own photos, minutes on a laptop (docs/own-data.md)
  steadydetr train desk-small --data path/to/data --method od        the same, taught by its own average (OD-DETR)
  steadydetr train quickstart                                        minutes on a laptop, on generated images
  steadydetr train dino-4scale-r50-12ep --data path/to/coco          the recipe of the paper
  steadydetr train quickstart --data path/to/voc --training.epochs 60 --output runs/mine
  steadydetr train quickstart --output runs/mine --resume            go on with an interrupted run: the same command again
  steadydetr train quickstart --output runs/mine --resume auto       start it or go on with it, for schedulers
  steadydetr train runs/mine/config.json --output runs/again         what another run was made of
  torchrun --nproc-per-node 8 -m steadydetr train RECIPE ...         the same on 8 GPUs

Every field of a recipe is a flag, for example
  --training.batch-size 8 --detector.queries 300 --criterion.class-target quality --criterion.alpha None
  --objectives.denoising.number 200, or --objectives.denoising none to leave it out
  --detector.backbone small-backbone, then --detector.backbone.stem 16: parts can be exchanged

`steadydetr recipes` lists the recipes; `steadydetr train RECIPE --help` shows every flag with the value that the recipe has."""


def run(words: Sequence[str]) -> None:
    name, rest = take_recipe(words, USAGE, "steadydetr train quickstart")
    check_recipe(name)
    named_otherwise = name.endswith(".json") or ":" in name or take_flag(rest, "--method")[0]
    check_new_run(rest, "" if named_otherwise else f"runs/{normal(name)}")
    check_start(take_flag(rest, "--from")[0], rest)
    from steadydetr.cli.training_arguments import read_training_arguments

    start(*read_training_arguments(name, rest))


RESUME: dict[str, bool | Literal["auto"]] = {"no": False, "yes": True, "auto": "auto"}  # as `training.loop.train` takes it


def start(recipe: Recipe, arguments: TrainArguments) -> None:
    """Train, and show what came of it."""
    check_ingredients(recipe)
    from accelerate import PartialState

    from steadydetr.training.loop import train

    output = arguments.output or default_output(recipe)
    resume = RESUME[arguments.resume]
    summary = train(recipe, output, resume, arguments.device)
    if summary["finished"] and PartialState().is_main_process:
        if not sys.stdout.isatty():
            print(json.dumps(summary))  # a line for programs, which version 0.1 ended with
        show_result(output.expanduser())


def show_result(folder: Path) -> None:
    """The metrics of a finished run, the best first, where its files are, and what to do with them."""
    from rich.box import SIMPLE
    from rich.table import Table

    from steadydetr.cli.console import PlainConsole
    from steadydetr.metrics.table import AP_COLUMNS, percent
    from steadydetr.runs.folder import BEST, CONFIG, SUMMARY
    from steadydetr.runs.folder import METRICS as RECORDS
    from steadydetr.runs.records import WEIGHTS_LABELS, read_run

    run = read_run(folder, folder.name)
    columns = {f"{BEST}: {WEIGHTS_LABELS[run.best['weights']]}": run.best} if run.best else {}
    columns |= {label: last for name, label in WEIGHTS_LABELS.items() if (last := run.last("eval", name))}
    table = Table("weights", *columns, box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))  # fits a terminal of 40 columns
    table.add_row("epoch", *(str(record["epoch"]) for record in columns.values()))
    for label, name in AP_COLUMNS.items():
        if any(name in record for record in columns.values()):
            table.add_row(label, *(percent(record.get(name, -1)) for record in columns.values()))
    console = PlainConsole(soft_wrap=True, highlight=False)
    console.print("", table, "", sep="\n")
    pictures = [path.name for path in sorted(folder.glob("*.png"))]
    console.print(f"In {folder}: {listed(['best/, last/ (checkpoints)', *pictures, SUMMARY, RECORDS, CONFIG])}. Next:")
    place = shlex.quote(str(folder))
    console.print(f"  steadydetr report {place}\n  steadydetr predict {place} photo.jpg")


def default_output(recipe: Recipe) -> Path:
    """runs/RECIPE; a ValueError where the name, which a stranger's file may have brought, is not that of a folder."""
    if not re.fullmatch(r"[\w][\w. +:-]{0,99}", recipe.name):
        raise ValueError(f"the recipe's name {printable(repr(recipe.name))} cannot be that of a folder in runs/: give --output")
    return Path("runs") / recipe.name.replace(":", "-")
