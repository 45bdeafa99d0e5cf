"""What parts of a training method add to a training step: shared by online.py and offline.py."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timing import paired

from steadydetr.detectors import Detector, DetectorConfig
from steadydetr.learning.frozen import Frozen
from steadydetr.objectives import Objective
from steadydetr.objectives.method import Method
from steadydetr.recipes.base import Recipe
from steadydetr.structures import Batch, Targets
from steadydetr.training.log import peak_memory
from steadydetr.training.optimiser import make_optimiser

CLASSES = 80
Part = Callable[[argparse.Namespace], "Step"]


@dataclass(frozen=True)
class Reader(Objective):
    """Has a teacher run and learns nothing from it: what a teacher costs by itself."""

    teacher: str

    @property
    def name(self) -> str:
        return "reader"

    def add_losses(self, *_: object) -> None:
        pass


class Step:
    """A training step with the optimiser and the teacher's update, on a batch that stays the same."""

    def __init__(
        self,
        recipe: Recipe,
        objectives: tuple[Objective, ...],
        teach: Callable[[Detector], Mapping[str, Frozen[Detector]]],
        arguments: argparse.Namespace,
    ) -> None:
        torch.manual_seed(0)
        student = untrained(recipe.detector)
        self.device = torch.device(arguments.device)
        self.method = Method(student, recipe.criterion, objectives, teach(student)).to(self.device).train()
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


def untrained(config: DetectorConfig) -> Detector:
    return config.without_pretrained().build(CLASSES)


def make_batch(arguments: argparse.Namespace) -> Batch:
    images, size, count = arguments.images, arguments.size, arguments.objects
    torch.manual_seed(1)
    boxes = torch.rand(images * count, 4) * 0.3 + 0.3
    targets = Targets(torch.randint(CLASSES, (images * count,)), boxes, (count,) * images)
    padding = torch.zeros(images, size, size, dtype=torch.bool)
    sizes = ((size, size),) * images
    return Batch(torch.rand(images, 3, size, size), padding, targets, tuple(range(images)), sizes)


def parse(description: str | None, recipe: str, teacher: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", default=recipe)
    if teacher:
        parser.add_argument("--teacher", default=teacher)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--objects", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="*", help="only these, beside the baseline")
    return parser.parse_args()


def memory(part: Part, arguments: argparse.Namespace) -> float:
    """GiB, of two steps: the second holds the optimiser's moments from its start."""
    torch.set_num_threads(2)
    step = part(arguments)
    step(), step()
    return peak_memory(step.device) / 2**30


def in_own_process(part: Part, arguments: argparse.Namespace) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory, (part, arguments))


def print_parts(parts: Mapping[str, Part], arguments: argparse.Namespace) -> dict[str, float]:
    """Each part in turn with the first, the baseline; returns their ratios. Memory is that of a process of its own."""
    (baseline, make_baseline), *others = parts.items()
    if unknown := set(arguments.parts or ()) - parts.keys():
        raise SystemExit(f"--parts: there is no {sorted(unknown)}, only {list(parts)}")
    others = [(name, part) for name, part in others if not arguments.parts or name in arguments.parts]
    memories = {name: in_own_process(part, arguments) for name, part in [(baseline, make_baseline), *others]}
    torch.set_num_threads(2)
    where = f"{arguments.device}, {arguments.images} x {arguments.size} px"
    print(f"{arguments.recipe}, torch {torch.__version__}, {where}, {arguments.rounds} paired rounds, medians")
    print(f"{baseline:<28} {'':>9}   {'':>5}   {memories[baseline]:6.2f} GiB", flush=True)
    peer, ratios = make_baseline(arguments), {}
    for name, part in others:
        ours, theirs, ratios[name] = paired(part(arguments), peer, arguments.rounds)
        line = f"{name:<28} {ours:7.3f} s   {ratios[name]:5.2f}   {memories[name]:6.2f} GiB"
        print(f"{line}   ({baseline} in turn {theirs:.3f} s)", flush=True)
    return ratios
