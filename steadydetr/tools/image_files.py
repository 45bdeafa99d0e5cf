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

from steadydetr.data.folder import DataFolder
from steadydetr.data.images import open_picture
from steadydetr.data.reading import Id, decode_json, is_file_name, read_file
from steadydetr.files import DEFAULT_LIMITS, Limits, printable
from steadydetr.metrics.results import Results, coco_results
from steadydetr.tools.detections import Detections
from steadydetr.tools.predictor import Predictor

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageFile:
    """An image file and the id that its results are written with."""

    path: Path
    image_id: int


class ImageEntry(msgspec.Struct):
    id: Id
    file_name: str


class ImageList(msgspec.Struct):
    """A COCO annotation file of which only the images are read, such as image_info_test-dev2017.json."""

    images: list[ImageEntry]


def list_sources(paths: Iterable[Path], image_folder: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> list[ImageFile]:
    """The images that paths stand for, in order. A path is an image file, a folder of them or a COCO image list.

    Args:
        image_folder: where the images of COCO image lists are; beside each list if not given.
        limits: what may be read: whether images outside that folder, and how large a list.

    Raises:
        ValueError: a path does not exist or holds no image, or a list cannot be read.
    """
    sources: list[ImageFile] = []
    for path in paths:
        if os.path.isdir(path):
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"the folder {path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
            sources += [ImageFile(p, len(sources) + i + 1) for i, p in enumerate(found)]
        elif path.suffix.lower() == ".json" and os.path.exists(path):
            sources += _read_list(path, DataFolder(image_folder or path.parent, limits))
        elif os.path.exists(path):
            sources.append(ImageFile(path, len(sources) + 1))
        else:
            raise ValueError(f"there is no image or folder {printable(path)}")
    return sources


def _read_list(path: Path, folder: DataFolder) -> list[ImageFile]:
    """The images of a COCO image list, which lie in `folder`."""
    content = read_file(path, folder.limits.max_annotation_mb, "max_annotation_mb")
    try:
        listed = decode_json(content, path, ImageList)
    except msgspec.ValidationError as error:
        raise ValueError(f"{printable(path)} is not a COCO image list: {error}") from error
    found: dict[int, ImageFile] = {}
    for entry in listed.images:
        file = folder.root / entry.file_name
        if entry.id in found:
            raise ValueError(f"{printable(path)}: image id {entry.id} is used twice: their detections could not be told apart")
        if not is_file_name(entry.file_name):
            raise ValueError(f"{printable(path)}: image {entry.id}: {printable(repr(entry.file_name))} cannot be the name of a file")
        folder.check_inside(file)
        found[entry.id] = ImageFile(file, entry.id)
    return list(found.values())


@dataclass(frozen=True)
class PredictionReport:
    """What `predict_files` did."""

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
    limits: Limits = DEFAULT_LIMITS,
) -> PredictionReport:
    """Write the detections of many images into the folder `output`: `results.json` (COCO results) and a picture of each image.

    An image that cannot be read is named in the report, and the others are done. `results.json` is replaced when all are.

    Args:
        image_folder: where the images of COCO image lists are.
        threshold: least score that is drawn; the results have all scores.
        draw: whether to draw pictures.
        limits: what may be read: whether listed images outside the folder, and how large.
    """
    sources = list_sources(paths, image_folder, limits)
    output.mkdir(parents=True, exist_ok=True)
    results, fresh = output / "results.json", output / ".results.json.new"
    failures: list[str] = []
    written = 0
    with open(fresh, "w") as file:
        for start in track(range(0, len(sources), batch_size), description="detect"):
            pictures = list(_readable(sources[start : start + batch_size], limits, failures))
            for (source, picture), found in zip(pictures, loaded.predict([picture for _, picture in pictures]), strict=True):
                for row in coco_results(_results_of_image(source.image_id, found), loaded.card.category_ids):
                    file.write(f"{',' if written else '['}\n{json.dumps(row)}")
                    written += 1
                if draw:
                    found.draw(picture, threshold).save(output / f"{source.path.stem}.png")
        file.write("\n]\n" if written else "[]\n")
    os.replace(fresh, results)
    return PredictionReport(len(sources) - len(failures), written, tuple(failures))


def _results_of_image(image_id: int, found: Detections) -> Results:
    """The detections of one image as results."""
    return Results(np.full(len(found), image_id), found.boxes_xyxy.numpy(), found.scores.numpy(), found.labels.numpy())


def _readable(sources: Sequence[ImageFile], limits: Limits, failures: list[str]) -> Iterator[tuple[ImageFile, Image.Image]]:
    """The images that can be read; why the others cannot is added to `failures`."""
    for source in sources:
        try:
            yield source, open_picture(source.path, limits)
        except ValueError as error:
            failures.append(str(error))
