"""How many images of a recipe fit on the GPU in one step: tried with real steps on the largest images that the recipe can make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator

from steadydetr.boxes import to_cxcywh
from steadydetr.data import Dataset
from steadydetr.data.transforms import Sample, TrainTransform, apply, seeded
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.finetuning import batch_for
from steadydetr.structures import Batch, Targets, Totals
from steadydetr.training.averages import make_averages
from steadydetr.training.optimiser import make_optimiser
from steadydetr.training.precision import autocast
from steadydetr.training.processes import together

DRAWS = 200  # made-up images that are augmented to see how large they become
USUAL = 16  # images per step where the recipe does not say what its rate is meant for
LEAST_STEPS = 16  # of a pass over the data: larger batches would make too few of few images
SPARE = 0.1  # share of the GPU's memory that stays free, for what a step needs now and then


def find_batch(recipe: Recipe, data: Dataset, accelerator: Accelerator) -> int:
    """The images per step for `training.batch_size` auto: on the CPU as `finetune` has it, on GPUs as many as fit, in powers of two.

    All processes call it together, and get the same number.

    Raises:
        ValueError: not even one image fits; says what to do.
    """
    config, images = recipe.training, len(data.index)
    shares = accelerator.num_processes * config.micro_batches
    if accelerator.device.type != "cuda":
        return max(batch_for(images, config.lr_batch_size or USUAL) // shares, 1) * shares
    return fits_everywhere(recipe, data, accelerator, max(images // LEAST_STEPS // shares, 1)) * shares


def find_accumulation(recipe: Recipe, data: Dataset, accelerator: Accelerator) -> int:
    """The micro-batches for `training.accumulation` auto: on the CPU one, on GPUs as few as fit. Else as `find_batch`."""
    images = recipe.training.images_per_step // accelerator.num_processes
    if accelerator.device.type != "cuda" or images < 2:
        return 1
    fits = fits_everywhere(recipe, data, accelerator, images)
    return next(parts for parts in range(1, images + 1) if images % parts == 0 and images // parts <= fits)


def fits_everywhere(recipe: Recipe, data: Dataset, accelerator: Accelerator, most: int) -> int:
    """How many images of a micro-batch, up to `most`, fit on the GPU of every process."""
    fits = together(accelerator, lambda: images_that_fit(recipe, data, accelerator.device, most))
    if accelerator.num_processes > 1:
        fits = int(accelerator.gather(torch.tensor([fits], device=accelerator.device)).min())
    return fits


def images_that_fit(recipe: Recipe, data: Dataset, device: torch.device, most: int) -> int:
    """How many images of a micro-batch fit on this GPU, up to `most`. A ValueError where not even one does."""
    with _memory_to_spare(device):
        fits = largest_fitting(step_of(recipe, data, device), most)
    if not fits:
        raise ValueError(
            "training.batch_size or accumulation = auto: not even one image fits into the memory of the GPU: take smaller images"
            " (--data.transform), --detector.transformer.checkpointing or --training.precision bf16"
        )
    return fits


def largest_fitting(step: Callable[[int], None], most: int) -> int:
    """The largest power of two up to `most` with which `step` does not run out of memory; 0: not even 1 fits."""
    size = 1
    while size <= most:
        try:
            step(size)
        except torch.OutOfMemoryError:
            break
        finally:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        size *= 2
    return size // 2


def step_of(recipe: Recipe, data: Dataset, device: torch.device) -> Callable[[int], None]:
    """A function that takes two training steps with so many images, after which all that a run keeps is in memory."""
    height, width = largest_size(data, recipe.data.transform)
    classes = data.index.classes
    student = recipe.detector.without_pretrained().build(len(classes))
    method = recipe.build(classes, None, student).to(device).train()
    if recipe.training.freeze:
        method.student.freeze(recipe.training.freeze)
    averages = make_averages(recipe, method, 1)
    optimiser = make_optimiser(method, replace(recipe.training, lr=1e-12))

    def step(size: int) -> None:
        masks = recipe.criterion.masks is not None
        batch = made_up_batch(size, (student.image_channels, height, width), int(data.index.counts.max()), len(classes), masks).to(device)
        for number in range(2):
            optimiser.zero_grad(set_to_none=True)
            with autocast(recipe.training, device):
                losses = method(replace(batch, step=number))
            losses.total.backward()
            optimiser.step()
            averages.update(method.student, number)

    return step


def largest_size(data: Dataset, transform: TrainTransform) -> tuple[int, int]:
    """The largest height and width of augmented images, to which a batch is padded. No image is opened: black ones stand for them."""

    def black(position: int) -> Sample:
        (height, width), rows = data.index.sizes[position].tolist(), data.index.rows(position)
        boxes, labels = torch.from_numpy(data.index.boxes_xyxy[rows]), torch.from_numpy(data.index.labels[rows]).long()
        return Sample(torch.zeros(3, height, width, dtype=torch.uint8), boxes, labels)

    steps, images, sides = transform.build(), len(data.index), [(1, 1)]
    for draw in range(DRAWS):
        with seeded(draw):
            height, width = apply(steps, transform.gather(black, draw * images // DRAWS, images)).image.shape[-2:]
        sides.append((height, width))
    return max(height for height, _ in sides), max(width for _, width in sides)


def made_up_batch(images: int, shape: tuple[int, int, int], objects: int, classes: int, masks: bool = False) -> Batch:
    """Grey images of this shape [C, H, W] without padding, each with so many objects at random places, which may have masks."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(images * objects, 2, 2, generator=generator).sort(1).values.flatten(1)
    labels = torch.randint(classes, (images * objects,), generator=generator)
    targets = Targets(labels, to_cxcywh(corners), (objects,) * images)
    return Batch(
        images=torch.full((images, *shape), 127, dtype=torch.uint8),
        padding=torch.zeros(images, *shape[1:], dtype=torch.bool),
        targets=targets.with_box_masks(shape[1:]) if masks else targets,
        image_ids=tuple(range(images)),
        original_sizes=(shape[1:],) * images,
        totals=Totals.of([objects] * images),
    )


@contextmanager
def _memory_to_spare(device: torch.device) -> Iterator[None]:
    torch.cuda.set_per_process_memory_fraction(1 - SPARE, device.index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)
