"""`steadydetr compare`."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.table import Table

from steadydetr.cli.console import PlainConsole
from steadydetr.cli.parsing import parse
from steadydetr.cli.quick import check_ingredients, check_recipe
from steadydetr.config import check_within

if TYPE_CHECKING:
    from steadydetr.recipes.base import Recipe

DESCRIPTION = """Train several recipes with several seeds; tell mean, deviation and the paired difference to the first one.

  steadydetr compare small-dino small-stable-dino --seeds 3 --data path/to/data
  steadydetr compare small-dino 'cost=small-dino --criterion.class-cost position-modulated' --seeds 3 -- --training.epochs 6
  steadydetr compare dino-4scale-r50-12ep od-dino-4scale-r50-12ep --launch 'torchrun --nproc-per-node 8 -m steadydetr train'

A recipe may stand in quotes with flags of its own and, before it, a label: 'LABEL=RECIPE FLAGS'. Flags after -- hold for all.
The same command again goes on: finished runs are kept, interrupted ones resumed. The runs lie in OUTPUT/LABEL/seedK."""


@dataclass(frozen=True)
class CompareArguments:
    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    """The baseline first."""
    seeds: int = 3
    """How many, from 0 on."""
    data: str | None = None
    """Folder of the data set, its data.yaml or JSON file, or shapes."""
    output: Path = Path("runs/compare")
    """Folder of the runs and of the table."""
    jobs: int = 1
    """Runs at a time; they share the cores."""
    launch: str = ""
    """Command that starts a training, instead of this Python's `-m steadydetr train`."""
    device: str = "auto"
    """What the runs train on: auto (a GPU if there is one), cpu, cuda, cuda:1 or mps."""


def run(words: Sequence[str]) -> None:
    words = list(words)
    shared = words[words.index("--") + 1 :] if "--" in words else []
    own = words[: words.index("--")] if "--" in words else words
    if of_recipes := [word for word in own if word.startswith("--") and "." in word.partition("=")[0]]:
        raise ValueError(
            f"{of_recipes[0]} is no option of compare: flags that hold for all recipes stand after --, as in `-- {of_recipes[0]}`"
        )
    arguments = parse(CompareArguments, own, "compare", DESCRIPTION)
    if len(arguments.recipes) < 2:
        raise ValueError("name at least two recipes, the baseline first, as in `steadydetr compare small-dino small-stable-dino`")
    check_within("", arguments, seeds=(1, 10**6), jobs=(1, 1000))
    for text in arguments.recipes:
        check_recipe(shlex.split(text)[0].rpartition("=")[2])
    entries = list(read_entries(arguments, shared))
    from steadydetr.devices import choose_device
    from steadydetr.tools.compare import NOTE, TRAIN, compare_recipes, comparison_table, with_labels

    choose_device(arguments.device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's signal, too, is passed on to the runs
    console = PlainConsole(soft_wrap=True)
    launch = shlex.split(arguments.launch) or TRAIN
    recipes = with_labels(entries)
    outcomes = compare_recipes(recipes, arguments.seeds, arguments.output, arguments.jobs, launch, console.print, arguments.device)
    header, *rows = comparison_table(outcomes)
    shown = Table(*header)
    shown.columns[0].overflow = "fold"  # labels are never cut
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    console.print(f"{NOTE}\nSaved in {arguments.output}/comparison.md and .json")


def read_entries(arguments: CompareArguments, shared: Sequence[str]) -> Iterator[tuple[str, Recipe]]:
    """Label and recipe of every text among the arguments, with its own flags and those that all share."""
    from steadydetr.cli.training_arguments import read_training_arguments

    data = [] if arguments.data is None else ["--data", arguments.data]
    for text in arguments.recipes:
        name, *flags = shlex.split(text)
        label, _, recipe = name.rpartition("=")
        changed, others = read_training_arguments(recipe, [*data, *shared, *flags])
        if (others.output, others.resume, others.device) != (None, "no", "auto"):
            raise ValueError(
                "--output, --resume and --device hold for all runs: give --output and --device before --; runs go on by themselves"
            )
        check_ingredients(changed)
        yield label or recipe.replace(":", "-"), changed
