"""A recipe: everything that a training run is made of, as plain frozen dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.checkpoints.start import Start
from steadydetr.config import check_within
from steadydetr.data import DataConfig
from steadydetr.detectors import DetectorConfig
from steadydetr.kinds import PACKAGE, changeable, normal, register
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.teachers import Teacher
from steadydetr.objectives import Objective
from steadydetr.runs.sinks import Sink
from steadydetr.runs.training_config import TrainingConfig

if TYPE_CHECKING:
    from steadydetr.detectors import Detector
    from steadydetr.objectives.method import Method

# by what the command line calls them; what takes a `method`, as recipes/desk.py, can be trained by another than its own
RECIPES: dict[str, Callable[..., Recipe]] = {}


def recipe(function: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """Enter a function into the list of recipes, by its name with hyphens; one of a package mylab is called `mylab:its-name`."""
    package, name = function.__module__.partition(".")[0], normal(function.__name__)
    full = name if package == PACKAGE else f"{package}:{name}"
    before = RECIPES.get(full)
    if before is not None and (before.__module__, before.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(f"two functions, in {before.__module__} and in {function.__module__}, make a recipe called {full}")
    RECIPES[full] = function
    return function


@register("recipe")
@dataclass(frozen=True)
class Recipe:
    name: str
    detector: DetectorConfig
    criterion: Criterion
    objectives: tuple[Objective, ...]
    data: DataConfig
    training: TrainingConfig
    start: Start = Start()  # trained weights to start from
    teachers: tuple[Teacher, ...] = ()  # whom objectives learn from, by their names
    top: int = 300  # detections kept of an image
    nms: float | None = None  # IoU of class-wise suppression after that; None: none, as DETRs are meant to be
    reported: str = changeable("")  # what the paper or the original code reports for it
    notes: str = changeable("")  # one line on what it is, with its source
    sinks: tuple[Sink, ...] = changeable(())  # where the numbers of the run go besides the console and metrics.jsonl

    def __post_init__(self) -> None:
        check_within("", self, top=(1, 10**6), nms=(0, 1))

    def build(self, classes: int | Sequence[str], total_steps: int | None = None, student: Detector | None = None) -> Method:
        """The detector and its training method.

        Args:
            classes: of the data set, whose names a trained teacher must know; or only their number.
            total_steps: of the run, from which the decay of an averaged teacher may be computed; None: unknown.
            student: the detector, if it is there already; `build_student` makes one otherwise, with random weights.
        """
        from steadydetr.objectives.method import Method

        student = student or self.build_student(classes if isinstance(classes, int) else len(classes))
        teachers = {teacher.name: teacher.build(student, classes, total_steps) for teacher in self.teachers}
        own = {teacher.name: self.criterion_of(teacher) for teacher in self.teachers if teacher.checkpoint}
        criteria = {name: criterion for name, criterion in own.items() if criterion.matcher != self.criterion.matcher}
        method = Method(student, self.criterion, self.objectives, teachers, criteria)
        if method.ema is not None:  # objectives may have changed the initial weights, as teacher-init does
            method.ema.model.load_state_dict(student.state_dict())
        return method

    def build_student(self, num_classes: int) -> Detector:
        """The detector with the weights that it has before those of `start` are loaded."""
        return self.start.config_to_build(self.detector).build(num_classes)

    def criterion_of(self, teacher: Teacher) -> Criterion:
        """What a teacher that was trained before is matched by: the criterion of its run, or that of this recipe where it has none."""
        from steadydetr.runs.folder import run_criterion

        try:
            folder = find_checkpoint(Path(teacher.checkpoint).expanduser())
        except FileNotFoundError:  # it is no checkpoint of ours
            return self.criterion
        return run_criterion(folder, self.criterion)  # D-36
