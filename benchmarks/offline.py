"""DETRDistill over its student alone, part by part: time and peak memory of a training step.

Float32, on random weights. "teacher" is the teacher's forward pass: what outputs cached on disk could save at most.
    python benchmarks/offline.py [--recipe detrdistill-deformable-detr-r101-r50-50ep] [--teacher deformable-detr-r101-50ep] [--size 512]
"""

from __future__ import annotations

import argparse
from functools import partial

from training_step import Reader, Step, parse, print_parts, untrained

from steadydetr.learning.frozen import Frozen
from steadydetr.objectives import AssignmentDistillation, FeatureDistillation, LogitsDistillation, SetPrediction
from steadydetr.recipes import find

# objectives beside the student's own denoising, and whether there is a teacher
PARTS = {
    "student": ((), False),
    "teacher": ((Reader("teacher"),), True),
    "teacher, logits": ((LogitsDistillation(),), True),
    "teacher, features": ((FeatureDistillation(),), True),
    "teacher, assignment": ((AssignmentDistillation(),), True),
    "all": ((LogitsDistillation(), FeatureDistillation(), AssignmentDistillation()), True),
}


def make_step(part: str, arguments: argparse.Namespace) -> Step:
    objectives, taught = PARTS[part]
    recipe = find(arguments.recipe)
    own = tuple(o for o in recipe.objectives if isinstance(o, SetPrediction) or o.name == "denoising")
    teacher = {"teacher": Frozen(untrained(find(arguments.teacher).detector))} if taught else {}
    return Step(recipe, own + objectives, lambda student: teacher, arguments)


def main() -> None:
    arguments = parse(__doc__, "detrdistill-deformable-detr-r101-r50-50ep", "deformable-detr-r101-50ep")
    ratios = print_parts({part: partial(make_step, part) for part in PARTS}, arguments)
    if arguments.parts:
        return
    print(f"of the whole step: teacher {100 * (ratios['teacher'] - 1) / ratios['all']:.0f}%", end="")
    for name in ("logits", "features", "assignment"):
        print(f", {name} {100 * (ratios[f'teacher, {name}'] - ratios['teacher']) / ratios['all']:.0f}%", end="")
    print()


if __name__ == "__main__":
    main()
