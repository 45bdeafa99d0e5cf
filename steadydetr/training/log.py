"""The records that a run logs: of a step, of an evaluation and of a measurement of stability."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from steadydetr.metrics.evaluation import Evaluation
from steadydetr.metrics.stability import Stability
from steadydetr.training.run import Run

SHARE = "/gradient_share"  # how the measures end that objectives log of their share of a gradient  # D-48
LOUD = 0.5  # a share from which on an objective drowns the others


@dataclass(frozen=True)
class StepResult:
    """The losses, measures and gradient norm of an optimiser step, in this process."""

    losses: dict[str, float]  # weighted, summed over stages and micro-batches
    measures: dict[str, float]  # mean over micro-batches
    gradient_norm: float  # before clipping


def log_step(run: Run, result: StepResult, rate: float, epoch: int, images_per_second: float) -> None:
    """Log a step. Losses are summed over the processes, because each divides by the objects of the whole step; measures are averaged."""
    losses = reduce(run, result.losses, "sum")
    measures = reduce(run, result.measures, "mean")
    record = {
        "kind": "train",
        "step": run.state.step,
        "epoch": epoch,
        "loss": sum(losses.values()),
        "losses": losses,
        "lr": rate,
        "gradient_norm": result.gradient_norm,
    }
    if measures:
        record["measures"] = measures
    record["memory_gib"] = peak_memory(run.accelerator.device) / 2**30
    run.log.write(record | {"images_per_second": images_per_second})


def remark_on_shares(run: Run, epoch: int, shares: Mapping[str, Sequence[float]]) -> None:
    """Say once of every objective that takes more than half of the gradient over a whole epoch what that means.

    Args:
        shares: the `gradient_share` of every step of the epoch, by the objective's name.
    """
    for name, values in shares.items():
        share = sum(values) / len(values)
        if share > LOUD and name not in run.loud:
            run.loud.add(name)
            run.log.say(
                f"objective {name} took {100 * share:.0f}% of the gradient at the features that it compares, on average over epoch"
                f" {epoch + 1}, so that detection hardly steers them. Give it less weight: the flags --objectives.{name}.* of `--help`"
            )


def reduce(run: Run, values: dict[str, float], how: str) -> dict[str, float]:
    """The "sum" or "mean" of every value over the processes."""
    reduced = run.accelerator.reduce(torch.tensor(list(values.values()), device=run.accelerator.device), how)
    return dict(zip(values, reduced.tolist(), strict=True))


def peak_memory(device: torch.device) -> int:
    """The peak memory in bytes: on a GPU the most that tensors took, on the CPU the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such module
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def log_evaluation(run: Run, weights: str, evaluation: Evaluation) -> None:
    """Log the metrics of the trained weights ("model") or of their average ("ema")."""
    run.log.write({"kind": "eval", "step": run.state.step, "epoch": run.state.epochs_done, "weights": weights} | evaluation.as_dict())


def log_stability(run: Run, weights: str, measured: Stability) -> None:
    """Log the stability of the matching of the trained weights ("model") or of their average ("ema")."""
    run.log.write({"kind": "stability", "step": run.state.step, "epoch": run.state.epochs_done, "weights": weights} | asdict(measured))
