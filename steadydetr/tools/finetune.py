"""From the weights of a trained detector to one for other data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.checkpoints.start import Start
from steadydetr.checkpoints.weights import TrainedWeights, read_weights
from steadydetr.data import DataConfig
from steadydetr.data.opening import open_train_and_val
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.finetuning import TrainingMethod, finetuned
from steadydetr.runs.folder import RunFolder
from steadydetr.training.loop import train


def finetune(
    weights: str | Path,
    data: str | Path,
    output: str | Path,
    method: TrainingMethod | None = None,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
    resume: bool | Literal["auto"] = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Train a trained detector on, for the classes of other data; returns what summary.json says.

    Args:
        weights: a run, a checkpoint of ours or of another project, hub:owner/name, or a name of `steadydetr weights`.
        data: a folder, as `--data` takes it.
        output: folder of the run.
        method: plain, od (OD-DETR), stable (loss and cost of Stable-DINO), or steady (OD-DETR with that cost). None: the losses that
            weights of a run were trained with.
        change: takes the recipe and gives back another one, for what differs from it.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before training, where weights, data or folder cannot work.
    """
    recipe = finetune_recipe(read_weights(weights), Start(str(weights)), DataConfig(source=str(data)), method)
    return train(change(recipe), output, resume, device)


def finetune_recipe(weights: TrainedWeights, start: Start, data: DataConfig, method: TrainingMethod | None = None) -> Recipe:
    """The recipe of `finetune`, for as many images as the data have."""
    images = len(open_train_and_val(data).train.index)
    return finetuned(weights.card, start, min(images, data.limit or images), method, recipe_before(start.weights))


def recipe_before(weights: str) -> Recipe | None:
    """The recipe that the weights were trained by, if they are those of a run."""
    try:
        run = RunFolder(find_checkpoint(Path(weights).expanduser()).parent)
    except FileNotFoundError:
        return None
    if not run.holds_run:
        return None
    recipe = run.read_config().recipe()
    return recipe if isinstance(recipe, Recipe) else None
