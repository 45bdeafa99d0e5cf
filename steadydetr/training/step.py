"""One step of the optimiser, over all processes and micro-batches.

Gradients of processes and micro-batches are summed, because losses are divided by the objects of the whole step (D-03).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from steadydetr.data import pad_batch
from steadydetr.structures import Batch, Totals
from steadydetr.training.log import StepResult
from steadydetr.training.not_finite import check_step
from steadydetr.training.optimiser import clip_gradient, gradient_norm
from steadydetr.training.precision import autocast
from steadydetr.training.run import Run


def synchronise_step(run: Run, local: list[Batch]) -> tuple[bool, list[Batch]]:
    """Give all micro-batches of a step, in all processes, one size and the totals of the step, or stop in all processes.

    Args:
        local: the micro-batches of this process; fewer or none if it was asked to stop while it waited for them.

    Returns:
        Whether a process was asked to stop, and if not, the micro-batches of this process, on its device and padded there to one size,
        because a padded copy on the host would not be in page-locked memory, with the totals of the step.
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
    there = (pad_batch(batch.to(run.accelerator.device), height, width) for batch in local)
    return False, [replace(batch, totals=totals, step=step, seed=seed) for batch in there]


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
            with autocast(config, accelerator.device), single_values_named():
                losses = run.wrapped(batch)
            accelerator.backward(losses.total * accelerator.num_processes)  # DistributedDataParallel averages; a sum is wanted
        terms.append(losses.weighted())
        measures.append(losses.measures)  # complete after backward, because some are of the gradient
    run.method.check_unused()
    gradients = [parameter.grad for parameter in run.method.parameters() if parameter.grad is not None]
    norm = gradient_norm(gradients)
    # the only time in a step that the host waits for the device
    (found,), logged, measured = to_host([{"gradient_norm": norm}], terms, measures)
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
