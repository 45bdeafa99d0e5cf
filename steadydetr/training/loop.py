"""The training loop. It reads like what it does: prepare, then for every epoch train, evaluate, save.

Random numbers of a step are seeded by (seed, step, process), so a resumed run needs no generator states.
"""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch

from steadydetr.config import NETWORK_PLACE
from steadydetr.finite import prefix_errors
from steadydetr.metrics.table import SUMMARY_NAMES
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import BEST, CONFIG, LAST
from steadydetr.structures import seed_of
from steadydetr.training.log import SHARE, log_evaluation, log_step, remark_on_shares
from steadydetr.training.not_finite import keep_not_finite_batches
from steadydetr.training.optimiser import rate_factor, set_rate
from steadydetr.training.pictures import draw_pictures
from steadydetr.training.precision import tf32_on_gpus
from steadydetr.training.preparation import prepare
from steadydetr.training.processes import any_process, report_lost_process
from steadydetr.training.run import Run, save, save_progress
from steadydetr.training.signals import stop_on_signal
from steadydetr.training.step import synchronise_step, train_step
from steadydetr.training.validation import evaluate_detector, measure_stability


def train(recipe: Recipe, output: str | Path, resume: bool | Literal["auto"] = False, device: str | None = None) -> dict[str, Any]:
    """Train a recipe in the folder `output`; returns what summary.json says.

    Args:
        resume: go on from `output`'s last checkpoint; "auto": go on if there is a run in `output`, start one if not.
        device: "cpu", "cuda", "cuda:1" (of one process), "mps"; "auto" or None for a GPU if there is one.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before training, where data, recipe or folder cannot work.
        FloatingPointError: losses, costs, gradients, weights or detections are not finite; see `not_finite`.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"train takes a Recipe, not {recipe!r:.60}: steadydetr.find('quickstart') gives one")
    with torch.random.fork_rng(), tf32_on_gpus(recipe.training.tf32):  # the caller's own draws do not depend on the seeds of the steps
        return _train(recipe, output, resume, device)


def _train(recipe: Recipe, output: str | Path, resume: bool | Literal["auto"], device: str | None) -> dict[str, Any]:
    run = prepare(recipe, Path(output).expanduser(), resume, device)
    with report_lost_process(run.accelerator), run.lock, closing(run.log), closing(run.loader), closing(run.val_loader):
        with stop_on_signal(run), run.progress, keep_not_finite_batches(run):
            for epoch in range(run.state.epochs_done, recipe.training.epochs):
                if no_better(run):
                    break
                train_epoch(run, epoch)
                save(run, LAST)  # before the evaluation, so that nothing is lost whatever happens during it
                if not run.stop:
                    evaluate(run, epoch)
                if run.stop:
                    return interrupted(run)
        return finish(run)


def train_epoch(run: Run, epoch: int) -> None:
    """Train from `run.state.step` to the end of the epoch, or to the end of the step in which the run is asked to stop."""
    config, state, per_epoch = run.recipe.training, run.state, run.loader.steps_per_epoch
    run.wrapped.train()
    clock, shares = time.perf_counter(), defaultdict[str, list[float]](list)
    for local in run.loader.epoch(epoch, state.step - epoch * per_epoch, lambda: run.asked_to_stop):
        run.stop, batches = synchronise_step(run, local)
        if run.stop:
            break
        rate = set_rate(run.optimiser, rate_factor(state.step, per_epoch, config), config)
        torch.manual_seed(seed_of(config.seed, state.step, run.accelerator.process_index))
        result = train_step(run, batches)
        for measure, value in result.measures.items():
            if measure.endswith(SHARE):
                shares[measure.removesuffix(SHARE)].append(value)
        now = time.perf_counter()
        speed, clock, state.seconds = run.loader.batch_size / (now - clock), now, state.seconds + now - clock
        state.step += 1
        state.images_seen += run.loader.batch_size
        if state.step % config.log_every == 0 or state.step % per_epoch == 0:
            log_step(run, result, rate, epoch, speed)
        run.progress.step(state.step, speed)
        if state.step in config.stability_steps and state.step % per_epoch:  # the evaluation after an epoch measures it anyway
            measure_stability(run)
        if config.save_every and state.step % config.save_every == 0 and state.step % per_epoch:
            save(run, LAST)
    remark_on_shares(run, epoch, shares)
    run.stop = any_process(run.accelerator, run.asked_to_stop)


def evaluate(run: Run, epoch: int) -> None:
    """After an epoch: evaluate the trained and the averaged weights if it is time to, and save `best` if AP is the highest yet.

    `best` is saved together with its AP, and the progress in `last` after it. If the program is killed between the two, the resumed run
    repeats the evaluation, because the progress in `last` does not contain it, and takes the AP to surpass from `best`.
    """
    config, state = run.recipe.training, run.state
    state.epochs_done = epoch + 1
    best = None
    if state.epochs_done % config.eval_every == 0 or state.epochs_done == config.epochs:
        for weights, detector in run.models.items():
            with prefix_errors(f"evaluating {weights}"):
                evaluation = evaluate_detector(run, detector)
            if evaluation is None:
                state.epochs_done, run.stop = epoch, True
                return
            state.evaluations[weights] = evaluation.as_dict()
            log_evaluation(run, weights, evaluation)
            if evaluation.ap > state.best_ap:
                state.best_ap, state.best_epoch, state.best_weights, best = evaluation.ap, state.epochs_done, weights, weights
        state.matched = measure_stability(run)
    if best is not None:
        save(run, BEST, best)
    save_progress(run)
    run.stop = any_process(run.accelerator, run.asked_to_stop)


def no_better(run: Run) -> bool:
    """Whether the last `training.patience` evaluations were not better than the best before, which is said."""
    config, state = run.recipe.training, run.state
    waited = (state.epochs_done - state.best_epoch) // config.eval_every
    if not config.patience or state.best_ap <= 0 or waited < config.patience:
        return False
    run.log.say(f"AP has not risen for {waited} evaluations, as many as training.patience allows: best is that of epoch {state.best_epoch}")
    return True


def interrupted(run: Run) -> dict[str, Any]:
    """Tell the user how to go on with a run that was asked to stop; gives a short summary."""
    folder = run.folder.path
    again = shlex.join(["steadydetr", "train", str(folder / CONFIG), "--output", str(folder), "--resume"])
    other = "" if NETWORK_PLACE.match(run.recipe.start.weights) else f", or with: {again}"  # a file may not name such a place
    run.log.say(f"Stopped and saved at step {run.state.step}. Go on with the same command and --resume{other}")
    return {"finished": False, "step": run.state.step, "output": str(folder)}


def finish(run: Run) -> dict[str, Any]:
    """Write the summary and draw the pictures; gives the summary."""
    summary = summarise(run)
    if run.accelerator.is_main_process:
        run.folder.write_summary(summary)
        run.log.say("Drawing pictures")
        draw_pictures(run)
    return summary


def summarise(run: Run) -> dict[str, Any]:
    """The content of summary.json; the metrics are those of the last evaluation."""
    state = run.state
    summary: dict[str, Any] = {
        "finished": True,
        "recipe": run.recipe.name,
        "step": state.step,
        "epochs": state.epochs_done,
        "images_seen": state.images_seen,
        "seconds": round(state.seconds, 1),
        "best_ap": state.best_ap,
        "best_weights": state.best_weights,
        "best_epoch": state.best_epoch,
        "output": str(run.folder.path),
    }
    for weights, evaluation in state.evaluations.items():
        prefix = "" if weights == "model" else f"{weights}_"
        summary |= {f"{prefix}{name}": evaluation[name] for name in SUMMARY_NAMES if name in evaluation}
    return summary
