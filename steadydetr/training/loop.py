"""The training loop. It reads like what it does: prepare, then for every epoch train, evaluate, save.

Gradients of processes and micro-batches are summed, because losses are divided by the objects of the whole step (D-03).
Random numbers of a step are seeded by (seed, step, process), so a resumed run needs no generator states.
"""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steadydetr.config import NETWORK_PLACE
from steadydetr.data import pad_batch
from steadydetr.finite import prefix_errors
from steadydetr.metrics.table import SUMMARY_NAMES
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import BEST, CONFIG, LAST
from steadydetr.structures import Batch, Totals, seed_of
from steadydetr.training.log import SHARE, StepResult, log_evaluation, log_step, remark_on_shares
from steadydetr.training.not_finite import check_step, keep_not_finite_batches
from steadydetr.training.optimiser import clip_gradient, gradient_norm, rate_factor, set_rate
from steadydetr.training.pictures import draw_pictures
from steadydetr.training.preparation import prepare
from steadydetr.training.processes import any_process, report_lost_process
from steadydetr.training.run import Run, save, save_progress
from steadydetr.training.signals import stop_on_signal
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
    with torch.random.fork_rng():  # the caller's own draws do not depend on the seeds of the steps
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


@contextmanager
def single_values_named() -> Iterator[None]:
    """Torch's error on a batch norm that sees one value of each channel becomes one that says what to change."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "a batch norm sees a single value of each channel: one image at a time, and that small. Raise --training.batch-size, lower"
            " --training.accumulation, use fewer processes, or larger images (--data.transform)"
        ) from error


def train_step(run: Run, batches: list[Batch]) -> StepResult:
    """One optimiser step over this process's micro-batches."""
    config, accelerator = run.recipe.training, run.accelerator
    run.batches = batches
    terms: list[dict[str, Tensor]] = []
    measures: list[dict[str, Tensor]] = []
    run.optimiser.zero_grad(set_to_none=True)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(run.wrapped):
            with accelerator.autocast(), single_values_named():
                losses = run.wrapped(batch.to(accelerator.device))
            accelerator.backward(losses.total * accelerator.num_processes)  # DistributedDataParallel averages; a sum is wanted
        terms.append(losses.weighted())
        measures.append(losses.measures)  # complete after backward, because some are of the gradient
    if any(run.method.get_parameter(name).grad is not None for name in run.method.unused_parameters):
        raise ValueError("an objective uses the student's `embed` without saying so: its class needs embeds_labels = True")
    gradients = [parameter.grad for parameter in run.method.parameters() if parameter.grad is not None]
    norm = gradient_norm(gradients)
    (found,), logged, measured = to_host(
        [{"gradient_norm": norm}], terms, measures
    )  # the only time in a step that the host waits for the device
    check_step(run, logged, found["gradient_norm"])
    if config.clip:
        clip_gradient(gradients, norm, config.clip)
    run.optimiser.step()
    run.averages.update(run.method.student, run.state.step)
    return StepResult(summed(logged), {k: v / len(batches) for k, v in summed(measured).items()}, found["gradient_norm"])


def to_host(*lists: Sequence[Mapping[str, Tensor]]) -> list[list[dict[str, float]]]:
    """Lists of scalars by name, all fetched from the device at once."""
    scalars = [value.float() for parts in lists for part in parts for value in part.values()]
    values = iter(torch.stack(scalars).tolist())
    return [[{name: next(values) for name in part} for part in parts] for parts in lists]


def summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sums of the values of the same names."""
    return {name: sum(part.get(name, 0.0) for part in parts) for name in dict.fromkeys(name for part in parts for name in part)}


def synchronise_step(run: Run, local: list[Batch]) -> tuple[bool, list[Batch]]:
    """Give all micro-batches of a step, in all processes, one size and the totals of the step, or stop in all processes.

    Args:
        local: the micro-batches of this process; fewer or none if it was asked to stop while it waited for them.

    Returns:
        Whether a process was asked to stop, and if not, the micro-batches of this process, padded to one size, with the totals of the step.
    """
    counts = [n for batch in local for n in batch.targets.counts]
    height, width = (max((batch.images.shape[k] for batch in local), default=0) for k in (2, 3))
    missing = run.loader.batch_size // run.accelerator.num_processes - len(counts)
    facts = torch.tensor([[height, width, int(run.asked_to_stop), *counts, *[0] * missing]], device=run.accelerator.device)
    if run.accelerator.num_processes > 1:
        facts = run.accelerator.gather(facts)
    height, width, stop = facts[:, :3].amax(0).tolist()
    totals = Totals.of(facts[:, 3:].flatten().tolist())
    step, seed = run.state.step, run.recipe.training.seed
    if stop:
        return True, []
    return False, [replace(pad_batch(b, height, width), totals=totals, step=step, seed=seed) for b in local]


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
