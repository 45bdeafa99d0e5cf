"""OD-DINO over DINO, part by part: time and peak memory of a training step with the optimiser and the teacher's update.

DINO 4-scale R50 with 900 queries, float32. Every part is timed in turn with the plain DINO, so a drifting machine treats them alike;
memory is that of a process of its own. "teacher" is what no implementation can avoid: the teacher's forward pass and its update.
    python benchmarks/online.py [--rounds 3] [--size 512] [--images 1] [--objects 7] [--device cuda]
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import replace

import torch
from timing import paired

from steadydetr.method import Method
from steadydetr.objectives import AuxiliaryGroups, Detection, MatchingDistillation, PredictionDistillation
from steadydetr.optimiser import make_optimiser
from steadydetr.recipes import find
from steadydetr.run import peak_memory
from steadydetr.structures import Batch, Targets
from steadydetr.teachers import Average

CLASSES = 80
GUIDED = Detection(MatchingDistillation())
# objectives beside denoising, and whether there is a teacher
PARTS = {
    "DINO": ((Detection(),), False),
    "teacher": ((Detection(),), True),
    "teacher, matching": ((GUIDED,), True),
    "teacher, prediction": ((Detection(), PredictionDistillation()), True),
    "teacher, auxiliary groups": ((Detection(), AuxiliaryGroups()), True),
    "OD-DINO": ((GUIDED, PredictionDistillation(), AuxiliaryGroups()), True),
}


class Step:
    """A training step of one of the parts, on a batch that stays the same."""

    def __init__(self, part: str, arguments: argparse.Namespace) -> None:
        objectives, taught = PARTS[part]
        recipe = find("od-dino-4scale-r50-12ep")
        detector = replace(recipe.detector, backbone=replace(recipe.detector.backbone, weights="none"))  # type: ignore[union-attr]
        torch.manual_seed(0)
        student = detector.build(CLASSES)
        denoising = tuple(o for o in recipe.objectives if o.name == "denoising")
        teachers = {"ema": Average(student, 0.9996)} if taught else {}
        self.device = torch.device(arguments.device)
        self.method = Method(student, recipe.criterion, objectives + denoising, teachers).to(self.device).train()
        self.optimiser = make_optimiser(self.method, recipe.training)
        self.batch = make_batch(arguments).to(self.device)

    def __call__(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.method(self.batch).total.backward()
        self.optimiser.step()
        if self.method.ema is not None:
            self.method.ema.update(self.method.student)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_batch(arguments: argparse.Namespace) -> Batch:
    images, size, count = arguments.images, arguments.size, arguments.objects
    torch.manual_seed(1)
    boxes = torch.rand(images * count, 4) * 0.3 + 0.3
    targets = Targets(torch.randint(CLASSES, (images * count,)), boxes, (count,) * images)
    padding = torch.zeros(images, size, size, dtype=torch.bool)
    sizes = ((size, size),) * images
    return Batch(torch.rand(images, 3, size, size), padding, targets, tuple(range(images)), sizes, sizes)


def memory(part: str, arguments: argparse.Namespace) -> float:
    """GiB, of two steps: the second holds the optimiser's moments from its start."""
    torch.set_num_threads(2)
    step = Step(part, arguments)
    step(), step()
    return peak_memory(step.device) / 2**30


def in_own_process(part: str, arguments: argparse.Namespace) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory, (part, arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--objects", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    memories = {part: in_own_process(part, arguments) for part in PARTS}
    torch.set_num_threads(2)
    where = f"{arguments.device}, {arguments.images} x {arguments.size} px"
    print(f"torch {torch.__version__}, {where}, {arguments.rounds} paired rounds, medians")
    baseline, extra = Step("DINO", arguments), {}
    print(f"{'DINO':<28} {'':>9}   {'':>5}   {memories['DINO']:6.2f} GiB")
    for part in list(PARTS)[1:]:
        ours, theirs, extra[part] = paired(Step(part, arguments), baseline, arguments.rounds)
        print(f"{part:<28} {ours:7.2f} s   {extra[part]:5.2f}   {memories[part]:6.2f} GiB   (DINO in turn {theirs:.2f} s)")
    unavoidable = (extra["teacher"] - 1) / (extra["OD-DINO"] - 1)
    print(f"OD-DINO / DINO: {extra['OD-DINO']:.2f}; {100 * unavoidable:.0f}% of what it adds is the teacher, which cannot be avoided")


if __name__ == "__main__":
    main()
