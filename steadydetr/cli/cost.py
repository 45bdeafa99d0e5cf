"""`steadydetr cost`."""

from __future__ import annotations

from collections.abc import Sequence

from steadydetr.cli.console import PlainConsole
from steadydetr.cli.quick import check_recipe
from steadydetr.cli.words import take_recipe
from steadydetr.files import refuse_existing, write_json

USAGE = """steadydetr cost RECIPE [--size H W] [--teacher RECIPE_OR_CHECKPOINT] [flags]

  steadydetr cost deformable-detr-r50-50ep                           at 800 x 1333; some minutes on a laptop
  steadydetr cost small-od-dino --size 128 128
  steadydetr cost deformable-detr-r50-50ep --teacher dino-4scale-r50-12ep --teachers.teacher trained-teacher
      --objectives.features feature-distillation

Parameters, and GFLOPs of inference and of a training step with one image; a multiplication with its addition counts once, as in the
papers. What each distillation objective adds is counted in forward passes, as share of KD / (teacher + student + KD) (DETRDistill).
Runs on the CPU with random weights. Every field of the recipe is a flag, as in `steadydetr train`."""


def run(words: Sequence[str]) -> None:
    name, rest = take_recipe(words, USAGE, "steadydetr cost deformable-detr-r50-50ep")
    check_recipe(name)
    from steadydetr.cli.cost_arguments import read_cost_arguments, tables

    arguments = read_cost_arguments(name, rest, USAGE)
    refuse_existing(arguments.output, arguments.overwrite)
    from steadydetr.tools.cost import measure_cost

    cost = measure_cost(arguments.recipe, arguments.size, arguments.teacher, arguments.classes)
    for table in tables(cost):
        PlainConsole().print(table)
    if arguments.output is not None:
        write_json(arguments.output, cost.as_dict())
