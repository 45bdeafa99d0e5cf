"""Evaluation of a run on its validation images, and measurement of how stable its matching is there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from steadydetr.detectors import Detector
from steadydetr.detectors.base import evaluating
from steadydetr.finite import NotFiniteError
from steadydetr.metrics.evaluation import Evaluation, collect, evaluate, prediction_function
from steadydetr.metrics.results import Results
from steadydetr.metrics.stability import held_out, measure_models
from steadydetr.runs.records import WEIGHTS_LABELS
from steadydetr.structures import Batch
from steadydetr.training.log import log_stability
from steadydetr.training.precision import autocast
from steadydetr.training.run import Run


@torch.no_grad()
def evaluate_detector(run: Run, detector: Detector) -> Evaluation | None:
    """Metrics of the detector on the validation images, which the processes share among them.

    All evaluate the main process's detector, the one that is saved: their own have other statistics of batch norm.

    A run of one process that is asked to stop leaves at once, and gives None. Several processes complete the evaluation, because those
    that left would let the others wait.

    Raises:
        NotFiniteError: detections are not finite. All processes raise it, whichever met them.
    """
    accelerator, loader = run.accelerator, run.val_loader
    weights = next((WEIGHTS_LABELS[name] for name, model in run.models.items() if model is detector), "other")
    if accelerator.num_processes > 1:
        for buffer in detector.buffers():
            torch.distributed.broadcast(buffer, src=0)
    with autocast(run.recipe.training, accelerator.device), evaluating(detector):
        predict = prediction_function(
            detector, accelerator.device, run.recipe.top, run.recipe.nms, masks=run.val_data.index.masks is not None
        )
        found: Results | NotFiniteError
        try:
            found = collect(predict, run.progress.track(until_stopped(run), f"evaluating the {weights} weights", len(loader)))
        except NotFiniteError as error:
            found = error
    if may_leave(run):
        return None
    parts: list[Any] = [found]
    if accelerator.num_processes > 1:
        parts = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(parts, found)
    for part in parts:
        if isinstance(part, NotFiniteError):
            raise part
    return evaluate(Results.cat(parts), run.val_data.index)


def until_stopped(run: Run) -> Iterator[Batch]:
    """The batches of the evaluation; they end early where `may_leave` becomes true."""
    for batch in run.val_loader.load(run.val_loader.keys, lambda: may_leave(run)):
        if may_leave(run):
            return
        yield batch


def may_leave(run: Run) -> bool:
    """Whether an evaluation may be left: the run was asked to stop, and there is no other process that would wait for this one."""
    return run.asked_to_stop and run.accelerator.num_processes == 1


def measure_stability(run: Run) -> dict[str, Tensor]:
    """Match the fixed held-out images, and log how the matches changed since those in `run.state.matched`.

    Returns:
        By weights, [G] the query of every object, for the next comparison.
    """
    config, matched = run.recipe.training, dict(run.state.matched)
    if config.stability_images and run.accelerator.is_main_process and run.val_data.index.usable().any():
        dataset = held_out(run.val_data, config.stability_images)
        measured, matched = measure_models(
            run.models, run.recipe.criterion, dataset, run.recipe.data, config.eval_batch_size, run.state.matched
        )
        for weights, found in measured.items():
            log_stability(run, weights, found)
    run.main_work.wait()
    return matched
