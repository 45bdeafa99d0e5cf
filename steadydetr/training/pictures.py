"""What is drawn into the run folder when a run is finished."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steadydetr.checkpoints.folder import load_detector
from steadydetr.data import EvalLoader, first_images
from steadydetr.detectors import Detector
from steadydetr.detectors.base import evaluating
from steadydetr.drawing.run_pictures import draw_curves, draw_predictions
from steadydetr.drawing.sampling_points import draw_sampling_points
from steadydetr.files import one_line
from steadydetr.metrics.evaluation import prediction_function
from steadydetr.runs.folder import BEST, CURVES, PREDICTIONS, SAMPLING
from steadydetr.runs.records import WEIGHTS_LABELS
from steadydetr.training.run import Run


def draw_pictures(run: Run) -> None:
    """Learning curves, predictions beside ground truth, and where queries sample the image. A picture that fails is a line in the log."""
    drawings: dict[str, Callable[[Run, Path], None]] = {
        CURVES: lambda run, path: draw_curves(list(run.folder.read_records()), path),
        PREDICTIONS: draw_first_predictions,
        SAMPLING: draw_first_sampling_points,
    }
    for name, draw in drawings.items():
        try:
            draw(run, run.folder.path / name)
        except Exception as error:
            run.log.say(f"{name} was not drawn, the run itself is complete: {type(error).__name__}: {one_line(error, 300)}")


def draw_first_sampling_points(run: Run, path: Path) -> None:
    """Where the queries of the trained and of the averaged weights sample the image, as far as the detector can record that."""
    models = {WEIGHTS_LABELS[name]: model for name, model in run.models.items() if model.samples_points}
    draw_sampling_points(models, run.recipe.criterion, run.val_data, run.recipe.data, path)


def draw_first_predictions(run: Run, path: Path, count: int = 6) -> None:
    """Predictions of `best` beside ground truth for the first `count` validation images that have objects."""
    data = first_images(run.val_data, 4 * count)
    detector, whose = best_detector(run)
    predict = prediction_function(detector, run.accelerator.device, run.recipe.top, run.recipe.nms, masks=True)
    loader = EvalLoader(data, run.recipe.data, run.recipe.training.eval_batch_size)
    with evaluating(detector):
        found = dict(zip(loader.positions, (prediction for batch in loader for prediction in predict(batch)), strict=True))
    shown = [i for i in range(len(data.index)) if data.index.counts[i]][:count]
    draw_predictions(data, shown, [found[i] for i in shown], path, whose=whose)


def best_detector(run: Run) -> tuple[Detector, str]:
    """The detector in `best` and what pictures call it; the trained weights where no evaluation has found anything to measure."""
    if not (run.folder.path / BEST).exists():
        return run.method.student, "trained weights"
    weights = f", {WEIGHTS_LABELS[run.state.best_weights]} weights of epoch {run.state.best_epoch}" if run.state.best_weights else ""
    return load_detector(run.folder.path / BEST, run.accelerator.device).detector, f"best{weights}"
