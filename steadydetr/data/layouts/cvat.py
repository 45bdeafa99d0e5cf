"""CVAT's own format for images: annotations.xml with all shapes of all images, which lie in images/."""

from __future__ import annotations

import itertools
import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import ALL, InspectedLayout, Report, fault
from steadydetr.data.layouts.common import (
    Box,
    Listings,
    Remarks,
    box_around,
    choose_split,
    head_of,
    ids_of_names,
    splits_of,
    unsaid,
    whole_size,
)
from steadydetr.data.reading import expanded, is_file_name, xml_elements
from steadydetr.files import listed, printable
from steadydetr.kinds import register
from steadydetr.lazy import np

FILE = "annotations.xml"
VIDEO = "is an export of `CVAT for video`, which has tracks: export the task again as `CVAT for images 1.1`, with its images"


@register("cvat-layout")
@dataclass(frozen=True)
class Cvat(InspectedLayout):
    """CVAT for images 1.1. The subsets of a project are its splits."""

    looked_for = "CVAT: annotations.xml of `CVAT for images 1.1`, with images/"

    def recognises(self, where: str) -> bool:
        return b"<annotations" in head_of(expanded(where) / FILE).replace(b"\0", b"")  # of UTF-16

    def splits(self, where: str) -> tuple[str, ...]:
        root = expanded(where)
        return splits_of(read_cvat(root / FILE, self.folder(where), unsaid, Remarks()).subsets)

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root, source, remarks = expanded(where), self.folder(where), Remarks()
        path = root / FILE
        found = read_cvat(path, source, report, remarks)
        if not found.images or not found.classes:
            raise ValueError(f"{printable(path)} lists no {'image' if found.classes else 'label'} that can be used")
        subset, files = choose_split(path, found.subsets, split), Listings(root)
        images, shapes = found.images, found.shapes
        numbers = [image.number for image in images]
        named = len(set(numbers)) < len(numbers)  # each task of a project counts its images from 0
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and not trained on
            boxes = np.array(shapes.boxes, dtype=np.float64).astype(np.float32)
        index = AnnotationIndex.build(
            image_ids=ids_of_names([os.path.splitext(image.name)[0] for image in images]) if named else numbers,
            files=[_file_of(image, files) for image in images],
            sizes=[image.size for image in images],
            counts=[image.shapes for image in images],
            boxes_xyxy=boxes,
            labels=np.array(shapes.labels, dtype=np.int32),
            classes=found.classes,
            category_ids=tuple(range(1, len(found.classes) + 1)),
            crowd=np.array(shapes.crowd, dtype=bool),
            difficult=np.array(shapes.difficult, dtype=bool),
        ).keep_images(np.flatnonzero([image.subset == subset for image in images]))
        remarks.tell(path, report)
        return FolderDataset(index, root, f"{root.name}-{split}", source)


@dataclass(frozen=True)
class Shapes:
    """The boxes of all images, one after the other, in arrays because of their number."""

    boxes: array[float] = field(default_factory=lambda: array("d"))  # x0, y0, x1, y1 in pixels, of each
    labels: array[int] = field(default_factory=lambda: array("l"))
    crowd: array[int] = field(default_factory=lambda: array("b"))
    difficult: array[int] = field(default_factory=lambda: array("b"))


@dataclass(frozen=True)
class CvatImage:
    number: int
    name: str
    subset: str
    size: tuple[int, int]  # (h, w)
    shapes: int  # how many


@dataclass(frozen=True)
class CvatFile:
    classes: tuple[str, ...]  # the labels of the task, in its order
    images: list[CvatImage]
    shapes: Shapes

    @property
    def subsets(self) -> dict[str, None]:
        return dict.fromkeys(image.subset for image in self.images)


def read_cvat(path: Path, source: DataFolder, report: Report, remarks: Remarks) -> CvatFile:
    """Everything that the file says of all splits.

    Args:
        report: takes what is wrong with an image or a shape, which is then left out.
        remarks: takes what is made of shapes that are no boxes.

    Raises:
        ValueError: the file cannot be used at all; names it.
    """
    images, classes, shapes = list[CvatImage](), dict[str, int](), Shapes()
    elements = xml_elements(source.read_list(path), path)
    if (root := next(elements, None)) is None or root.tag != "annotations":
        raise ValueError(f"{printable(path)} is not a file of CVAT, whose root is <annotations>")
    for element in elements:
        if element.tag == "track":
            raise ValueError(f"{printable(path)} {VIDEO}")
        if element.tag == "meta":
            classes = _classes(element)
        elif element.tag == "image":
            images += _image(element, f"image {element.get('name') or len(images) + 1}", classes, shapes, path, report, remarks)
    return CvatFile(tuple(classes), images, shapes)


def _classes(meta: ElementTree.Element) -> dict[str, int]:
    """Position of every label of the task, job or project. Those of the points of a skeleton, which name a parent, are none."""
    labels = [label for label in meta.iter("label") if not (label.findtext("parent") or "").strip()]
    names = dict.fromkeys((label.findtext("name") or "").strip() for label in labels)
    return {name: position for position, name in enumerate(filter(None, names))}


def _image(
    element: ElementTree.Element, entry: str, classes: dict[str, int], shapes: Shapes, path: Path, report: Report, remarks: Remarks
) -> Iterator[CvatImage]:
    """The image of an element, whose boxes are added to `shapes`, or none if it cannot be used, which is reported."""
    name = element.get("name") or ""
    try:
        if not is_file_name(name):
            raise ValueError(f"its name {name[:80]!r} cannot be the name of a file")
        number, height, width = (_number(element, field) for field in ("id", "height", "width"))
        size = whole_size(height, width)
    except ValueError as error:
        report(fault("unusable image", path, entry, str(error)))
        return
    before = len(shapes.labels)
    for order, shape in enumerate(element, 1):
        if shape.get("outside") == "1":  # the object is not in the picture
            continue
        if shape.tag not in BOXES:
            remarks.left_out(f"shapes of the kind {shape.tag}", f"{entry}, {shape.tag} {order}")
            continue
        try:
            _add_shape(shape, f"{entry}, {shape.tag} {order}", classes, shapes, remarks)
        except ValueError as error:
            report(fault("unusable shape", path, f"{entry}, {shape.tag} {order}", str(error)))
    yield CvatImage(int(number), name, element.get("subset") or ALL, size, len(shapes.labels) - before)


def _add_shape(shape: ElementTree.Element, where: str, classes: dict[str, int], shapes: Shapes, remarks: Remarks) -> None:
    """Add class and box of a shape. ValueError for what is wrong with it."""
    label = (shape.get("label") or "").strip()
    if label not in classes:
        raise ValueError(f"its label {label[:80]!r} is none of the task: {listed(classes, 10)}")
    box, what = BOXES[shape.tag](shape)
    if what:
        remarks.boxed(what, where)
    on = {one.get("name") for one in shape if (one.text or "").strip().lower() in ("true", "1")}  # attributes that the user has defined
    shapes.boxes.extend(box)
    shapes.labels.append(classes[label])
    shapes.crowd.append(bool(on & {"is_crowd", "iscrowd"}))
    shapes.difficult.append("difficult" in on)


def _box(shape: ElementTree.Element) -> tuple[Box, str]:
    x0, y0, x1, y1 = (_number(shape, side) for side in ("xtl", "ytl", "xbr", "ybr"))
    angle = math.radians(_number(shape, "rotation", "0"))  # clockwise, about the centre
    if not angle:
        return (x0, y0, x1, y1), ""
    width, height = abs(x1 - x0) / 2, abs(y1 - y0) / 2
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    return _around((x0 + x1) / 2, (y0 + y1) / 2, width * cos + height * sin, width * sin + height * cos), "rotated boxes"


def _ellipse(shape: ElementTree.Element) -> tuple[Box, str]:
    x, y, width, height = (_number(shape, name) for name in ("cx", "cy", "rx", "ry"))
    angle = math.radians(_number(shape, "rotation", "0"))
    cos, sin = math.cos(angle), math.sin(angle)
    return _around(x, y, math.hypot(width * cos, height * sin), math.hypot(width * sin, height * cos)), "ellipses"


def _around(x: float, y: float, width: float, height: float) -> Box:
    """The box about a centre with half a width and half a height."""
    return x - width, y - height, x + width, y + height


def _polygon(shape: ElementTree.Element) -> tuple[Box, str]:
    pairs = [point.split(",") for point in (shape.get("points") or "").split(";")]
    try:
        points = [(_finite(x), _finite(y)) for x, y in pairs]
    except ValueError:
        raise ValueError("its points are not x,y;x,y;... in numbers") from None
    return box_around(points), "polygons"


def _mask(shape: ElementTree.Element) -> tuple[Box, str]:
    left, top, width, height = (_number(shape, name) for name in ("left", "top", "width", "height"))
    return (left, top, left + width, top + height), "masks"


BOXES = {"box": _box, "polygon": _polygon, "mask": _mask, "ellipse": _ellipse}  # how the box of each kind of shape is found


def _number(element: ElementTree.Element, name: str, default: str = "") -> float:
    text = element.get(name, default)
    try:
        return _finite(text)
    except ValueError:
        raise ValueError(f"{name} is {printable(text)[:80]!r} instead of a number" if text else f"{name} is empty or missing") from None


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _file_of(image: CvatImage, images: Listings) -> str:
    """Where an image lies: in images/ and its subset; frames of a video have names without ending."""
    places = [os.path.normpath(os.path.join(place, image.name)) for place in (f"images/{image.subset}", "images", "")]
    frames = map(images.image_of, places)
    return next((name for name in itertools.chain(places, frames) if images.is_there(name)), places[1])
