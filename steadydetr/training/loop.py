"""The training loop. It reads like what it does: prepare, then for every epoch train, evaluate, save.

Gradients of processes and micro-batches are summed, because losses are divided by the objects of the whole step (D-03).
Random numbers of a step are seeded by (seed, step, process), so a resumed run needs no generator states.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steadydetr.data import EvalLoader, pad_batch
from steadydetr.detectors import Detector
from steadydetr.metrics.evaluation import Evaluation, Results, collect, evaluate, predictor
from steadydetr.metrics.stability import held_out, measure
from steadydetr.recipes.base import Recipe
from steadydetr.structures import Batch, Losses, Totals, seed_of
from steadydetr.training.optimiser import rate_factor, set_rate
from steadydetr.training.run import (
    Run,
    Step,
    finish,
    interrupted,
    log_evaluation,
    log_stability,
    log_step,
    prepare,
    read_run,
    save,
    stop_on_signal,
)


def train(recipe: Recipe, output: Path, resume: bool = False, device: str | None = None) -> dict[str, Any]:
    """Train a recipe in the folder `output`; returns what summary.json says.

    Args:
        resume: go on from `output`'s last checkpoint.
        device: "cpu", or None for what accelerate finds.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before training, where data, recipe or folder cannot work.
        FloatingPointError: a loss is not finite; the batch is saved beside the checkpoints.
    """
    run = prepare(recipe, output, resume, device)
    with stop_on_signal(run), run.progress:
        for epoch in range(run.state.epochs_done, recipe.training.epochs):
            train_epoch(run, epoch)
            if run.stop:
                return interrupted(run)
            run.state.epochs_done = epoch + 1
            evaluate_and_save(run)
    return finish(run)


def train_epoch(run: Run, epoch: int) -> None:
    """The rest of an epoch from where the state says; returns early, saved, if asked to stop."""
    config, state, per_epoch = run.recipe.training, run.state, run.loader.steps_per_epoch
    run.wrapped.train()
    clock = time.perf_counter()
    for local in run.loader.epoch(epoch, state.step - epoch * per_epoch):
        run.stop, batches = synchronise_step(run, local)
        if run.stop:
            break
        rate = set_rate(run.optimiser, rate_factor(state.step, per_epoch, config), config)
        torch.manual_seed(seed_of(config.seed, state.step, run.accelerator.process_index))
        step = train_step(run, batches)
        now = time.perf_counter()
        speed, clock, state.seconds = run.loader.batch_size / (now - clock), now, state.seconds + now - clock
        state.step += 1
        state.images_seen += run.loader.batch_size
        if state.step % config.log_every == 0 or state.step % per_epoch == 0:
            log_step(run, step, rate, epoch, speed)
        if state.step in config.stability_steps and state.step % per_epoch:  # at an epoch's end it is measured anyway
            measure_stability(run)
        if config.save_every and state.step % config.save_every == 0 and state.step % per_epoch:
            save(run, "last")
    if run.stop:
        save(run, "last")


def train_step(run: Run, batches: list[Batch]) -> Step:
    """One optimiser step over this process's micro-batches."""
    config, accelerator = run.recipe.training, run.accelerator
    logged: dict[str, float] = {}
    measured: dict[str, float] = {}
    run.optimiser.zero_grad(set_to_none=True)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(run.wrapped):
            with accelerator.autocast():
                losses = run.wrapped(batch.to(accelerator.device))
            accelerator.backward(losses.total * accelerator.num_processes)  # DistributedDataParallel averages; a sum is wanted
            values, measures = to_host(losses)  # after backward, which some measures are of
            check_finite(run, values, batch)
        logged = {name: logged.get(name, 0.0) + value for name, value in values.items()}
        measured = {name: measured.get(name, 0.0) + value / len(batches) for name, value in measures.items()}
    norm = nn.utils.clip_grad_norm_(run.method.parameters(), config.clip or math.inf)
    run.optimiser.step()
    run.update_averages()
    return Step(logged, measured, float(norm))


def to_host(losses: Losses) -> tuple[dict[str, float], dict[str, float]]:
    """Weighted losses and measures, with one fetch."""
    terms = losses.weighted()
    device_values = [*terms.values(), *losses.measures.values()]
    values = torch.stack([value.to(device_values[0].dtype) for value in device_values]).tolist()
    return dict(zip(terms, values, strict=False)), dict(zip(losses.measures, values[len(terms) :], strict=True))


def synchronise_step(run: Run, local: list[Batch]) -> tuple[bool, list[Batch]]:
    """Settle among processes and micro-batches: whether to stop, one padded size, and the totals that losses are divided by."""
    counts = [n for batch in local for n in batch.targets.counts]
    height, width = (max(batch.images.shape[k] for batch in local) for k in (2, 3))
    facts = torch.tensor([[height, width, max(counts, default=0), sum(counts), int(run.stop)]], device=run.accelerator.device)
    if run.accelerator.num_processes > 1:
        facts = run.accelerator.gather(facts)
    height, width, most, _, stop = facts.amax(0).tolist()
    totals = Totals(objects=int(facts[:, 3].sum()), most_objects=most, images=run.loader.batch_size)
    step, seed = run.state.step, run.recipe.training.seed
    return bool(stop), [replace(pad_batch(b, height, width), totals=totals, step=step, seed=seed) for b in local]


def check_finite(run: Run, losses: dict[str, float], batch: Batch) -> None:
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        path = run.output / f"not-finite-step{run.state.step}-process{run.accelerator.process_index}.pt"
        torch.save({"batch": batch, "method": run.method.training_state()}, path)
        raise FloatingPointError(
            f"step {run.state.step}: the loss {', '.join(bad)} is not finite. The batch (images {list(batch.image_ids)}) and the weights"
            f" that it met are in {path}; `steadydetr.replay` runs them again. Lower training.lr or clip harder, and check the data"
        )


def replay(run_folder: Path, saved: Path) -> dict[str, float]:
    """The losses of a batch that `check_finite` saved, once more: {name: weighted value}."""
    recipe, classes = read_run(run_folder)
    content = torch.load(saved, weights_only=False)
    method = recipe.build(classes)
    method.load_training_state(content["method"])
    return {name: float(value) for name, value in method.train()(content["batch"]).weighted().items()}


def evaluate_and_save(run: Run) -> None:
    """Evaluate the trained and the averaged weights where it is due; save `last`, and `best` where it is."""
    config, state = run.recipe.training, run.state
    due = state.epochs_done % config.eval_every == 0 or state.epochs_done == config.epochs
    best = None
    if due:
        for weights, detector in run.models.items():
            evaluation = evaluate_detector(run, detector)
            state.evaluations[weights] = evaluation.as_dict()
            log_evaluation(run, weights, evaluation)
            if evaluation.ap > state.best_ap:
                state.best_ap, best = evaluation.ap, weights
        state.matched = measure_stability(run)
    save(run, "last")
    if best is not None:
        save(run, "best", best)


def measure_stability(run: Run) -> dict[str, Tensor]:
    """Match the fixed held-out images and log how that changed; gives who holds their targets now, for the next time."""
    config, matched = run.recipe.training, dict(run.state.matched)
    if config.stability_images and run.accelerator.is_main_process and run.val_data.index.usable().any():
        dataset = held_out(run.val_data, config.stability_images)
        measured, matched = measure(run.models, run.recipe.criterion, dataset, run.recipe.data, config.eval_batch_size, run.state.matched)
        for weights, found in measured.items():
            log_stability(run, weights, found)
    run.accelerator.wait_for_everyone()
    return matched


@torch.no_grad()
def evaluate_detector(run: Run, detector: nn.Module) -> Evaluation:
    """The detector on the validation images, which the processes share."""
    assert isinstance(detector, Detector)
    accelerator = run.accelerator
    loader = EvalLoader(
        run.val_data, run.recipe.data, run.recipe.training.eval_batch_size, accelerator.process_index, accelerator.num_processes
    )
    training = detector.training
    with accelerator.autocast():
        predict = predictor(detector.eval(), accelerator.device, run.recipe.top, run.recipe.nms)
        results = collect(predict, run.progress.track(loader, "evaluate", len(loader)))
    detector.train(training)
    if accelerator.num_processes > 1:
        parts: list[Results | None] = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(parts, results)
        results = Results.cat([part for part in parts if part is not None])
    return evaluate(results, run.val_data.index)
