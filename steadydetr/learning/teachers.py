"""Teachers: detectors that a student learns from, and their configs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.checkpoints.official import check_weights
from steadydetr.kinds import changeable, register

if TYPE_CHECKING:
    from steadydetr.checkpoints.folder import LoadedDetector
    from steadydetr.detectors.base import Detector, DetectorConfig
    from steadydetr.learning.frozen import Average, Frozen

HORIZON = 0.028  # share of a run's steps that an average reaches back: 1 / (1 - 0.9996) = 2,500 of the 89,000 steps of OD-DETR's 12 epochs


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

    def check(self) -> None:  # noqa: B027
        """Raise ValueError or FileNotFoundError where what it is made of is not there, which is told before anything begins."""

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
        from steadydetr.learning.frozen import Average

        return Average(student, self.decay_for(total_steps))

    def build_untrained(self, student: Detector, num_classes: int, architecture: Callable[[str], DetectorConfig]) -> Average[Detector]:
        from steadydetr.learning.frozen import Average

        return Average(student, self.decay_for(None))


@register("trained-teacher")
@dataclass(frozen=True)
class TrainedTeacher(Teacher):
    """A detector that was trained before, and is frozen (DETRDistill): of any architecture, as long as it knows the classes."""

    trained_before = True
    checkpoint: str = changeable("")  # a run, a checkpoint of ours or of another project, hub:owner/name, or a name of `steadydetr weights`
    classes: tuple[str, ...] = ()  # theirs=ours, for classes that the data call otherwise

    @property
    def name(self) -> str:
        return "teacher"

    def check(self) -> None:
        if not self.checkpoint:
            raise ValueError("no teacher is named: `steadydetr distill RECIPE --teacher CHECKPOINT`, or --teachers.teacher.checkpoint")
        try:
            check_weights(self.checkpoint)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"the teacher: {error}") from error

    def build(self, student: Detector, classes: int | Sequence[str], total_steps: int | None) -> Frozen[Detector]:
        """The detector in the checkpoint, whose class scores are reduced to the data's classes and brought into their order.

        Raises:
            ValueError, FileNotFoundError: none is named, there is no such checkpoint, or it does not know a class of the data.
        """
        from steadydetr.checkpoints.weights import read_weights
        from steadydetr.learning.frozen import Frozen, fingerprint

        self.check()
        loaded = read_weights(self.checkpoint).build()
        detector, mark = loaded.detector, fingerprint(loaded.detector)
        score_classes(loaded, loaded.card.classes[:classes] if isinstance(classes, int) else classes, self.checkpoint, self.classes)
        if detector.num_classes != student.num_classes:
            raise ValueError(f"the teacher {self.checkpoint} has {detector.num_classes} classes, the student {student.num_classes}")
        return Frozen(detector, mark)

    def build_untrained(self, student: Detector, num_classes: int, architecture: Callable[[str], DetectorConfig]) -> Frozen[Detector]:
        from steadydetr.learning.frozen import Frozen

        return Frozen(architecture(self.checkpoint).without_pretrained().build(num_classes))


def score_classes(teacher: LoadedDetector, wanted: Sequence[str], name: str, renamed: Sequence[str] = ()) -> None:
    """Reduce the teacher's scores to the classes of the data, in their order; they are matched by name, as `match_classes` does.

    Raises:
        ValueError: it does not know one of them. `name` is what the message calls the teacher, its checkpoint.
    """
    from steadydetr.checkpoints.transfer import match_classes

    theirs = teacher.card.classes  # D-42
    match = match_classes(theirs, wanted, renamed)
    if match.started:
        raise ValueError(
            f"the teacher {name} knows the classes {list(theirs)[:20]}, but not {list(match.started)[:20]} of the data: it must have been"
            " trained on all of them. One that it calls otherwise is named by --teachers.teacher.classes theirs=ours"
        )
    labels = [label for _, label in match.pairs]
    if labels != list(range(len(theirs))):
        teacher.detector.keep_classes(labels)
