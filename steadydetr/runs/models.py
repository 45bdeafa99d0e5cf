"""The detectors in a checkpoint of a run: with its trained weights, and with their average."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steadydetr.checkpoints.folder import STATE, load_detector, load_state, load_training_state
from steadydetr.detectors import Detector


def average_state(training_state: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The averaged weights in a training state; None if there are none.

    Where an EMA teacher is the same average, they are saved once, as the teacher's weights.
    """
    if training_state["average"] is not None:
        return training_state["average"]
    prefix = "teachers.ema.model."
    found = {name.removeprefix(prefix): value for name, value in training_state["method"].items() if name.startswith(prefix)}
    return found or None


def load_models(folder: Path, device: str) -> dict[str, Detector]:
    """The detector of a checkpoint with its trained weights, "model", and with their average, "ema", if the checkpoint has one."""
    loaded = load_detector(folder, device)
    models = {"model": loaded.detector}
    average = average_state(load_training_state(folder)) if (folder / STATE).exists() else None
    if average is not None:
        models["ema"] = copy.deepcopy(loaded.detector)
        load_state(models["ema"], average, folder / STATE)
    return models
