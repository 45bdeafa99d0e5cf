"""`steadydetr distill`."""

from __future__ import annotations

from collections.abc import Sequence

from steadydetr.cli.quick import check_new_run, check_recipe
from steadydetr.cli.words import take_flag, take_recipe

USAGE = """steadydetr distill RECIPE --teacher CHECKPOINT [--data DATA] [--output FOLDER] [--resume [auto]] [flags]

  steadydetr distill deformable-detr-r50-50ep --teacher runs/r101 --data path/to/coco
  steadydetr distill detrdistill-dino-4scale-r101-r18-12ep --teacher runs/converted --data path/to/coco
  steadydetr distill dino-4scale-r50-12ep --teacher runs/r101 --data path/to/coco --objectives.assignment none

Trains the recipe's detector with a trained one as its teacher, which may have another backbone, width, number of queries, stages or
feature levels, or be another detector, as long as it knows the classes of the data. The checkpoint is a run (its best is taken), a
checkpoint of ours or of another project, hub:owner/name, or a name of `steadydetr weights`. A recipe that learns nothing from a trained
teacher gets DETRDistill's three objectives: logits, features and assignment, with features of weight 2; the paper's 20, which its own
recipes have, can drown the detection.

All flags of `steadydetr train` go here too; `steadydetr distill RECIPE --help` shows them."""


TEACHER = """
--teacher CHECKPOINT names the trained teacher: a run (its best is taken), a checkpoint of ours or of another project, hub:owner/name, or
a name of `steadydetr weights`. Short for --teachers.teacher.checkpoint."""


def run(words: Sequence[str]) -> None:
    name, rest = take_recipe(words, USAGE, "steadydetr distill small-distill-deformable-detr --teacher runs/teacher")
    check_recipe(name)
    check_new_run(rest)
    from steadydetr.cli.train import start
    from steadydetr.cli.training_arguments import find_or_read, override
    from steadydetr.recipes.distill import distilled

    teacher, rest = take_teacher(rest)
    start(*override(distilled(find_or_read(name), teacher), rest, f"distill {name}", TEACHER))


def take_teacher(words: Sequence[str]) -> tuple[str, list[str]]:
    """What --teacher names, and the other words; empty where it is not given."""
    teacher, rest = take_flag(words, "--teacher")
    if teacher is None:
        return "", rest
    if not teacher or teacher.startswith("--"):
        found = f", but {teacher} follows it" if teacher else ""
        raise ValueError(f"--teacher names no checkpoint{found}: give a run, a checkpoint folder or a converted checkpoint after it")
    return teacher, rest
