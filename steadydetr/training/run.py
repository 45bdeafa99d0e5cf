"""A run while it trains: what it is made of, where it is, and how that is saved and restored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import load_progress, load_training_state
from steadydetr.data import Dataset, EvalLoader, TrainLoader
from steadydetr.detectors import Detector
from steadydetr.files import one_line
from steadydetr.finite import NotFiniteError, tensors_in, where_not_finite
from steadydetr.objectives.method import Method
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import AVERAGE, LAST, RunFolder
from steadydetr.runs.lock import FolderLock
from steadydetr.runs.sinks import RunLog
from steadydetr.structures import Batch
from steadydetr.training.averages import Averages
from steadydetr.training.processes import MainWork
from steadydetr.training.progress import Progress


@dataclass
class State:
    """Where the run is; saved with every checkpoint."""

    step: int = 0  # optimiser steps done
    epochs_done: int = 0  # trained and evaluated
    images_seen: int = 0
    seconds: float = 0.0  # of training, without evaluation
    best_ap: float = -1.0
    best_epoch: int = 0  # after which that was measured; 0: unknown, in runs of version 0.1
    best_weights: str = ""  # of which: "model" or "ema"
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # the latest, of "model" and "ema"
    matched: dict[str, Tensor] = field(default_factory=dict)  # [G] the query of every held-out object at the latest evaluation


@dataclass
class Run:
    """Everything that the loop needs. Each process has its own; `folder` is written by the main process alone."""

    recipe: Recipe
    folder: RunFolder
    lock: FolderLock
    accelerator: Accelerator
    main_work: MainWork
    val_data: Dataset
    loader: TrainLoader
    val_loader: EvalLoader  # this process's share of `val_data`
    method: Method
    wrapped: nn.Module  # the method, or DistributedDataParallel around it
    optimiser: torch.optim.AdamW
    averages: Averages
    state: State
    log: RunLog
    progress: Progress
    asked_to_stop: bool = False  # by a signal to this process
    stop: bool = False  # all processes know that one of them was asked
    loud: set[str] = field(default_factory=set)  # the objectives of which was said that they take most of a gradient
    batches: list[Batch] = field(default_factory=list)  # this process's micro-batches of the step that is taken, or was taken last

    @property
    def models(self) -> dict[str, Detector]:
        """What is evaluated: the trained weights ("model") and, where there is one, their average ("ema")."""
        average = self.averages.evaluated
        return {"model": self.method.student} | ({} if average is None else {"ema": average.model})

    @property
    def card(self) -> DetectorCard:
        """What is saved beside the weights of a checkpoint."""
        index, recipe = self.val_data.index, self.recipe
        return DetectorCard(recipe.detector, index.classes, index.category_ids, recipe.data.resize, recipe.top, recipe.nms)


def save(run: Run, name: str, weights: str = "model") -> None:
    """Write the checkpoint `name`, from which the run can be resumed. Before `last`, the averaged weights are written as `ema`.

    Only `last` is checked for numbers that are not finite, because `best` is always written after it, of the same step.

    Args:
        weights: which weights the checkpoint's detector has: the trained ones ("model") or their average ("ema").

    Raises:
        NotFiniteError: what would be saved is not finite. The checkpoint is as it was.
    """
    changed = changed_by_training(run)
    if name == LAST and (found := where_not_finite(dict(tensors_in(changed)))):
        raise NotFiniteError(f"{found} of the weights and of the optimiser's state are not finite")
    if run.accelerator.is_main_process:
        average = run.averages.evaluated
        if name == LAST and average is not None:
            run.folder.save_checkpoint(AVERAGE, average.model.state_dict(), run.card)
        state = run.models[weights].state_dict()
        run.folder.save_checkpoint(name, state, run.card, changed | {"teachers": run.method.fingerprints}, asdict(run.state))
    run.main_work.wait()


def save_progress(run: Run) -> None:
    """Replace the progress in `last`, after an evaluation of the weights that it holds."""
    if run.accelerator.is_main_process:
        run.folder.save_progress(LAST, asdict(run.state))
    run.main_work.wait()


def changed_by_training(run: Run) -> dict[str, Any]:
    """The tensors that a step changes: the weights of the method, the average that is evaluated, and the optimiser's state."""
    average, teacher = run.averages.evaluated, run.averages.teacher
    return {
        "method": run.method.training_state(),
        "average": None if average is None or average is teacher else average.model.state_dict(),  # None: there is none, or it teaches
        "optimiser": run.optimiser.state_dict(),
    }


@dataclass(frozen=True)
class Saved:
    """What `save` wrote, and what is known of the run's `best`."""

    checkpoint: Path
    training: dict[str, Any]  # as `load_training_state` gives it
    progress: dict[str, Any]
    best: dict[str, Any] | None  # the progress that `best` was saved with; None: there is none


def read_saved(checkpoint: Path, best: dict[str, Any] | None) -> Saved:
    """Read the training state and the progress of a checkpoint; `best` is what `RunFolder.best_progress` gave."""
    return Saved(checkpoint, load_training_state(checkpoint), load_progress(checkpoint), best)


def restore(saved: Saved, method: Method, averages: Averages, optimiser: torch.optim.Optimizer) -> State:
    """Load what was saved into the method, the averages and the optimiser; gives the state.

    The AP to surpass is that of `best`, whatever the checkpoint knew of it. Without a `best` the next evaluation gives one.

    Raises:
        ValueError: a trained teacher has other weights than the one that taught until then.
    """
    training = saved.training
    for name, fingerprint in method.fingerprints.items():  # before the weights, which may not fit if the teacher has another width
        if fingerprint != training.get("teachers", {}).get(name, ""):
            raise ValueError(
                f"{saved.checkpoint} was taught by another {name}: the weights of the one that is given now, or the matching cost of its"
                " run, differ. A run keeps its teacher, wherever that lies: name it by --teacher, or put its old weights back"
            )
    try:
        method.load_training_state(training["method"])
        optimiser.load_state_dict(training["optimiser"])
        if training["average"] is not None:
            averages.separate()
            if averages.evaluated is not None:
                averages.evaluated.model.load_state_dict(training["average"])
        best = saved.best or asdict(State())
        names = ("best_ap", "best_epoch", "best_weights")
        return replace(State(**saved.progress), **{name: best[name] for name in names if name == "best_ap" or name in best})
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # as torch does for what does not fit
        raise ValueError(f"{saved.checkpoint} does not fit its run, or is damaged: {one_line(error, 500)}") from error
