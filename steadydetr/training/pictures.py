"""What is drawn into the run folder when a run is finished."""

from __future__ import annotations

from steadydetr.data import EvalLoader, first_images
from steadydetr.detectors.base import evaluating
from steadydetr.drawing.run_pictures import draw_curves, draw_predictions
from steadydetr.drawing.sampling_points import draw_sampling_points
from steadydetr.metrics.evaluation import prediction_function
from steadydetr.runs.folder import CURVES, PREDICTIONS, SAMPLING
from steadydetr.runs.records import WEIGHTS_LABELS
from steadydetr.training.run import Run


def draw_pictures(run: Run) -> None:
    """Learning curves, predictions beside ground truth, and where queries look."""
    draw_curves(list(run.folder.read_records()), run.folder.path / CURVES)
    draw_first_predictions(run)
    models = {WEIGHTS_LABELS[name]: model for name, model in run.models.items() if model.samples_points}
    draw_sampling_points(models, run.recipe.criterion, run.val_data, run.recipe.data, run.folder.path / SAMPLING)


def draw_first_predictions(run: Run, count: int = 6) -> None:
    """Predictions beside ground truth for the first `count` validation images that have objects."""
    data = first_images(run.val_data, 4 * count)
    detector = run.method.student
    predict = prediction_function(detector, run.accelerator.device, run.recipe.top, run.recipe.nms)
    loader = EvalLoader(data, run.recipe.data, run.recipe.training.eval_batch_size)
    with evaluating(detector):
        found = [prediction for batch in loader for prediction in predict(batch)]
    shown = [i for i in range(len(data.index)) if data.index.counts[i]][:count]
    draw_predictions(data, shown, [found[i] for i in shown], run.folder.path / PREDICTIONS)
