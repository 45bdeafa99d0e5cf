"""Teachers: detectors that a student learns from, and their configs."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import nn

from steadydetr.checkpoints.folder import LoadedDetector, load_detector
from steadydetr.detectors.base import Detector, DetectorConfig
from steadydetr.kinds import changeable, register

Model = TypeVar("Model", bound=nn.Module)
HORIZON = 0.028  # share of a run's steps that an average reaches back: 1 / (1 - 0.9996) = 2,500 of the 89,000 steps of OD-DETR's 12 epochs


class Frozen(nn.Module, Generic[Model]):
    """A model that is always in evaluation mode and without gradients, even when the method around it is set to training mode."""

    def __init__(self, model: Model, fingerprint: str = "") -> None:
        super().__init__()
        self.model: Model = model.requires_grad_(False).eval()
        self.fingerprint = fingerprint  # a hash of its weights, "" where they change

    def train(self, mode: bool = True) -> Frozen[Model]:
        return super().train(False)


class Average(Frozen[Model]):
    """Exponential moving average of a detector's parameters and floating buffers; other buffers are copied."""

    def __init__(self, model: Model, decay: float) -> None:
        super().__init__(copy.deepcopy(model))
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After the optimiser's step: average <- decay * average + (1 - decay) * model."""
        mine, theirs = self.model.state_dict(), model.state_dict()
        floating = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floating], [theirs[name] for name in floating], 1 - self.decay)
        for name in mine.keys() - set(floating):
            mine[name].copy_(theirs[name])


class Teacher(ABC):
    """Where a teacher comes from: a frozen dataclass."""

    trained_before: bool = False  # it comes from a checkpoint, with an architecture of its own
    stop_update: bool = False  # an average that is frozen from the first drop of the learning rate; no drop, no stop  # D-32
    checkpoint: str = ""  # that it comes from, where it was trained before

    @property
    @abstractmethod
    def name(self) -> str:
        """What objectives call it; no two teachers of a recipe share one."""

    def decay_for(self, total_steps: int | None) -> float | None:
        """The decay of its average in a run of so many steps, None: of unknown length. None where it is no average of the student."""
        return None

    @abstractmethod
    def build(self, student: Detector, classes: int | Sequence[str], total_steps: int | None) -> Frozen[Detector]:
        """The teacher with its weights.

        Args:
            classes: of the data, or only their number.
            total_steps: of the run; None: unknown.
        """

    @abstractmethod
    def build_untrained(self, student: Detector, num_classes: int, architecture: Callable[[str], DetectorConfig]) -> Frozen[Detector]:
        """A model of the same architecture with random weights, which is enough to count what it costs.

        Args:
            architecture: the config of the detector in a checkpoint; only teachers that were trained before ask for it.
        """


def relative_decay(total_steps: int) -> float:
    """The decay of an average over the share `HORIZON` of so many steps."""
    return max(1 - 1 / (HORIZON * total_steps), 0.0)


@register("ema-teacher")
@dataclass(frozen=True)
class EMATeacher(Teacher):
    """The average of the student's weights as its teacher (OD-DETR)."""

    decay: float | None = None  # 0.9996 in the paper; None: an average over about 2.8% of the run's steps  # D-31
    stop_update: bool = True

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"teachers.ema.decay = {self.decay} must lie in 0 <= decay < 1; None: a horizon of 2.8% of the run")

    @property
    def name(self) -> str:
        return "ema"

    def decay_for(self, total_steps: int | None) -> float:
        if self.decay is not None:
            return self.decay
        return 0.9996 if total_steps is None else relative_decay(total_steps)

    def build(self, student: Detector, classes: int | Sequence[str], total_steps: int | None) -> Average[Detector]:
        return Average(student, self.decay_for(total_steps))

    def build_untrained(self, student: Detector, num_classes: int, architecture: Callable[[str], DetectorConfig]) -> Average[Detector]:
        return Average(student, self.decay_for(None))


@register("trained-teacher")
@dataclass(frozen=True)
class TrainedTeacher(Teacher):
    """A detector that was trained before, and is frozen (DETRDistill): of any architecture, as long as it knows the classes."""

    trained_before = True
    checkpoint: str = changeable("")  # a run, of which the best is taken, a checkpoint folder, or a converted checkpoint

    @property
    def name(self) -> str:
        return "teacher"

    def build(self, student: Detector, classes: int | Sequence[str], total_steps: int | None) -> Frozen[Detector]:
        """The detector in the checkpoint, whose class scores are reduced to the data's classes and brought into their order.

        Raises:
            ValueError, FileNotFoundError: none is named, there is no such checkpoint, or it does not know a class of the data.
        """
        if not self.checkpoint:
            raise ValueError("no teacher is named: `steadydetr distill RECIPE --teacher CHECKPOINT`, or --teachers.teacher.checkpoint")
        try:
            loaded = load_detector(self.checkpoint)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the teacher: {error}") from error
        detector, mark = loaded.detector, fingerprint(loaded.detector)
        score_classes(loaded, loaded.card.classes[:classes] if isinstance(classes, int) else classes, self.checkpoint)
        if detector.num_classes != student.num_classes:
            raise ValueError(f"the teacher {self.checkpoint} has {detector.num_classes} classes, the student {student.num_classes}")
        return Frozen(detector, mark)

    def build_untrained(self, student: Detector, num_classes: int, architecture: Callable[[str], DetectorConfig]) -> Frozen[Detector]:
        return Frozen(architecture(self.checkpoint).without_pretrained().build(num_classes))


def score_classes(teacher: LoadedDetector, wanted: Sequence[str], name: str) -> None:
    """Reduce the teacher's scores to the classes of the data, in their order.

    Raises:
        ValueError: it does not know one of them. `name` is what the message calls the teacher, its checkpoint.
    """
    theirs = teacher.card.classes  # D-42
    if unknown := [label for label in wanted if label not in theirs]:
        raise ValueError(
            f"the teacher {name} knows the classes {list(theirs)[:20]}, but not {unknown[:20]} of the data:"
            " it must have been trained on all of them"
        )
    if theirs != tuple(wanted):
        teacher.detector.keep_classes([theirs.index(label) for label in wanted])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, by which a resumed run checks that its teacher is the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
