"""OD-DETR over its baseline, part by part: time and peak memory of a training step with the optimiser and the teacher's update.

Float32, on random weights. Every part is timed in turn with the baseline, so a drifting machine treats them alike; memory is that of
a process of its own. "teacher" is what no implementation can avoid: the teacher's forward pass and its update.
    python benchmarks/online.py [--recipe od-dino-4scale-r50-12ep] [--rounds 3] [--size 512] [--images 1] [--objects 7] [--device cuda]
        [--parts all]
"""

from __future__ import annotations

import argparse
from functools import partial

from training_step import Reader, Step, parse, print_parts

from steadydetr.learning.frozen import Average
from steadydetr.objectives import AuxiliaryGroups, MatchingDistillation, PredictionDistillation, SetPrediction
from steadydetr.recipes import find

GUIDED = SetPrediction(MatchingDistillation())
# objectives beside denoising, and whether there is a teacher
PARTS = {
    "baseline": ((SetPrediction(),), False),
    "teacher": ((SetPrediction(), Reader("ema")), True),
    "teacher, matching": ((GUIDED,), True),
    "teacher, prediction": ((SetPrediction(), PredictionDistillation()), True),
    "teacher, auxiliary groups": ((SetPrediction(), AuxiliaryGroups()), True),
    "all": ((GUIDED, PredictionDistillation(), AuxiliaryGroups()), True),
}


def make_step(part: str, arguments: argparse.Namespace) -> Step:
    objectives, taught = PARTS[part]
    recipe = find(arguments.recipe)
    denoising = tuple(o for o in recipe.objectives if o.name == "denoising")
    return Step(recipe, objectives + denoising, lambda student: {"ema": Average(student, 0.9996)} if taught else {}, arguments)


def main() -> None:
    arguments = parse(__doc__, "od-dino-4scale-r50-12ep")
    ratios = print_parts({part: partial(make_step, part) for part in PARTS}, arguments)
    if arguments.parts:
        return
    unavoidable = (ratios["teacher"] - 1) / (ratios["all"] - 1)
    print(f"all / baseline: {ratios['all']:.2f}; {100 * unavoidable:.0f}% of what it adds is the teacher, which cannot be avoided")


if __name__ == "__main__":
    main()
