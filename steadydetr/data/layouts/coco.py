"""COCO annotations: of COCO itself, and of Roboflow's exports, which lie elsewhere."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.index import AnnotationIndex, Federated, Ids, find_ids, id_array
from steadydetr.data.layouts.base import ALL, STANDARD, Finding, InspectedLayout, NoSplit, Report, fault, stop
from steadydetr.data.layouts.common import (
    ALIASES,
    Remarks,
    annotated_size,
    choose_split,
    decode_entries,
    splits_of,
    standard_split,
)
from steadydetr.data.reading import Id, Name, decode_json, expanded, is_file_name, name_on_disk, nulls_for_nan
from steadydetr.files import printable
from steadydetr.kinds import register
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROBOFLOW = "_annotations.coco.json"
AWAY = re.compile(r"([A-Za-z]:)?[\\/]|\.\.[\\/]")  # how a path begins that leads out of the folder


@register("coco-layout")
@dataclass(frozen=True)
class Coco(InspectedLayout):
    """annotations/instances_SPLIT*.json beside folders of images."""

    looked_for = "COCO: annotations/instances_SPLIT*.json beside folders of images"

    def recognises(self, where: str) -> bool:
        return any(expanded(where).glob("annotations/instances_*.json"))

    def splits(self, where: str) -> tuple[str, ...]:
        names = [path.stem.removeprefix("instances_") for path in self._files(where, "")]
        return splits_of(next((split for split in STANDARD if name.lower().startswith(split)), standard_split(name)) for name in names)

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
        return read_coco(matching[0], places, f"{root.name}-{name}", self.folder(where), report)

    def _files(self, where: str, split: str) -> list[Path]:
        """The annotation file of that very split, or else those whose split begins like it, if in capitals; `all`: the only one."""
        files = sorted(expanded(where).glob("annotations/instances_*.json"))
        if split == ALL and self.splits(where) == (ALL,):
            return files
        names = {path: path.stem.removeprefix("instances_") for path in files}
        alike = [path for path in files if names[path].lower().startswith(ALIASES.get(split.lower(), split.lower()))]
        alike = alike or [path for path in files if standard_split(names[path]) == split]
        return [path for path in files if names[path] == split] or alike


@register("roboflow-layout")
@dataclass(frozen=True)
class Roboflow(InspectedLayout):
    """SPLIT/_annotations.coco.json with the images beside it; validation is called valid."""

    looked_for = "Roboflow: SPLIT/_annotations.coco.json with the images beside it (SPLIT: train, valid, test)"

    def recognises(self, where: str) -> bool:
        return bool(self._splits(where))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(self._splits(where))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root = expanded(where)
        folder = root / choose_split(root, self._splits(where), split, "/")
        return read_coco(folder / ROBOFLOW, [folder], f"{root.name}-{folder.name}", self.folder(where), report)

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
    category_id: Id | float | str  # whole numbers once the file is read
    bbox: tuple[float, float, float, float]
    id: Any = None  # many exports have texts here; it is used only to name the annotation
    area: Number = None
    iscrowd: float | bool | None = 0


class CocoCategory(msgspec.Struct):
    id: Id
    name: str
    supercategory: Any = None


class CocoFile(msgspec.Struct):
    images: Sequence[CocoImage]
    categories: Sequence[CocoCategory]
    annotations: list[CocoAnnotation]

    @staticmethod
    def federated(images: Sequence[Any], categories: Sequence[Any]) -> Federated | None:
        """What the images and categories that are used say of a federated data set; COCO is none."""
        return None


class RawFile(msgspec.Struct):
    """A COCO file whose entries are not decoded yet."""

    images: list[msgspec.Raw]
    categories: list[msgspec.Raw]
    annotations: list[msgspec.Raw]


def read_coco(
    path: Path,
    places: Sequence[Path],
    name: str,
    source: DataFolder | None = None,
    report: Report = stop,
    kind: type[CocoFile] = CocoFile,
) -> FolderDataset:
    """Read a COCO JSON file. Classes are the file's categories in the order of their ids, whatever gaps those have.

    Args:
        places: folders that the file names may be relative to; the first that holds the images is taken.
        source: the data folder; that folder if not given.
        report: takes what is wrong with an entry, which is then left out.
        kind: what the file holds, if it is more than a COCO file.

    Raises:
        ValueError: the file cannot be used at all; names it.
    """
    data = _decode((source or DataFolder(path.parent)).read_list(path), path, report, kind)
    folder = _image_folder(places, data.images)
    source = source or DataFolder(folder)
    data.annotations = list(_with_category_ids(data.annotations, path, report))
    categories = list(_usable_categories(data, path, report))
    images, sizes = _usable_images(data, path, folder, source, report)
    if not categories or not images:
        raise ValueError(f"{printable(path)} lists no {'image' if categories else 'category'} that can be used")
    image_ids = id_array([image.id for image in images])
    total = len(data.annotations)
    positions = find_ids(image_ids, id_array(a.image_id for a in data.annotations))
    labels = find_ids(id_array(c.id for c in categories), id_array(int(a.category_id) for a in data.annotations))
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
        federated=data.federated(images, categories),
    )
    return FolderDataset(index, folder, name, source)


def _image_folder(places: Sequence[Path], images: Sequence[CocoImage]) -> Path:
    """The first of the folders that holds one of the first images: their names may begin with the folder's own, `train/1.png`."""
    there = [place for place in places if place.is_dir()] or list(places[-1:])
    names = [image.file_name for image in images[:20] if is_file_name(image.file_name)]
    return next((p for p in there if any(os.path.lexists(p / _name_here(p, name)) for name in names)), there[0])


def _name_here(folder: Path, name: str) -> str:
    """The name of a file in the folder; of a path that leads out of it to nothing, as it was on another machine, the longest end that is
    a file here: Label Studio writes `..\\..\\label-studio\\media\\upload\\4\\a.png` for images/a.png (D-126)."""
    found = name_on_disk(folder, name)
    if not AWAY.match(name) or os.path.lexists(folder / found):
        return found
    parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".", "..")]
    ends = (name_on_disk(folder, "/".join(parts[start:])) for start in range(len(parts)))
    return next((end for end in ends if os.path.lexists(folder / end)), found)


def _with_category_ids(annotations: list[CocoAnnotation], path: Path, report: Report) -> Iterator[CocoAnnotation]:
    """The annotations with whole numbers as ids of categories, which some tools write as "3" or 3.0; what is no number is reported."""
    for number, annotation in enumerate(annotations):
        if type(annotation.category_id) is not int:
            try:
                value = msgspec.convert(annotation.category_id, Id, strict=False)
            except msgspec.ValidationError as error:
                wrong = f"is not as a COCO annotation file has it: {error} - at `category_id`"
                report(fault("not COCO", path, f"annotations[{number}]", wrong))
                continue
            annotation = msgspec.structs.replace(annotation, category_id=value)
        yield annotation


def _decode(content: bytes, path: Path, report: Report, kind: type[CocoFile]) -> CocoFile:
    """Decode only the fields that are used. Polygons, most of the file, are skipped."""
    try:
        return decode_json(content, path, kind)
    except msgspec.ValidationError as error:
        whole = error
    except ValueError:
        content = nulls_for_nan(content, path)
        if not content:
            raise

        def with_reason(finding: Finding) -> None:
            report(replace(finding, message=f"{finding.message}; NaN and Infinity count as null"))

        return _decode(content, path, with_reason, kind)
    try:
        raw = decode_json(content, path, RawFile)
    except msgspec.ValidationError:  # a list is missing or is no list
        raise ValueError(f"{printable(path)} is not a COCO annotation file: {whole}") from whole
    types = {field.name: get_args(field.type)[0] for field in msgspec.structs.fields(kind)}
    return kind(
        images=list(decode_entries(raw.images, "images", types["images"], path, report, "COCO")),
        categories=list(decode_entries(raw.categories, "categories", types["categories"], path, report, "COCO", strict=False)),
        annotations=list(decode_entries(raw.annotations, "annotations", CocoAnnotation, path, report, "COCO")),
    )


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
    images, sizes, ids, remarks = list[CocoImage](), list[tuple[int, int]](), set[int | str](), Remarks()
    taken = {i.file_name for i in data.images} if any(AWAY.match(i.file_name) for i in data.images) else set()
    for image in data.images:
        entry = f"image {printable(image.id)[:80]}"
        if image.id in ids:
            report(fault("image id used twice", path, entry, "ids must be unique"))
            continue
        ids.add(image.id)
        if not is_file_name(image.file_name):
            report(fault("impossible file name", path, entry, f"file_name {image.file_name!r} cannot be the name of a file"))
            continue
        written, name = image.file_name, _name_here(folder, image.file_name)
        if AWAY.match(written) and not AWAY.match(name):
            if name in taken:
                message = f"file_name {written!r} is not there, and its end, {name!r}, is another image"
                report(fault("path of another place", path, entry, message))
                continue
            taken.add(name)
            remarks.add("paths of another place", "paths that lead elsewhere", "are read by their ends", f"{name} in place of {written}")
        image = msgspec.structs.replace(image, file_name=name)
        try:
            size = annotated_size(image.height, image.width) or source.picture_size(folder / image.file_name)
        except ValueError as error:
            report(fault("unknown image size", path, entry, str(error)))
            continue
        images.append(image)
        sizes.append(size)
    remarks.tell(path, report)
    return images, sizes


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
