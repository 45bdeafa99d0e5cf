"""What a recipe costs: parameters, and the multiplications of inference and of a training step with all its parts.

That is what Table 3 of DETRDistill's supplement tells. Everything is run as in training, on the CPU, with random weights and one
made-up image, and counted while it runs. As in the papers a multiplication and the addition after it count as one, and only matrix
products, convolutions, attention and sampling are counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from steadydetr.checkpoints.weights import read_weights
from steadydetr.detectors import Detector, DetectorConfig
from steadydetr.detectors.base import evaluating
from steadydetr.objectives import AssignmentDistillation, Objective
from steadydetr.objectives.method import Method
from steadydetr.recipes import find, names
from steadydetr.recipes.base import Recipe
from steadydetr.structures import Batch, Losses, Targets

T = TypeVar("T")
OBJECTS = 7  # in the made-up image, as in a mean image of COCO


def bag_flops(table: Sequence[int], indices: Sequence[int], *rest: Any, out_val: Any = None, **options: Any) -> int:
    """Multiplications of a weighted sum of rows, by which deformable attention samples: every row times its weight.

    The counter halves what is returned, hence the 2. `table` is [rows, width], `indices` the rows that are summed.
    """
    return 2 * indices[0] * table[1]


def bag_weight_flops(grad: Sequence[int], table: Sequence[int], indices: Sequence[int], *rest: Any, **options: Any) -> int:
    """Multiplications of the gradient of the weights: every row that was summed, times the gradient of its sum."""
    return 2 * indices[0] * table[1]


SAMPLING = {
    torch.ops.aten._embedding_bag: bag_flops,
    torch.ops.aten._embedding_bag_forward_only: bag_flops,
    torch.ops.aten._embedding_bag_per_sample_weights_backward: bag_weight_flops,
}


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    parameters: int
    trainable: int  # of these
    inference: int  # multiplications with one image
    encoder: int  # those of the encoder among them


@dataclass(frozen=True)
class Cost:
    """What a recipe costs; all numbers but those of parameters are multiplications with one image."""

    student: Size
    teachers: dict[str, Size]
    teaching: int  # the forward passes of the teachers whose output an objective reads
    adapters: int  # parameters that objectives train besides the student
    forward: int  # the forward pass of a training step without distillation: the student and the losses that need no teacher
    parts: dict[str, int]  # what each distillation objective adds to that forward pass, by its name
    parts_as_released: dict[str, int]  # the same where the released code does more: the assignment runs the student's encoder again (F-69)
    step: int  # the whole training step: forward and backward, teachers and distillation included
    plain_step: int  # the step without teachers and distillation

    def share(self, part: str) -> float:
        """What this part adds as a share of the forward passes of teachers, student and this part (DETRDistill's KD share)."""
        return self.share_of(self.parts[part])

    def share_of(self, added: int) -> float:
        """What this many multiplications are of these forward passes and themselves."""
        return added / (self.teaching + self.forward + added)

    @property
    def whole_share(self) -> float:
        """The same share of all parts together."""
        return self.share_of(sum(self.parts.values()))

    def as_dict(self) -> dict[str, Any]:
        """All numbers, with the shares."""
        shares = {name: self.share(name) for name in self.parts}
        return asdict(self) | {"shares": shares, "whole_share": self.whole_share}


def count_multiplications(run: Callable[[], T]) -> tuple[int, T]:
    """The multiplications that a function does when it is run, and what it returns."""
    by_module, result = count_by_module(run)
    return by_module["Global"], result


def count_by_module(run: Callable[[], T]) -> tuple[dict[str, int], T]:
    """The same within each module that is run, by class and path ("DINO.encoder.layers.0"); "Global" is the whole."""
    with FlopCounterMode(display=False, custom_mapping=SAMPLING) as counter:
        result = run()
    counts = {module: int(sum(operations.values())) // 2 for module, operations in counter.get_flop_counts().items()}
    return defaultdict(int, counts), result


def measure_cost(recipe: Recipe, size: tuple[int, int] = (800, 1333), teacher: str = "", classes: int = 80) -> Cost:
    """Build the recipe without fetching any weights and run its parts.

    Args:
        size: (height, width) of the image.
        teacher: recipe, or checkpoint, of the trained teacher, where the recipe has one; only its architecture matters.

    Raises:
        ValueError, FileNotFoundError: there is no such teacher, or none is named where one is needed.
    """
    torch.manual_seed(0)
    method = build_untrained(recipe, teacher, classes)
    batch = make_batch(size, classes, recipe.detector.image_channels, masks=recipe.criterion.masks is not None)
    teachers = {name: measure_size(model, batch) for name, model in method.teaching.items()}
    student = measure_size(method.student, batch)
    teaching = sum(teachers[name].inference for name in method.active_teachers)
    method.train()
    teaching_and_encoding, context = count_multiplications(lambda: method.step_context(batch))
    encoding = teaching_and_encoding - teaching  # the student's backbone, encoder and queries

    def forward(objectives: tuple[Objective, ...]) -> tuple[int, Losses]:
        return count_multiplications(lambda: method.losses(context, objectives))

    def backward(losses: Losses) -> int:
        return count_multiplications(lambda: losses.total.backward(retain_graph=True))[0]

    plain = without_distillation(method.objectives)
    base, losses = forward(plain)
    plain_step = encoding + base + backward(losses)
    parts = {o.name: forward((*plain, o))[0] - base for o in method.objectives if o not in plain}
    assigning = [o.name for o in method.objectives if isinstance(o, AssignmentDistillation) and student.encoder]
    as_released = {name: parts[name] + student.encoder for name in assigning}
    step = plain_step
    if parts:
        whole, losses = forward(method.objectives)
        step = teaching + encoding + whole + backward(losses)
    adapters = count_parameters(method.adapters)[0]
    return Cost(student, teachers, teaching, adapters, encoding + base, parts, as_released, step, plain_step)


def without_distillation(objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """The objectives by which a detector learns without a teacher.

    A teacher's match in `SetPrediction` (matching distillation) is left in it, because it needs no multiplications.
    """
    return tuple(o for o in objectives if not o.distils)


def build_untrained(recipe: Recipe, teacher: str, classes: int) -> Method:
    """The recipe's method with random weights; see `measure_cost` for `teacher`."""
    student = recipe.detector.without_pretrained().build(classes)
    teachers = {
        config.name: config.build_untrained(student, classes, lambda checkpoint: detector_of(teacher or checkpoint))
        for config in recipe.teachers
    }
    if teacher and not any(config.trained_before for config in recipe.teachers):
        raise ValueError(f"{recipe.name} learns from no trained teacher: leave --teacher out, or add --teachers.teacher trained-teacher")
    return Method(student, recipe.criterion, recipe.objectives, teachers)


def detector_of(teacher: str) -> DetectorConfig:
    """The detector of a recipe or of a checkpoint."""
    if not teacher:
        raise ValueError("the recipe learns from a trained teacher: name its recipe or checkpoint by --teacher")
    if teacher.replace("_", "-") in names():
        return find(teacher).detector
    return read_weights(teacher).card.detector


def measure_size(detector: Detector, batch: Batch) -> Size:
    """The size of a detector, whose inference is run on a batch of one image."""
    with torch.no_grad(), evaluating(detector):
        by_module, _ = count_by_module(lambda: detector(batch.images, batch.padding))
    return Size(*count_parameters(detector), by_module["Global"], by_module[f"{type(detector).__name__}.encoder"])


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """The number of all parameters, and of the trainable ones."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)


def make_batch(size: tuple[int, int], classes: int, channels: int = 3, masks: bool = False) -> Batch:
    """A batch of one random image without padding, whose objects may have masks."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.cat((torch.rand(OBJECTS, 2, generator=generator) * 0.5 + 0.25, torch.full((OBJECTS, 2), 0.2)), 1)
    labels: Tensor = torch.randint(classes, (OBJECTS,), generator=generator)
    images, padding = torch.rand(1, channels, *size, generator=generator), torch.zeros(1, *size, dtype=torch.bool)
    targets = Targets(labels, boxes, (OBJECTS,))
    return Batch(images, padding, targets.with_box_masks(size) if masks else targets, (0,), (size,))
