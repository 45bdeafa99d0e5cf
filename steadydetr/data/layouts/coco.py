"""COCO annotations: of COCO itself, and of Roboflow's exports, which lie elsewhere."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.index import AnnotationIndex, Ids, find_ids, id_array
from steadydetr.data.layouts.base import (
    ALIASES,
    ALL,
    STANDARD,
    DataLayout,
    Finding,
    NoSplit,
    Report,
    choose_split,
    fault,
    splits_of,
    stop,
)
from steadydetr.data.reading import LONGEST, Id, Name, decode_json, expanded, is_file_name, nulls_for_nan
from steadydetr.files import printable
from steadydetr.kinds import register

ROBOFLOW = "_annotations.coco.json"
FIRST = 20  # images by which the folder of all is found
T = TypeVar("T")


@register("coco-layout")
@dataclass(frozen=True)
class Coco(DataLayout):
    """annotations/instances_SPLIT*.json beside folders of images."""

    looked_for = "COCO       annotations/instances_SPLIT*.json beside folders of images"

    def recognises(self, where: str) -> bool:
        return any(expanded(where).glob("annotations/instances_*.json"))

    def splits(self, where: str) -> tuple[str, ...]:
        names = [path.stem.removeprefix("instances_") for path in self._files(where, "")]
        return splits_of(next((split for split in STANDARD if name.lower().startswith(split)), name) for name in names)

    def open(self, where: str, split: str) -> FolderDataset:
        return self.inspect(where, split, stop)

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root, matching = expanded(where), self._files(where, split)
        if len(matching) != 1:
            what = "no annotation file" if not matching else "several annotation files"
            present = ", ".join(printable(path.name) for path in self._files(where, ""))
            message = f"{printable(root / 'annotations')} has {what} for split {split!r}; it holds {present}."
            kind = ValueError if matching else NoSplit
            raise kind(f"{message} Name one with --data.train-split or --data.val-split")
        name = matching[0].stem.removeprefix("instances_")
        places = [root / name, root / "images" / name, root / "images", root]
        images = next((place for place in places if place.is_dir()), root)
        return read_coco(matching[0], images, f"{root.name}-{name}", self.folder(where), report)

    def _files(self, where: str, split: str) -> list[Path]:
        """The annotation file of that very split, or else those whose split begins like it, if in capitals; `all`: the only one."""
        files = sorted(expanded(where).glob("annotations/instances_*.json"))
        if split == ALL and self.splits(where) == (ALL,):
            return files
        names = {path: path.stem.removeprefix("instances_") for path in files}
        alike = [path for path in files if names[path].lower().startswith(ALIASES.get(split.lower(), split.lower()))]
        return [path for path in files if names[path] == split] or alike


@register("roboflow-layout")
@dataclass(frozen=True)
class Roboflow(DataLayout):
    """SPLIT/_annotations.coco.json with the images beside it; validation is called valid."""

    looked_for = "Roboflow   SPLIT/_annotations.coco.json with the images beside it (SPLIT: train, valid, test)"

    def recognises(self, where: str) -> bool:
        return bool(self._splits(where))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(self._splits(where))

    def open(self, where: str, split: str) -> FolderDataset:
        return self.inspect(where, split, stop)

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root = expanded(where)
        folder = root / choose_split(root, self._splits(where), split)
        return read_coco(folder / ROBOFLOW, folder, f"{root.name}-{folder.name}", self.folder(where), report)

    def _splits(self, where: str) -> list[str]:
        return sorted(path.parent.name for path in expanded(where).glob(f"*/{ROBOFLOW}"))


Number = float | None


class CocoImage(msgspec.Struct, gc=False):
    id: Name
    file_name: str
    height: Number = None
    width: Number = None


class CocoAnnotation(msgspec.Struct, gc=False):
    image_id: Name
    category_id: Id
    bbox: tuple[float, float, float, float]
    id: Any = None  # many exports have texts here; it is used only to name the annotation
    area: Number = None
    iscrowd: float | bool | None = 0


class CocoCategory(msgspec.Struct):
    id: Id
    name: str
    supercategory: Any = None


class CocoFile(msgspec.Struct):
    images: list[CocoImage]
    categories: list[CocoCategory]
    annotations: list[CocoAnnotation]


class RawFile(msgspec.Struct):
    """A COCO file whose entries are not decoded yet."""

    images: list[msgspec.Raw]
    categories: list[msgspec.Raw]
    annotations: list[msgspec.Raw]


def read_coco(
    path: Path, folder: Path | Sequence[Path], name: str, source: DataFolder | None = None, report: Report = stop
) -> FolderDataset:
    """Read a COCO JSON file. Classes are the file's categories in the order of their ids, whatever gaps those have.

    Args:
        folder: what the file names are relative to; of several, that in which the first ones are found.
        source: the data folder; `folder` if not given, which then is a single one.
        report: takes what is wrong with an entry, which is then left out.

    Raises:
        ValueError: the file cannot be used at all; names it.
    """
    source = source or DataFolder(folder if isinstance(folder, Path) else folder[0])
    data = _decode(source.read_list(path), path, report)
    if not isinstance(folder, Path):
        files = [image.file_name for image in data.images[:FIRST] if is_file_name(image.file_name)]
        folder = max(folder, key=lambda place: sum(os.path.lexists(place / file) for file in files))
    categories = list(_usable_categories(data, path, report))
    images, sizes = _usable_images(data, path, folder, source, report)
    if not categories or not images:
        raise ValueError(f"{printable(path)} lists no {'image' if categories else 'category'} that can be used")
    image_ids = id_array([image.id for image in images])
    total = len(data.annotations)
    positions = find_ids(image_ids, id_array(a.image_id for a in data.annotations))
    labels = find_ids(id_array(c.id for c in categories), id_array(a.category_id for a in data.annotations))
    _report_references(data, (positions < 0) | (labels < 0), path, report)
    order = np.argsort(positions, kind="stable")
    order = order[(positions[order] >= 0) & (labels[order] >= 0)]
    with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is infinite, and not trained on
        corners = np.fromiter((v for a in data.annotations for v in a.bbox), np.float64, 4 * total).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = corners.astype(np.float32)
        areas = np.array([-1 if a.area is None else a.area for a in data.annotations], dtype=np.float64).astype(np.float32)
        areas = np.where(areas < 0, (boxes[:, 2:] - boxes[:, :2]).prod(1), areas)
    index = AnnotationIndex.build(
        image_ids=image_ids,
        files=[image.file_name for image in images],
        sizes=sizes,
        counts=np.bincount(positions[order], minlength=len(images)),
        boxes_xyxy=boxes[order],
        labels=labels[order],
        classes=tuple(c.name for c in categories),
        category_ids=tuple(c.id for c in categories),
        crowd=np.fromiter((bool(a.iscrowd) for a in data.annotations), bool, total)[order],
        areas=areas[order],
        annotation_ids=_annotation_ids(data, path, report)[order],
    )
    return FolderDataset(index, folder, name, source)


def _decode(content: bytes, path: Path, report: Report) -> CocoFile:
    """Decode only the fields that are used. Polygons, most of the file, are skipped."""
    try:
        return decode_json(content, path, CocoFile)
    except msgspec.ValidationError as error:
        whole = error
    except ValueError:
        content = nulls_for_nan(content, path)
        if not content:
            raise
        return _decode(
            content, path, lambda finding: report(replace(finding, message=f"{finding.message}; NaN and Infinity count as null"))
        )
    try:
        raw = decode_json(content, path, RawFile)
    except msgspec.ValidationError:  # a list is missing or is no list
        raise ValueError(f"{printable(path)} is not a COCO annotation file: {whole}") from whole
    return CocoFile(
        images=list(_entries(raw.images, "images", CocoImage, path, report)),
        categories=list(_entries(raw.categories, "categories", CocoCategory, path, report)),
        annotations=list(_entries(raw.annotations, "annotations", CocoAnnotation, path, report)),
    )


def _entries(raw: Iterable[msgspec.Raw], field: str, kind: type[T], path: Path, report: Report) -> Iterator[T]:
    """The entries of a list, decoded one by one because there is at least one in the file that cannot be."""
    for number, entry in enumerate(raw):
        try:
            yield msgspec.json.decode(entry, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            for wrong in _wrong_fields(entry, kind) or [str(error).replace("`$", f"`{field}[{number}]")]:
                report(fault("not COCO", path, f"{field}[{number}]", f"is not as a COCO annotation file has it: {wrong}"))


def _wrong_fields(entry: msgspec.Raw, kind: type[Any]) -> list[str]:
    """What is wrong with every field of an entry; empty where it has no fields at all."""
    try:
        values = msgspec.json.decode(entry)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    found = []
    for field in msgspec.structs.fields(kind) if isinstance(values, dict) else ():
        if field.name not in values and field.required:
            found.append(f"Object missing required field `{field.name}`")
        elif field.name in values:
            try:
                msgspec.convert(values[field.name], field.type)
            except (ValueError, OverflowError) as error:
                place = str(error).replace("`$", f"`{field.name}")
                found.append(place if "`" + field.name in place else f"{place} - at `{field.name}`")
    return found


def _usable_categories(data: CocoFile, path: Path, report: Report) -> Iterator[CocoCategory]:
    """The classes. Roboflow writes a category 0 that all others name as theirs, and that no box has: it is none (D-104)."""
    groups = [c.supercategory for c in data.categories]
    used = any(a.category_id == 0 for a in data.annotations)
    ids, names = set[int](), set[str]()
    for category in sorted(data.categories, key=lambda c: c.id):
        if category.id == 0 and category.supercategory in ("none", "", None) and category.name in groups and not used:
            continue
        if not category.name.strip():
            report(fault("category without name", path, f"category {category.id}", "its name is empty"))
        elif category.id in ids:
            report(fault("category id used twice", path, f"category {category.id}", f"{category.name!r} has the id of another category"))
        elif category.name in names:
            message = f"another category is called {category.name!r} too: results would not tell them apart"
            report(fault("category name used twice", path, f"category {category.id}", message))
        else:
            yield category
        ids.add(category.id)
        names.add(category.name)


def _usable_images(
    data: CocoFile, path: Path, folder: Path, source: DataFolder, report: Report
) -> tuple[list[CocoImage], list[tuple[int, int]]]:
    """The images that can be used, and their sizes (h, w), which are read from the image files where the annotations have none."""
    images, sizes, ids = list[CocoImage](), list[tuple[int, int]](), set[int | str]()
    for image in data.images:
        entry = f"image {printable(image.id)[:80]}"
        if image.id in ids:
            report(fault("image id used twice", path, entry, "ids must be unique"))
            continue
        ids.add(image.id)
        if not is_file_name(image.file_name):
            report(fault("impossible file name", path, entry, f"file_name {image.file_name!r} cannot be the name of a file"))
            continue
        try:
            size = _size(image) or source.picture_size(folder / image.file_name)
        except ValueError as error:
            report(fault("unknown image size", path, entry, str(error)))
            continue
        images.append(image)
        sizes.append(size)
    return images, sizes


def _size(image: CocoImage) -> tuple[int, int] | None:
    """Height and width as annotated; None where they are missing, or 0 or -1, which some tools write for unknown."""
    height, width = image.height or 0, image.width or 0
    if height <= 0 or width <= 0:
        return None
    if height != int(height) or width != int(width) or max(height, width) > LONGEST:
        raise ValueError(f"width {width:g} and height {height:g} are no size of an image in pixels")
    return int(height), int(width)


def _report_references(data: CocoFile, bad: NDArray[np.bool_], path: Path, report: Report) -> None:
    """Report the annotations among the `bad` ones that refer to an image or category which the file does not list at all."""
    if not bad.any():
        return
    images, categories = {i.id for i in data.images}, {c.id for c in data.categories}
    for row in np.flatnonzero(bad).tolist():
        annotation = data.annotations[row]
        entry = f"annotation {_shown_id(annotation, row)}"
        if annotation.image_id not in images:
            report(fault("unknown image", path, entry, f"its image_id {repr(annotation.image_id)[:80]} is no image that the file lists"))
        if annotation.category_id not in categories:
            report(fault("unknown class", path, entry, f"its category_id {annotation.category_id} is no category that the file lists"))


def _shown_id(annotation: CocoAnnotation, row: int) -> str:
    return f"number {row}" if annotation.id is None else printable(annotation.id)[:80]


def _annotation_ids(data: CocoFile, path: Path, report: Report) -> Ids:
    """The ids of the annotations, which only name them: where one has none, its number from 1; what is no number as text."""
    ids = [a.id for a in data.annotations]
    if not {*map(type, ids)} <= {int}:
        ids = [number if i is None else i if type(i) is int else str(i) for number, i in enumerate(ids, 1)]
    if len(set(ids)) < len(ids):
        for value in (value for value, times in Counter(ids).items() if times > 1):
            report(Finding("annotation id used twice", printable(path), f"annotation {printable(value)[:80]}", "ids must be unique"))
    return id_array(ids)
