"""Teachers: detectors that a student learns from, and what they say of a batch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from steadydetr.checkpoints.folder import LoadedDetector, load_detector
from steadydetr.detectors import Detector
from steadydetr.kinds import register
from steadydetr.learning.matching import query_of_targets
from steadydetr.structures import MatchResult, Memory, Queries, Stages

Model = TypeVar("Model", bound=nn.Module)
HORIZON = 0.028  # of a run, in steps: what decay 0.9996 is of OD-DETR's 12 epochs (2,500 of 89,000)
Counterparts = Literal["token", "rank"]


class Frozen(nn.Module, Generic[Model]):
    """A detector that teaches: always in evaluation mode and without gradients, whatever `train()` is asked."""

    def __init__(self, model: Model, fingerprint: str = "") -> None:
        super().__init__()
        self.model: Model = model.requires_grad_(False).eval()
        self.fingerprint = fingerprint  # of its weights

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


@register("ema-teacher")
@dataclass(frozen=True)
class EMATeacher:
    """The average of the student's weights as its teacher (OD-DETR)."""

    decay: float | None = None  # 0.9996 in the paper; None: a horizon of 2.8% of the run's steps  # D-31
    stop_update: bool = True  # frozen from the first drop of the learning rate; no drop, no stop  # D-32

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"teachers.ema.decay = {self.decay} must lie in 0 <= decay < 1; None: a horizon of 2.8% of the run")

    @property
    def name(self) -> str:
        return "ema"

    def decay_for(self, total_steps: int | None) -> float:
        """The decay of a run of so many steps; None: of unknown length."""
        if self.decay is not None:
            return self.decay
        return 0.9996 if total_steps is None else max(1 - 1 / (HORIZON * total_steps), 0.0)

    def build(self, student: Detector, classes: int | Sequence[str], total_steps: int | None) -> Average[Detector]:
        return Average(student, self.decay_for(total_steps))


@register("trained-teacher")
@dataclass(frozen=True)
class TrainedTeacher:
    """A detector that was trained before, and is frozen (DETRDistill): of any architecture, as long as it knows the classes."""

    checkpoint: str = ""  # a run, of which the best is taken, a checkpoint folder, or a converted checkpoint

    @property
    def name(self) -> str:
        return "teacher"

    def build(self, student: Detector, classes: int | Sequence[str], total_steps: int | None) -> Frozen[Detector]:
        """Its class scores in the order of the data, where it knows more classes (COCO's raw ids) or has them in another order.

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


def score_classes(teacher: LoadedDetector, wanted: Sequence[str], name: str) -> None:
    """From here on the teacher scores the classes of the data alone, in their order.

    Raises:
        ValueError: it does not know one of them; calls it by `name`, its checkpoint.
    """
    theirs = teacher.card.classes  # D-42
    if unknown := [kind for kind in wanted if kind not in theirs]:
        raise ValueError(
            f"the teacher {name} knows the classes {list(theirs)[:20]}, but not {unknown[:20]} of the data:"
            " it must have been trained on all of them"
        )
    if theirs != tuple(wanted):
        teacher.detector.keep_classes([theirs.index(kind) for kind in wanted])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, by which a resumed run knows its teacher again."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says of a batch, without gradients; its match with the targets is in folded indices."""

    memory: Memory
    queries: Queries
    stages: Stages
    solved: MatchResult

    def holders(self, stages: Sequence[int]) -> Tensor:
        """[K, G] the teacher's query of every object at K of its stages, -1: none."""
        query = query_of_targets(self.solved.match, len(self.solved.cost)).view(len(self.stages.logits), -1)
        return torch.stack([query[stage] for stage in stages])

    def counterparts(self, student: Queries, by: Counterparts) -> Tensor:
        """[B, N] the student's query that is the counterpart of each of the teacher's, -1: none.

        Queries of two-stage detectors are counterparts by the encoder token that they come from, or by rank; learned ones by number (D-28).
        """
        images, mine = self.queries.content.shape[:2]
        theirs = student.content.shape[1]
        device = self.queries.content.device
        if by == "rank" or student.token is None or self.queries.token is None:
            number = torch.arange(mine, device=device)
            return torch.where(number < theirs, number, -1).expand(images, -1)
        place = torch.full(self.memory.tokens.shape[:2], -1, device=device)
        place.scatter_(1, student.token, torch.arange(theirs, device=device).expand(images, -1))
        return place.gather(1, self.queries.token)
