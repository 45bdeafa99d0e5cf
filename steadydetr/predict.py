"""A trained detector in use: images in, detections, pictures and COCO results out."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import msgspec
import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from steadydetr.checkpoint import STATE, Card, average_state, find_checkpoint, load_detector, load_training_state, read_card
from steadydetr.config import from_plain, write_json
from steadydetr.criterion import Criterion
from steadydetr.data import DataConfig, EvalLoader, open_data
from steadydetr.data.loading import LoadedSample, collate
from steadydetr.data.transforms import Sample, apply
from steadydetr.detections import Detections, Picture, open_picture
from steadydetr.detectors import Detector
from steadydetr.evaluation import Evaluation, Results, collect, evaluate, predictor
from steadydetr.stability import Stability, held_out, measure

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Predictor:
    """A detector with what its results mean. Made by `load`."""

    detector: Detector
    card: Card
    device: torch.device

    @property
    def names(self) -> tuple[str, ...]:
        return self.card.classes

    @overload
    def predict(self, images: Picture, threshold: float = 0.0) -> Detections: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Sequence[Picture], threshold: float = 0.0) -> list[Detections]: ...
    def predict(self, images: Picture | Sequence[Picture], threshold: float = 0.0) -> Detections | list[Detections]:
        """Detections of one image (path, Pillow image or RGB array) or, as one batch, of several.

        Args:
            threshold: least score that is kept.
        """
        single = isinstance(images, (str, Path, Image.Image, np.ndarray))
        pictures: Sequence[Picture] = [images] if single else images  # type: ignore[list-item, assignment]
        samples = [self._sample(open_picture(picture)) for picture in pictures]
        found = predictor(self.detector, self.device, self.card.top, self.card.nms)(collate(samples)) if samples else []
        detections = [Detections(b.cpu(), s.cpu(), l.cpu(), self.names).above(threshold) for b, s, l in found]
        return detections[0] if single else detections

    def _sample(self, picture: Image.Image) -> LoadedSample:
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
        empty = Sample(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return LoadedSample(apply(self.card.resize.build(), empty, seed=0), 0, (picture.height, picture.width))


def load(path: str | Path, device: str | torch.device = "auto") -> Predictor:
    """The detector of a run folder (its best), of a checkpoint folder, or of a converted checkpoint.

    Args:
        device: "cpu", "cuda" or "auto", which takes a GPU if there is one.
    """
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    loaded = load_detector(path, chosen)
    return Predictor(loaded.detector, loaded.card, chosen)


def evaluate_checkpoint(
    checkpoint: Path,
    data: str,
    split: str = "val",
    batch_size: int = 4,
    workers: int = 4,
    device: str = "auto",
    output: Path | None = None,
    nms: float | None = None,
) -> Evaluation:
    """Metrics of a checkpoint on a split of a data set, whose classes must be the checkpoint's.

    Args:
        output: JSON file for the metrics; NAME.results.json beside it gets the detections as COCO results.
        nms: IoU of class-wise suppression instead of the checkpoint's own.
    """
    loaded = load(checkpoint, device)
    dataset = open_data(data, split)
    index = align_classes(dataset.index.classes, loaded.card)
    config = DataConfig(resize=loaded.card.resize, workers=workers)
    predict = predictor(loaded.detector, loaded.device, loaded.card.top, loaded.card.nms if nms is None else nms)
    results = collect(predict, track(EvalLoader(dataset, config, batch_size), description="evaluate"))
    results = relabel(results, index)
    evaluation = evaluate(results, dataset.index)
    if output is not None:
        write_json(output, evaluation.as_dict())
        write_results(output.with_suffix(".results.json"), results.coco_rows(dataset.index.category_ids))
    return evaluation


def measure_checkpoint(
    checkpoint: Path,
    data: str,
    split: str = "val",
    images: int | None = None,
    against: Path | None = None,
    criterion: Criterion | None = None,
    batch_size: int = 4,
    workers: int = 4,
    device: str = "auto",
) -> dict[str, Stability]:
    """Stability measures of a checkpoint's trained weights ("model") and, where it has them, their average ("ema").

    Args:
        images: only the first images with objects; None: all.
        against: another checkpoint of the same detector, for the instability between the two.
        criterion: whose matcher is used; None: that of the checkpoint's run, or Deformable DETR's.
    """
    folder = find_checkpoint(Path(checkpoint).expanduser(), prefer=("last", "best"))
    card = read_card(folder)
    dataset = held_out(open_data(data, split), images)
    if dataset.index.classes != card.classes:
        raise ValueError(f"the checkpoint knows the classes {list(card.classes)[:20]}, the data has {list(dataset.index.classes)[:20]}")
    config, matcher = DataConfig(resize=card.resize, workers=workers), criterion or run_criterion(folder)
    before: dict[str, Tensor] = {}
    if against is not None:
        other = load_models(find_checkpoint(Path(against).expanduser(), prefer=("last", "best")), device)
        _, before = measure(other, matcher, dataset, config, batch_size, {})
    return measure(load_models(folder, device), matcher, dataset, config, batch_size, before)[0]


def run_criterion(folder: Path) -> Criterion:
    """The criterion of the run that a checkpoint folder lies in, the default one where it lies in none."""
    path = folder.parent / "config.json"
    if path.exists() and "recipe" in (plain := json.loads(path.read_text())):
        return from_plain(plain["recipe"]["criterion"], str(path))
    return Criterion()


def load_models(folder: Path, device: str) -> dict[str, Detector]:
    """A checkpoint's trained weights and, where it keeps them, their average."""
    loaded = load(folder, device)
    models = {"model": loaded.detector}
    average = average_state(load_training_state(folder)) if (folder / STATE).exists() else None
    if average is not None:
        models["ema"] = copy.deepcopy(loaded.detector)
        models["ema"].load_state_dict(average)
    return models


def align_classes(classes: Sequence[str], card: Card) -> list[int]:
    """For every class of the checkpoint its place in the data set's list, -1 where it has none.

    Raises ValueError where the two share no name, or the data set has a class that the checkpoint does not know.
    """
    unknown = [name for name in classes if name not in card.classes]
    if unknown:
        raise ValueError(
            f"the checkpoint knows the classes {list(card.classes)[:20]}, the data has others: {unknown[:20]}."
            " Evaluate on data with its classes"
        )
    return [classes.index(name) if name in classes else -1 for name in card.classes]


def relabel(results: Results, index: Sequence[int]) -> Results:
    """Results in the data set's class indices; those of classes that it has not are left out."""
    labels = np.asarray(index, dtype=np.int64)[results.labels]
    keep = labels >= 0
    return Results(results.image_ids[keep], results.boxes_xyxy[keep], results.scores[keep], labels[keep])


def write_results(path: Path, rows: np.ndarray) -> None:
    """COCO results of `Results.coco_rows`, whole or not at all."""
    write_json(path, [_result(row) for row in rows.tolist()])


def _result(row: list[float]) -> dict[str, object]:
    return {"image_id": int(row[0]), "category_id": int(row[6]), "bbox": row[1:5], "score": row[5]}


@dataclass(frozen=True)
class Source:
    path: Path
    image_id: int


class ImageEntry(msgspec.Struct):
    id: int
    file_name: str


class ImageList(msgspec.Struct):
    images: list[ImageEntry]


def list_sources(paths: Iterable[Path], image_folder: Path | None = None) -> list[Source]:
    """Images of files, folders (not below them) and COCO image lists, in order.

    Raises ValueError where a path does not exist or holds no image.
    """
    sources: list[Source] = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"the folder {path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
            sources += [Source(p, len(sources) + i + 1) for i, p in enumerate(found)]
        elif path.suffix.lower() == ".json" and path.exists():
            sources += list(_listed(path, image_folder or path.parent))
        elif path.exists():
            sources.append(Source(path, len(sources) + 1))
        else:
            raise ValueError(f"there is no image or folder {path}")
    return sources


def _listed(path: Path, folder: Path) -> Iterator[Source]:
    try:
        listed = msgspec.json.decode(path.read_bytes(), type=ImageList)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a COCO image list: {error}") from error
    for entry in listed.images:
        yield Source(folder / entry.file_name, entry.id)


@dataclass(frozen=True)
class PredictionReport:
    images: int
    detections: int
    failures: tuple[str, ...]  # images that could not be read, with the reason


def predict_files(
    loaded: Predictor,
    paths: Sequence[Path],
    output: Path,
    *,
    image_folder: Path | None = None,
    threshold: float = 0.3,
    draw: bool = True,
    batch_size: int = 4,
) -> PredictionReport:
    """Detections of many images: `results.json` (COCO results with the data's own category ids) and a picture of each.

    An image that cannot be read is named in the report; the others go on. The results replace older ones only when whole.
    """
    sources = list_sources(paths, image_folder)
    output.mkdir(parents=True, exist_ok=True)
    results, fresh = output / "results.json", output / ".results.json.new"
    failures: list[str] = []
    written = 0
    with open(fresh, "w") as file:
        for start in track(range(0, len(sources), batch_size), description="detect"):
            pictures = list(_readable(sources[start : start + batch_size], failures))
            for (source, picture), found in zip(pictures, loaded.predict([picture for _, picture in pictures]), strict=True):
                for row in _rows(source.image_id, found, loaded.card):
                    file.write(f"{',' if written else '['}\n{json.dumps(row)}")
                    written += 1
                if draw:
                    found.draw(picture, threshold).save(output / f"{source.path.stem}.png")
        file.write("\n]\n" if written else "[]\n")
    os.replace(fresh, results)
    return PredictionReport(len(sources) - len(failures), written, tuple(failures))


def _readable(sources: Sequence[Source], failures: list[str]) -> Iterator[tuple[Source, Image.Image]]:
    for source in sources:
        try:
            yield source, open_picture(source.path)
        except ValueError as error:
            failures.append(str(error))


def _rows(image_id: int, found: Detections, card: Card) -> Iterator[dict[str, object]]:
    labels = found.labels.numpy()
    rows = Results(np.full(len(found), image_id), found.boxes_xyxy.numpy(), found.scores.numpy(), labels).coco_rows(card.category_ids)
    return (_result(row) for row in rows.tolist())
