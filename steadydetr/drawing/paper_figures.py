"""The papers' figures of any runs, as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steadydetr.checkpoints.folder import LoadedDetector, find_checkpoint, load_detector, load_models, read_card
from steadydetr.data import DataConfig, Dataset, open_data
from steadydetr.detectors import Detector
from steadydetr.drawing import panels as figures
from steadydetr.drawing.feature_masks import draw_masks
from steadydetr.drawing.sampling_points import draw_looks
from steadydetr.learning.teachers import score_classes
from steadydetr.runs.folder import run_criterion
from steadydetr.runs.records import WEIGHTS, Records, read_all

MASKS = ("query-masks", "level-masks", "activation")


def write_figures(
    runs: Sequence[Path],
    output: Path,
    suffix: str = "png",
    data: str | None = None,
    split: str = "val",
    objects: int = 3,
    teacher: str = "",
) -> tuple[list[Path], dict[str, str]]:
    """Write every figure that the runs have data for into the folder `output`.

    Args:
        runs: folders of runs, or with runs below them.
        suffix: png, svg or pdf.
        data: data set of the sampling points and masks; None: they are left out.
        teacher: checkpoint whose masks are drawn; the trained teacher of the first run that has one if not given.

    Returns:
        The files, and for every figure that could not be drawn the reason.
    """
    found = read_all(runs)
    output.mkdir(parents=True, exist_ok=True)
    by_layer, _, by_stage, epochs, consistency, _ = figures.stability(found)
    panels = {
        "unstable-score": by_layer,
        "instability": epochs,
        "consistency": consistency,
        "ap-around-drop": figures.around_the_drop(found),
        "instability-by-stage": by_stage,
    }
    written, missing = [], {}
    for name, panel in panels.items():
        if panel.lines:
            figures.save(panel, found, output / f"{name}.{suffix}")
            written.append(output / f"{name}.{suffix}")
        else:
            missing[name] = panel.needs
    if data is None:
        missing |= dict.fromkeys(["sampling-points", *MASKS], "needs --data")
        return written, missing
    dataset = open_data(data, split)
    written.append(output / f"sampling-points.{suffix}")
    _draw_sampling(found, dataset, objects, written[-1])
    try:
        folder, loaded = _load_teacher(found, teacher, dataset.index.classes)
    except (FileNotFoundError, ValueError) as error:
        return written, missing | dict.fromkeys(MASKS, str(error))
    config = DataConfig(resize=loaded.card.resize, workers=0)
    written += draw_masks(loaded.detector, run_criterion(folder), dataset, config, output, suffix, objects)
    return written, missing


def _draw_sampling(runs: Sequence[Records], dataset: Dataset, objects: int, output: Path) -> None:
    """A column for the trained and one for the averaged weights of every run; all see the images as the first one does."""
    models: dict[str, Detector] = {}
    folders = [find_checkpoint(run.folder, prefer=("last", "best")) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        models |= {f"{run.label}, {WEIGHTS[name]}": model for name, model in load_models(folder, "cpu").items()}
    config = DataConfig(resize=read_card(folders[0]).resize, workers=0)
    draw_looks(models, run_criterion(folders[0]), dataset, config, output, objects)


def _load_teacher(runs: Sequence[Records], teacher: str, classes: Sequence[str]) -> tuple[Path, LoadedDetector]:
    """Its folder and itself, scoring the classes of the data.

    Raises:
        FileNotFoundError: there is none, or its checkpoint is gone.
        ValueError: it does not know a class of the data, or its checkpoint is damaged.
    """
    named = [part.get("checkpoint", "") for run in runs for part in run.recipe.get("teachers", [])]
    teacher = teacher or next(filter(None, named), "")
    if not teacher:
        raise FileNotFoundError("needs a run with a trained teacher, or --teacher CHECKPOINT")
    folder = find_checkpoint(Path(teacher).expanduser())
    loaded = load_detector(folder)
    score_classes(loaded, classes, teacher)
    return folder, loaded
