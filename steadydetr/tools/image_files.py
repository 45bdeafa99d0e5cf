"""Detections of many image files: COCO results, and a picture of each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image
from rich.progress import track

from steadydetr.checkpoints.folder import DetectorCard
from steadydetr.data.images import open_picture
from steadydetr.metrics.results import Results, coco_result
from steadydetr.tools.detections import Detections
from steadydetr.tools.predictor import Predictor

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


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


def _rows(image_id: int, found: Detections, card: DetectorCard) -> Iterator[dict[str, object]]:
    labels = found.labels.numpy()
    rows = Results(np.full(len(found), image_id), found.boxes_xyxy.numpy(), found.scores.numpy(), labels).coco_rows(card.category_ids)
    return (coco_result(row) for row in rows.tolist())
