"""Losses that are not finite: the batch is kept, and its step can be run again."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from steadydetr.runs.folder import RunFolder
from steadydetr.structures import Batch
from steadydetr.training.run import Run


def check_finite(run: Run, losses: dict[str, float], batch: Batch) -> None:
    """Save the batch and the weights, and raise FloatingPointError, if a loss is not finite."""
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        path = run.folder.not_finite_path(run.state.step, run.accelerator.process_index)
        torch.save({"batch": batch, "method": run.method.training_state()}, path)
        raise FloatingPointError(
            f"step {run.state.step}: the loss {', '.join(bad)} is not finite. The batch (images {list(batch.image_ids)}) and the weights"
            f" that it met are in {path}; `steadydetr.replay` runs them again. Lower training.lr or clip harder, and check the data"
        )


def replay(run_folder: Path, saved: Path) -> dict[str, float]:
    """The weighted losses, by name, of a batch that `check_finite` saved: its step, run again with the same weights."""
    config = RunFolder(run_folder).read_config()
    content = torch.load(saved, weights_only=False)
    method = config.recipe().build(config.classes)
    method.load_training_state(content["method"])
    return {name: float(value) for name, value in method.train()(content["batch"]).weighted().items()}
