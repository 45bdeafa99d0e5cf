"""A training step and inference of recipes at paper size: seconds and peak memory on a GPU. The teachers of offline distillation have
the student's size and random weights.

    python benchmarks/paper_size.py [--images 2] [--height 800 --width 1333] [--precision tf32] [--recipes dino-4scale-r50-12ep ...]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from timing import seconds
from training_step import CLASSES, untrained

from steadydetr.learning.frozen import Frozen
from steadydetr.objectives.method import Method
from steadydetr.recipes import find
from steadydetr.structures import Batch, Targets
from steadydetr.training.optimiser import make_optimiser

RECIPES = (
    "dino-4scale-r50-12ep",
    "od-dino-4scale-r50-12ep",
    "stable-dino-4scale-r50-12ep",
    "align-dino-4scale-r50-12ep",
    "deformable-detr-two-stage-r50-50ep",
    "od-deformable-detr-r50-12ep",
    "h-deformable-detr-r50-12ep",
    "detrdistill-deformable-detr-r101-r50-50ep",
    "adamixer-r50-100q-12ep",
    "conditional-detr-r50-50ep",
)
OBJECTS, ROUNDS = 7, 5  # objects of an image; of which the first is left out


def make_batch(images: int, height: int, width: int) -> Batch:
    torch.manual_seed(1)
    boxes = torch.rand(images * OBJECTS, 4) * 0.3 + 0.3
    targets = Targets(torch.randint(CLASSES, (images * OBJECTS,)), boxes, (OBJECTS,) * images)
    padding = torch.zeros(images, height, width, dtype=torch.bool)
    return Batch(torch.rand(images, 3, height, width), padding, targets, tuple(range(images)), ((height, width),) * images).to("cuda")


def median_seconds(step: Callable[[], object]) -> float:
    def finished() -> None:
        step()
        torch.cuda.synchronize()

    return statistics.median([seconds(finished) for _ in range(ROUNDS)][1:])


def measure(name: str, arguments: argparse.Namespace) -> None:
    recipe, batch = find(name), make_batch(arguments.images, arguments.height, arguments.width)
    torch.manual_seed(0)
    student = untrained(recipe.detector)
    teachers = {
        teacher.name: Frozen(untrained(recipe.detector)) if teacher.trained_before else teacher.build(student, CLASSES, 1000)
        for teacher in recipe.teachers
    }
    method = Method(student, recipe.criterion, recipe.objectives, teachers).cuda().train()
    optimiser, lower = (
        make_optimiser(method, recipe.training),
        torch.autocast("cuda", torch.bfloat16, enabled=arguments.precision == "bf16"),
    )

    def train() -> None:
        optimiser.zero_grad(set_to_none=True)
        with lower:
            total = method(batch).total
        total.backward()
        optimiser.step()
        if method.ema is not None:
            method.ema.update(method.student)

    def infer() -> None:
        with torch.inference_mode(), lower:
            method.student(batch.images[:1], batch.padding[:1])

    torch.cuda.reset_peak_memory_stats()
    step = median_seconds(train)
    memory = torch.cuda.max_memory_allocated() / 2**30
    method.eval()
    print(f"{name:<44} {step:7.3f} s a step   {memory:6.1f} GiB   {1000 * median_seconds(infer):6.1f} ms an image", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--precision", choices=["float32", "tf32", "bf16"], default="tf32")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.precision == "tf32"
    where = f"{arguments.images} x {arguments.height} x {arguments.width}, {arguments.precision}, {torch.cuda.get_device_name()}"
    print(f"torch {torch.__version__}, {where}, medians of {ROUNDS - 1}")
    for name in arguments.recipes:
        measure(name, arguments)


if __name__ == "__main__":
    main()
