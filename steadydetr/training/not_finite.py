"""NaN and infinite numbers stop a run before a weight or a checkpoint changes, and the batch is saved, so that it can be run again.

Checked are the costs of the matching, the losses and the gradient of every step before the weights change, all that is about to be
saved, and detections before they are measured. Each check raises NotFiniteError. `keep_not_finite_batches`, around the whole run, adds
the step and the likely cause to its message and saves the batch and the weights in a file that `replay` reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadydetr.config import FORMAT, check_format
from steadydetr.detectors import Detector
from steadydetr.files import one_line, replacing
from steadydetr.finite import NotFiniteError, images_named, tensors_in, where_not_finite
from steadydetr.learning.predictions import match_batch
from steadydetr.metrics.evaluation import collect, prediction_function
from steadydetr.objectives.method import Method
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import LAST, RunFolder
from steadydetr.runs.models import average_state
from steadydetr.runs.training_config import TrainingConfig
from steadydetr.structures import Batch, Losses, Targets, Totals, seed_of
from steadydetr.tensor_files import read_pickled
from steadydetr.training.optimiser import gradient_norm
from steadydetr.training.precision import autocast
from steadydetr.training.run import Run, changed_by_training

MOST_RUN_ALONE = 32  # images of a batch that are run one by one, to find those that are not finite alone too
STATISTICS = ("running_mean", "running_var")  # of batch norm; a training step writes the student's and does not read them


# A run that stops


def check_step(run: Run, losses: Sequence[Mapping[str, float]], norm: float) -> None:
    """Raise NotFiniteError if a loss of one of the step's micro-batches, or the norm of the gradient, is not finite."""
    for batch, values in zip(run.batches, losses, strict=True):
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            what = f"the loss {', '.join(bad)} is not finite for {images_named(batch.image_ids)}"
            raise NotFiniteError(what + (_alone(run, batch) if _may_run_again(run) else ""), batch)
    if math.isfinite(norm):
        return
    where = where_not_finite({name: p.grad for name, p in run.method.named_parameters() if p.grad is not None})
    run.optimiser.zero_grad(set_to_none=True)  # running the step again needs the memory
    if not where:
        raise NotFiniteError(f"the norm of the gradient, {norm}, is beyond float32, though each of its numbers is finite", run.batches[0])
    raise NotFiniteError(f"the gradient is not finite in {where}{_loss_of_gradient(run) if _may_run_again(run) else ''}", run.batches[0])


def _may_run_again(run: Run) -> bool:
    """Whether to run the step again to find the cause: none is known yet, no other process is needed, and nothing has to be compiled."""
    shared = run.recipe.training.sync_batch_norm and run.accelerator.num_processes > 1
    return not (shared or run.recipe.training.compile or _cause(run, run.batches, training=True))


def _alone(run: Run, batch: Batch) -> str:
    """The part of a message that names the images which are not finite when they are run alone."""
    found = _rerun(run).images_alone(batch) if len(batch.image_ids) > 1 else []
    named = "each of them" if len(found) == len(batch.image_ids) else images_named(found)
    return f" ({named} alone too)" if found else ""


def _loss_of_gradient(run: Run) -> str:
    """The part of a message that names the loss and the images whose gradient is not finite."""
    with suppress(RuntimeError):  # such as too little memory, because this needs more than a step
        if found := _rerun(run).bad_gradient(run.batches):
            batch, names = found
            return f": that of the loss {', '.join(names) or 'in total'} for {images_named(batch.image_ids)}{_alone(run, batch)}"
        if run.accelerator.num_processes > 1:
            return ", because of what another process added to it"
        return ", though it is finite when the step is run again"
    return ""


def _rerun(run: Run) -> Rerun:
    accelerator = run.accelerator
    return Rerun(run.method, accelerator.device, run.recipe.training, accelerator.process_index)


@contextmanager
def keep_not_finite_batches(run: Run) -> Iterator[None]:
    """Within the block, a NotFiniteError becomes a FloatingPointError that names step and cause, and the batches are saved for `replay`."""
    try:
        yield
    except NotFiniteError as error:
        raise FloatingPointError(_explain_and_keep(run, error)) from error


def _explain_and_keep(run: Run, error: NotFiniteError) -> str:
    """Save the batches that led to the error, and give the message that the run stops with.

    The batches are those of the current step, or the one batch of an evaluation.
    """
    process, last = run.accelerator.process_index, run.folder.path / LAST
    in_step = error.batch is not None and error.batch.totals is not None  # only batches of a step have totals
    step = run.state.step + in_step
    if error.batch is None:
        cause, kept = "", _keep(run, run.batches, step, training=True)
    elif in_step:
        cause, kept = _cause(run, run.batches, training=True), _keep(run, run.batches, step, training=True)
    else:
        cause, kept = _cause(run, [error.batch], training=False), _keep(run, [error.batch], step, training=False)
    where = f"process {process}, step {step}" if run.accelerator.num_processes > 1 else f"step {step}"
    safe = f" {last} stays as it was." if last.exists() else ""
    return f"{where}: {error}.{cause} {kept}{safe} Lower training.lr or training.clip, warm up longer, and check the data"


def _cause(run: Run, batches: Sequence[Batch], training: bool) -> str:
    """A sentence on what was not finite already before the step: pixels, boxes or weights; "" if all were finite."""
    images = [image for batch in batches for image in batch.split()]
    for what, tensor in (("pixels", lambda image: image.images), ("boxes", lambda image: image.targets.boxes)):
        if ids := [image.image_ids[0] for image in images if not tensor(image).isfinite().all()]:
            return f" Not finite are the {what} of {images_named(ids)}."
    weights = dict(tensors_in({name: value for name, value in changed_by_training(run).items() if name != "optimiser"}))
    if training:
        weights = {name: value for name, value in weights.items() if not (".student." in name and name.endswith(STATISTICS))}
    found = where_not_finite(weights)
    return f" Not finite were the weights before it: {found}." if found else ""


def _keep(run: Run, batches: Sequence[Batch], step: int, training: bool) -> str:
    """Save what `replay` needs; gives a sentence that says where, or why it could not be saved."""
    process = run.accelerator.process_index
    path = run.folder.not_finite_path(step, process)
    content = {
        "format": FORMAT,
        "training": training,
        "process": process,
        "device": run.accelerator.device.type,
        "batches": [_plain(batch.to("cpu")) for batch in batches],
        **{name: value for name, value in changed_by_training(run).items() if name != "optimiser"},
    }
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        return f"Batch and weights could not be saved: {one_line(error, 300).rstrip('.')}."
    return f"Batch and weights are in {path}; `steadydetr.replay` runs them again."


# Running it again


@dataclass(frozen=True)
class ReplayFile:
    """The content of a not-finite-stepN-processK.pt."""

    batches: list[Batch]  # of a step in this process, or the one of an evaluation
    method: dict[str, Tensor]  # its training state
    training: bool = True  # False: of an evaluation
    average: dict[str, Tensor] | None = None  # the averaged weights; None: there are none, or they are the teacher's
    process: int = 0
    device: str = "cpu"  # its type


@dataclass(frozen=True)
class Rerun:
    """Computes a step of one process again, with the same random numbers, without changing a weight."""

    method: Method
    device: torch.device
    config: TrainingConfig
    process: int

    def losses(self, batches: Sequence[Batch]) -> Iterator[Losses]:
        """The losses of the micro-batches, one after the other."""
        self.method.train()
        for number, batch in enumerate(batches):
            if number == 0:
                torch.manual_seed(seed_of(batch.seed, batch.step, self.process))
            with autocast(self.config, self.device):
                losses = self.method(batch.to(self.device))
            yield losses

    def gradient(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradient of every parameter that the loss depends on. It is added to nothing, so that no other process takes part."""
        parameters = {name: parameter for name, parameter in self.method.named_parameters() if parameter.requires_grad}
        found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

    def values(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The weighted losses of the step, by name, and the norm of their gradient as "gradient_norm"."""
        sums: dict[str, float] = {}
        gradients: dict[str, Tensor] = {}
        for losses in self.losses(batches):
            for name, value in losses.weighted().items():
                sums[name] = sums.get(name, 0.0) + float(value)
            for name, gradient in self.gradient(losses.total).items():
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return sums | ({"gradient_norm": float(gradient_norm(list(gradients.values())))} if gradients else {})

    def images_alone(self, batch: Batch) -> list[int | str]:
        """The ids of the images whose losses or gradient are not finite when run alone, of the first `MOST_RUN_ALONE`."""
        found: list[int | str] = []
        for image in batch.split()[:MOST_RUN_ALONE]:
            try:
                finite = all(map(math.isfinite, self.values([image]).values()))
            except NotFiniteError:
                finite = False
            except (RuntimeError, ValueError):  # batch norm, for example, learns nothing from a single value
                finite = True
            if not finite:
                found += image.image_ids
        return found

    def bad_gradient(self, batches: Sequence[Batch]) -> tuple[Batch, list[str]] | None:
        """The first micro-batch whose gradient is not finite, and the losses whose gradient it is; None: all are finite."""
        for batch, losses in zip(batches, self.losses(batches), strict=True):
            if where_not_finite(self.gradient(losses.total)):
                terms = {name: values.sum() * weight for name, values, weight in losses if values.requires_grad}
                return batch, [name for name, loss in terms.items() if where_not_finite(self.gradient(loss))]
        return None


def replay(run_folder: str | Path, saved: str | Path, device: str | None = None) -> dict[str, float]:
    """Run again what a run saved when something was not finite: the same batches, weights and random numbers.

    Args:
        run_folder: of the run, whose recipe is used.
        saved: not-finite-stepN-processK.pt in it.
        device: "cpu" or "cuda"; None: that of the run where there is one. The random numbers of dropout differ between the two.

    Returns:
        The weighted losses of the step, by name, and the norm of their gradient, "gradient_norm"; of several processes, the part of the
        one that saved the file. An empty dictionary where detections of an evaluation were not finite, and now are.

    Raises:
        FloatingPointError: costs of the matching or detections are not finite, as they were in the run.
        FileNotFoundError, ValueError: there is no such file, or it is damaged or something else.
    """
    config, kept = RunFolder(Path(run_folder)).read_config(), _read(Path(saved))
    recipe: Recipe = config.recipe()
    usual = "cuda" if kept.device == "cuda" and torch.cuda.is_available() else "cpu"
    place = torch.device(device or usual)
    method = replace(recipe, detector=recipe.detector.without_pretrained()).build(config.classes)
    method.load_training_state(kept.method)
    method.to(place)
    if kept.training:
        return Rerun(method, place, recipe.training, kept.process).values(kept.batches)
    _detect(method.student, recipe, kept.batches, place)
    if (average := average_state({"method": kept.method, "average": kept.average})) is not None:
        method.student.load_state_dict(average)
        _detect(method.student, recipe, kept.batches, place)
    return {}


def _detect(detector: Detector, recipe: Recipe, batches: Sequence[Batch], device: torch.device) -> None:
    """Detect and match as an evaluation does; a NotFiniteError says what is not finite."""
    detector.eval()
    with autocast(recipe.training, device):
        collect(prediction_function(detector, device, recipe.top, recipe.nms), batches)
    for batch in batches:
        match_batch(detector, recipe.criterion, batch.to(device))


def _plain(batch: Batch) -> dict[str, Any]:
    """The batch as tensors and plain values, so that the file can be read without running code."""
    return vars(batch) | {"targets": vars(batch.targets), "totals": batch.totals and vars(batch.totals)}


def _from_plain(plain: Mapping[str, Any]) -> Batch:
    return Batch(**{**plain, "targets": Targets(**plain["targets"]), "totals": plain["totals"] and Totals(**plain["totals"])})


def _read(path: Path) -> ReplayFile:
    """What `_keep` saved, or version 0.1: a single `Batch` with its weights. No code in the file is run.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is damaged or something else; names it.
    """
    content = read_pickled(path, (Batch, Targets, Totals))
    try:
        check_format(content, str(path))
        if isinstance(content.get("batch"), Batch):
            return ReplayFile([content["batch"]], content["method"])
        return ReplayFile([_from_plain(batch) for batch in content.pop("batches")], **{k: v for k, v in content.items() if k != "format"})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as the batch and the weights of a run that stopped ({type(error).__name__}):"
            " give the not-finite-step*.pt of the run, whole and unchanged"
        ) from error
