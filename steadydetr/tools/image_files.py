"""Detections of many image files: COCO results, a picture of each, and a map of its masks."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec
from PIL import Image
from rich.progress import track

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.data.folder import DataFolder
from steadydetr.data.images import IMAGE_SUFFIXES, open_picture
from steadydetr.data.picture_inputs import is_address
from steadydetr.data.reading import Name, decode_json, expanded, is_file_name, is_hidden, name_on_disk, read_file
from steadydetr.data.video import VIDEO_SUFFIXES, frames, is_video
from steadydetr.detectors import Prediction
from steadydetr.files import claim_folder, printable, replacing
from steadydetr.limits import DEFAULT_LIMITS, Limits
from steadydetr.metrics.results import Results, coco_results
from steadydetr.tools.detections import THRESHOLD, Detections
from steadydetr.tools.predictor import Predictor

RESULTS, MASKS = "results.json", "masks"
LONGEST_NAME = 255  # bytes of a file's name, on all usual file systems


@dataclass(frozen=True)
class ImageFile:
    """An image file, or a frame of a video, and the id that its results are written with."""

    path: Path | str  # a text is an address of the network
    image_id: int | str
    name: str  # what its results call it: the path as it was given, or the list's file name
    frame: int = 0  # of a video, from 1 on


class ImageEntry(msgspec.Struct):
    id: Name
    file_name: str


class ImageList(msgspec.Struct):
    """A COCO annotation file of which only the images are read, such as image_info_test-dev2017.json."""

    images: list[ImageEntry]


def list_sources(paths: Iterable[Path | str], image_folder: Path | None = None, limits: Limits = DEFAULT_LIMITS) -> list[ImageFile]:
    """The images that paths stand for, in order. A path is an image or video file, a folder of them, a COCO image list or an address.

    Args:
        image_folder: where the images of COCO image lists are; beside each list if not given.
        limits: what may be read: whether images outside that folder, and how large a list.

    Raises:
        ValueError: a path does not exist or holds no image, or a list cannot be read.
    """
    sources: list[ImageFile] = []
    for given in paths:
        if is_address(given):
            sources.append(ImageFile(given, len(sources) + 1, given))
            continue
        path = expanded(given)
        if os.path.isdir(path):
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in {*IMAGE_SUFFIXES, *VIDEO_SUFFIXES} and not is_hidden(p.name))
            if not found:
                raise ValueError(f"the folder {path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}) and no video")
            sources += [ImageFile(p, len(sources) + i + 1, str(p)) for i, p in enumerate(found)]
        elif path.suffix.lower() == ".json" and os.path.exists(path):
            sources += _read_list(path, DataFolder(image_folder or path.parent, limits))
        elif os.path.exists(path):
            sources.append(ImageFile(path, len(sources) + 1, str(path)))
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
    found: dict[int | str, ImageFile] = {}
    for entry in listed.images:
        if entry.id in found:
            raise ValueError(f"{printable(path)}: image id {entry.id} is used twice: their detections could not be told apart")
        if not is_file_name(entry.file_name):
            raise ValueError(f"{printable(path)}: image {entry.id}: {printable(repr(entry.file_name))} cannot be the name of a file")
        file = folder.root / name_on_disk(folder.root, entry.file_name)
        folder.check_inside(file)
        found[entry.id] = ImageFile(file, entry.id, entry.file_name)
    files = list(found.values())
    if files and not any(Path(file.path).exists() for file in files[:100]):
        raise ValueError(
            f"{printable(path)}: its images are not in {printable(folder.root)}, such as {printable(files[0].name)}: name their folder by"
            " --image-folder"
        )
    return files


@dataclass(frozen=True)
class PredictionReport:
    """What `predict_files` did."""

    images: int  # frames of videos too
    detections: int
    drawn: int  # detections that pictures show
    failures: tuple[str, ...]  # images and videos that could not be read, or not to their end, with the reason


def predict_files(
    loaded: Predictor,
    paths: Sequence[Path | str],
    output: Path,
    *,
    image_folder: Path | None = None,
    threshold: float = THRESHOLD,
    draw: bool = True,
    masks: bool = True,
    batch_size: int = 4,
    overwrite: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> PredictionReport:
    """Write the detections of many images into the folder `output`: `results.json` (COCO results) and a picture of each image; of a
    detector that predicts masks also `masks/NAME.png`, a map of 16 bits of the masks that the picture shows (`Detections.label_map`).

    An image that cannot be read is named in the report, and the others are done. `results.json` appears when all are.

    Args:
        output: a new or empty folder.
        image_folder: where the images of COCO image lists are.
        threshold: least score that is drawn; the results have all scores.
        draw: whether to draw pictures.
        masks: whether to write maps of masks, where the detector predicts masks.
        limits: what may be read: whether listed images outside the folder, and how large.
        overwrite: whether `output` may hold files already. Those of the same names are replaced, but never an image that is read.

    Raises:
        FileExistsError: `output` holds files already, or an image list where `results.json` is to be.
        ValueError: a path does not exist or holds no image, or a list cannot be read.
    """
    sources = list_sources(paths, image_folder, limits)
    for path in paths:
        if os.path.realpath(path) == os.path.realpath(output / RESULTS):
            raise FileExistsError(f"{printable(path)} would be replaced by the results: choose another --output")
    claim_folder(output, "predict", overwrite=overwrite)
    named = [_named(source.path) for source in sources]
    names = zip(picture_names(named, output), picture_names(named, output / MASKS), strict=True)
    todo = list(zip(sources, names, strict=True))
    failures: list[str] = []
    images = written = shown = 0
    with replacing(output / RESULTS) as file:
        numbers = [source.image_id for source in sources if isinstance(source.image_id, int)]
        frame_ids = count(1 + max(numbers, default=0))
        readable = _readable(track(todo, description="detect"), limits, failures, frame_ids)
        while pictures := list(islice(readable, batch_size)):
            images += len(pictures)
            detected = loaded.predict([picture for *_, picture in pictures], 0)
            for (source, (name, map_name), picture), found in zip(pictures, detected, strict=True):
                for row in _rows(source, found, loaded.card):
                    file.write(f"{',' if written else '['}\n{json.dumps(row)}".encode())
                    written += 1
                above = found.above(threshold)
                if draw:
                    shown += len(above)
                    _save(found.draw(picture, threshold), output / name)
                if masks and found.masks is not None:
                    _save(Image.fromarray(above.label_map()), output / MASKS / map_name)
        file.write(b"\n]\n" if written else b"[]\n")
    return PredictionReport(images, written, shown, tuple(failures))


def _save(picture: Image.Image, path: Path) -> None:
    """As a PNG, which appears as a whole."""
    with replacing(path) as file:
        picture.save(file, "PNG")


def _named(path: Path | str) -> Path:
    """The path whose name the picture of a source gets: of an address its last part."""
    return path if isinstance(path, Path) else Path(unquote(urlsplit(path).path).rpartition("/")[2] or "image")


def picture_names(paths: Sequence[Path], output: Path) -> list[str]:
    """A name in `output` for the picture of every image: its own with .png, and more of it where another image has the same.

    No two names differ by capital letters alone, and none is that of an image that lies in `output`, or that a link among `paths` leads to.
    """
    folder = os.path.realpath(output)
    places = [os.path.split(place) for path in paths for place in (os.path.realpath(path), Path(os.path.realpath(path.parent), path.name))]
    taken = {name.casefold() for parent, name in places if parent == folder}
    names: list[str] = []
    for path in paths:
        stems = [path.stem, path.name.replace(".", "_"), f"{path.parent.name}_{path.stem}"]
        numbered = (f"{path.stem[:50]}_{number}" for number in count(2))
        names.append(next(name for stem in chain(stems, numbered) if _is_free_name(name := f"{stem}.png", taken)))
        taken.add(names[-1].casefold())
    return names


def _is_free_name(name: str, taken: Collection[str]) -> bool:
    return name.casefold() not in taken and len(os.fsencode(name)) <= LONGEST_NAME


def _rows(source: ImageFile, found: Detections, card: DetectorCard) -> Iterator[dict[str, object]]:
    """The detections of one image as COCO results, with the image's file (and frame) and the class's name beside the ids."""
    results = Results.of([source.image_id], [Prediction(found.boxes_xyxy, found.scores, found.labels, found.masks)])
    frame = {"frame": source.frame} if source.frame else {}
    for row, label in zip(coco_results(results, card.category_ids), found.labels.tolist(), strict=True):
        yield row | {"file_name": source.name, **frame, "category_name": card.classes[label]}


def _readable(
    todo: Iterable[tuple[ImageFile, tuple[str, str]]], limits: Limits, failures: list[str], frame_ids: Iterator[int]
) -> Iterator[tuple[ImageFile, tuple[str, str], Image.Image]]:
    """The images that can be read, with the names of their pictures and maps of masks; why others cannot is added to `failures`.

    The frames of a video have ids of their own, after those of all images, and their pictures lie in a folder of the video's name.
    """
    for source, names in todo:
        try:
            if is_video(source.path):
                for number, picture in enumerate(frames(Path(source.path), limits), 1):
                    frame = replace(source, image_id=next(frame_ids), frame=number)
                    name, map_name = (f"{name.removesuffix('.png')}_frames/{number:06d}.png" for name in names)
                    yield frame, (name, map_name), picture
            else:
                yield source, names, open_picture(source.path, limits)
        except ValueError as error:
            failures.append(str(error))
