"""Figures of the papers, drawn of any runs, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steadydetr.checkpoints.card import read_card
from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.checkpoints.folder import LoadedDetector, load_detector
from steadydetr.config import NETWORK_PLACE
from steadydetr.data import DataConfig, open_data
from steadydetr.data.dataset import in_channels
from steadydetr.detectors import Detector
from steadydetr.devices import choose_device
from steadydetr.drawing.feature_masks import MASK_FIGURES, draw_feature_masks
from steadydetr.drawing.panels import REPORT_FIGURES
from steadydetr.drawing.plot import save_panel
from steadydetr.drawing.sampling_points import draw_sampling_points
from steadydetr.files import claim_folder
from steadydetr.learning.teachers import score_classes
from steadydetr.limits import DEFAULT_LIMITS, Limits
from steadydetr.runs.folder import RunFolder, run_criterion, run_divisions
from steadydetr.runs.models import load_models
from steadydetr.runs.records import WEIGHTS_LABELS, Records, read_runs_at_epochs


def write_figures(
    runs: Sequence[Path],
    output: Path,
    suffix: str = "png",
    data: str | None = None,
    split: str = "val",
    objects: int = 3,
    teacher: str = "",
    overwrite: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    device: str = "cpu",
) -> tuple[list[Path], dict[str, str]]:
    """Write every figure that the runs have data for into the folder `output`.

    Args:
        runs: folders of runs, or with runs below them; runs/mine@3 is the run as it was after epoch 3, for curves alone.
        suffix: png, svg or pdf.
        data: data set of the sampling points and masks; None: they are left out.
        teacher: checkpoint whose masks are drawn; the trained teacher of the first run that has one if not given.
        overwrite: whether `output` may hold other things than earlier figures.
        limits: what may be read of the data set.
        device: what sampling points, masks and activation are computed on.

    Returns:
        The files, and for every figure that could not be drawn the reason.
    """
    choose_device(device)
    found, early = read_runs_at_epochs(runs)
    for damaged in (line for run in (*found, *early) for line in run.left_out):
        raise ValueError(damaged)
    claim_folder(output, "figures", again=True, overwrite=overwrite)
    written, missing = _write_panels([*found, *early], output, suffix)
    if data is None or not found:
        needs = "needs --data" if found else "needs a run that is not cut by @"
        return written, missing | dict.fromkeys(["sampling-points", *MASK_FIGURES], needs)
    dataset = open_data(data, split, limits, None, *run_divisions(RunFolder(found[0].folder).find_checkpoint()))
    models, like = _models_that_sample_points(found, device)
    if models:
        written.append(output / f"sampling-points.{suffix}")
        card = read_card(like)
        config = DataConfig(resize=card.resize, workers=0)
        draw_sampling_points(models, run_criterion(like), in_channels(dataset, card.detector.image_channels), config, written[-1], objects)
    else:
        missing["sampling-points"] = "needs a detector with deformable attention"
    try:
        folder, loaded = _load_teacher(found, teacher, dataset.index.classes, device)
    except (FileNotFoundError, ValueError) as error:
        return written, missing | dict.fromkeys(MASK_FIGURES, str(error))
    config = DataConfig(resize=loaded.card.resize, workers=0)
    images = in_channels(dataset, loaded.detector.image_channels)
    written += draw_feature_masks(loaded.detector, run_criterion(folder), images, config, output, suffix, objects)
    return written, missing


def _write_panels(runs: Sequence[Records], output: Path, suffix: str) -> tuple[list[Path], dict[str, str]]:
    """The figures of runs' records: the files, and what the runs lack for those that could not be drawn."""
    written, missing = [], {}
    for figure in (figure for figure in REPORT_FIGURES if figure.paper):
        [panel] = figure.panels(runs)
        if panel.lines:
            written.append(output / f"{figure.name}.{suffix}")
            save_panel(panel, runs, written[-1])
        else:
            missing[figure.name] = panel.needs
    return written, missing


def _models_that_sample_points(runs: Sequence[Records], device: str) -> tuple[dict[str, Detector], Path]:
    """The trained and the averaged weights of every run, by the titles of their columns, and the checkpoint whose images all get."""
    models: dict[str, Detector] = {}
    folders = [RunFolder(run.folder).find_checkpoint() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        for name, model in load_models(folder, device).items():
            if model.samples_points:
                models[f"{run.label}, {WEIGHTS_LABELS[name]}"] = model
    return models, folders[0]


def _load_teacher(runs: Sequence[Records], teacher: str, classes: Sequence[str], device: str) -> tuple[Path, LoadedDetector]:
    """The teacher whose masks are drawn, with its folder. Its class scores are put into the order of the data's classes.

    Raises:
        FileNotFoundError: there is none, or its checkpoint is gone.
        ValueError: it does not know a class of the data, its checkpoint is damaged, or a run, not the user, says that it is in the network.
    """
    named = [part.get("checkpoint", "") for run in runs for part in run.recipe.get("teachers", [])]
    if not teacher and NETWORK_PLACE.match(teacher := next(filter(None, named), "")):
        raise ValueError(f"the runs' teacher {teacher[:100]!r} is a place in the network: give it as --teacher, if you trust it")
    if not teacher:
        raise FileNotFoundError("needs a run with a trained teacher, or --teacher CHECKPOINT")
    folder = find_checkpoint(Path(teacher).expanduser())
    loaded = load_detector(folder, device)
    score_classes(loaded, classes, teacher)
    return folder, loaded
