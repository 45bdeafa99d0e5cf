"""labelme: a JSON file for each image, which names it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.images import IMAGE_SUFFIXES
from steadydetr.data.layouts.base import ALL, Finding, InspectedLayout, Report, fault
from steadydetr.data.layouts.common import (
    AnnotatedImage,
    Box,
    Remarks,
    annotated_size,
    box_around,
    build_index,
    choose_split,
    files_below,
    head_of,
    is_split,
    some_files,
    splits_of,
)
from steadydetr.data.masks import FARTHEST, outline_length
from steadydetr.data.reading import decode_json, expanded, is_file_name
from steadydetr.files import printable
from steadydetr.kinds import register
from steadydetr.lazy import np

LOOKED_AT = 8  # JSON files of a folder, one of which must be labelme's
BOXED = {"polygon": 3, "oriented_rectangle": 4, "rotation": 4, "circle": 2, "mask": 2}  # points that each needs; the box is around it

GROUPED = "polygons of a group"
CORNERED = ("polygon", "oriented_rectangle", "rotation")  # whose points are those of a polygon


@register("labelme-layout")
@dataclass(frozen=True)
class Labelme(InspectedLayout):
    """JSON files beside their images or elsewhere below the folder; folders called train, val or test are splits."""

    gives_masks = True
    looked_for = "labelme: a *.json beside each image, with shapes (folders called train, val and test are splits)"

    def recognises(self, where: str) -> bool:
        return any(map(_is_labelme, islice(some_files(expanded(where), ".json"), LOOKED_AT)))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(_splits(list(files_below(expanded(where), (".json",)))))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        """The classes are those of all files, in the order of the alphabet, so that every split agrees on them."""
        root, source = expanded(where), self.folder(where)
        splits = _splits(list(files_below(root, (".json",))))
        name = choose_split(root, splits, split, "/")
        chosen, remarks, images, names = splits[name], Remarks(), list[AnnotatedImage](), set[str]()
        for files in splits.values():
            for file in files:
                annotated = _read(root, file, source, report if files is chosen else None, remarks, self.masks)
                if annotated is not None:
                    names.update(annotated.labels)
                    images += [annotated] * (files is chosen)
        if not images:
            raise ValueError(f"split {split!r} of {printable(root)} has no annotated image that can be used")
        remarks.tell(root, report)
        folder = name if all(file.startswith(f"{name}/") for file in chosen) else ""
        _report_without(root, folder, {image.file for image in images}, report)
        return FolderDataset(build_index(images, tuple(sorted(names)), self.masks), root, f"{root.name}-{split}", source)


def _is_labelme(path: Path) -> bool:
    head = head_of(path)
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and b'"shapes"' in head and (b'"points"' in head or b'"imagePath"' in head)


def _splits(files: Sequence[str]) -> Mapping[str, list[str]]:
    """The annotation files of each split: those below a folder that is named after one, or else all of them as one."""
    named: dict[str, list[str]] = {}
    for file in files:
        top = file.partition("/")[0]
        if is_split(top) and top != file:
            named.setdefault(top, []).append(file)
    return named or {ALL: list(files)}


class Shape(msgspec.Struct):
    """A shape with its class."""

    label: str
    points: list[tuple[float, float]]
    shape_type: str | None = "polygon"
    difficult: bool | None = False  # of X-AnyLabeling, which writes the same files
    group_id: Any = None  # polygons of a group and a label are the parts of one object


class AnnotationFile(msgspec.Struct):
    """The annotations of one image. The image itself, which may stand in the file as text, is not decoded."""

    shapes: list[Shape]
    imagePath: str | None = None
    imageHeight: float | None = None
    imageWidth: float | None = None


def _read(root: Path, file: str, source: DataFolder, report: Report | None, remarks: Remarks, masks: bool) -> AnnotatedImage | None:
    """The image of an annotation file; None where it cannot be used, which is reported.

    Args:
        report: None for a file of another split, of which only the classes matter.
        masks: whether polygons are kept as masks.
    """
    path = root / file
    try:
        found = decode_json(source.read_entry(path), path, AnnotationFile)
        image = _image_of(root, file, found.imagePath or "")
        size = annotated_size(found.imageHeight, found.imageWidth)
        labels, boxes, difficult, polygons = list[str](), list[Box](), list[bool](), list[list[list[float]]]()
        of_group: dict[tuple[str, object], int] = {}
        for number, shape in enumerate(found.shapes):
            entry = f"shapes[{number}] ({printable(shape.label)[:80]})"
            polygon = _polygon(shape, entry) if masks else []
            said = remarks if report else Remarks()
            box = _box(shape, entry, file, said, bool(polygon))
            if box is None:
                continue
            grouped = shape.group_id is not None and (shape.shape_type or "polygon") == "polygon"
            first = of_group.setdefault((shape.label, repr(shape.group_id) if grouped else number), len(boxes))
            if first < len(boxes):  # D-232
                said.add(GROUPED, "polygons of the label and group of another", "are parts of its object", f"{file}, {entry}")
                boxes[first] = box_around((boxes[first][:2], boxes[first][2:], box[:2], box[2:]))
                difficult[first] |= bool(shape.difficult)
                polygons[first].append(polygon)
                continue
            labels.append(shape.label)
            boxes.append(box)
            difficult.append(bool(shape.difficult))
            polygons.append([polygon] if polygon else [])
        if report is None:
            return AnnotatedImage(file, image, size or (0, 0), labels, boxes, difficult)
        size = size or source.picture_size(root / image)
        return AnnotatedImage(os.path.splitext(image)[0], image, size, labels, boxes, difficult, polygons if masks else None)
    except (msgspec.ValidationError, ValueError) as error:  # what a JSON file that is something else raises too
        if report is not None:
            report(fault("unreadable annotation file", path, "", str(error)))
        return None


def _image_of(root: Path, file: str, written: str) -> str:
    """The image of an annotation file, relative to the root: as written there, or else beside the file, by that name or the file's own.

    Raises ValueError for what can be no name.
    """
    written = written.replace("\\", "/")
    if written and not is_file_name(written):
        raise ValueError(f"imagePath {written!r} cannot be the name of a file")
    folder, stem = os.path.split(os.path.splitext(file)[0])
    named = os.path.normpath(os.path.join(folder, written)) if written else ""
    names = (os.path.basename(written), *(f"{stem}{one}" for ending in IMAGE_SUFFIXES for one in (ending, ending.upper())))
    beside = [os.path.join(folder, name) for name in names if name]
    inside = [name for name in (named, *beside) if name and not name.startswith("..") and not os.path.isabs(name)]
    return next((name for name in inside if os.path.lexists(root / name)), named or f"{os.path.join(folder, stem)}.jpg").replace(
        os.sep, "/"
    )


def _polygon(shape: Shape, entry: str) -> list[float]:
    """x, y, x, y, ... of a shape with corners; empty where it is another. Raises ValueError for one that is too large; names it."""
    if (shape.shape_type or "polygon") not in CORNERED or len(shape.points) < 3:
        return []
    corners = np.array(shape.points)
    if not ((np.abs(corners) < FARTHEST).all() and outline_length(corners) <= FARTHEST):
        raise ValueError(f"{entry} is too large for a mask: coordinates and outline must be below {FARTHEST} pixels")
    found: list[float] = corners.flatten().tolist()
    return found


def _box(shape: Shape, entry: str, file: str, remarks: Remarks, masked: bool = False) -> Box | None:
    """The box of a shape; None, counted, where it has none. Raises ValueError for a shape that cannot be read; names it.

    Args:
        masked: the shape itself is kept as a mask.
    """
    kind, points = shape.shape_type or "polygon", shape.points
    if not shape.label.strip():
        raise ValueError(f"{entry} has no label")
    if kind != "rectangle" and kind not in BOXED:
        remarks.left_out(f"shapes of the kind {kind}", f"{file}, {entry}")
        return None
    if len(points) < BOXED.get(kind, 2):
        raise ValueError(f"{entry} is a {printable(kind)} of {len(points)} points")
    if not all(math.isfinite(value) for point in points for value in point):
        raise ValueError(f"{entry} has coordinates that are not finite")
    if kind != "rectangle" and not masked:
        remarks.boxed(f"shapes of the kind {kind}", f"{file}, {entry}")
    if kind == "circle":  # its centre and a point on it
        (x, y), radius = points[0], math.dist(*points[:2])
        return x - radius, y - radius, x + radius, y + radius
    x0, y0, x1, y1 = box_around(points)
    return (x0, y0, x1 + 1, y1 + 1) if kind == "mask" else (x0, y0, x1, y1)  # the corners of a mask are its first and last pixel


def _report_without(root: Path, folder: str, annotated: set[str], report: Report) -> None:
    """A remark on images that have no annotation file."""
    prefix = f"{folder}/" if folder else ""
    without = [file for file in files_below(root / folder) if prefix + file not in annotated]
    if without:
        what = f"{len(without)} images, the first is {printable(without[0])}"
        message = "they have no annotation file: labelme writes one for an image without objects too"
        report(Finding("images left out", printable(root / folder), what, message))
