"""Data sets on disk: COCO and Pascal VOC annotations over folders of image files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from steadydetr.data.index import AnnotationIndex

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


class Dataset(Protocol):
    """What loading needs of a data set."""

    @property
    def name(self) -> str: ...
    @property
    def index(self) -> AnnotationIndex: ...
    def load_image(self, position: int) -> NDArray[np.uint8]:
        """RGB [H, W, 3]."""


@dataclass(frozen=True)
class FolderDataset:
    index: AnnotationIndex
    folder: Path  # what the index's file names are relative to
    name: str

    def load_image(self, position: int) -> NDArray[np.uint8]:
        """RGB [H, W, 3]; an unreadable file is a ValueError that names it."""
        path = self.folder / self.index.file(position)
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot read the image {path}: {error}. `steadydetr check` lists all such files") from error
        if pixels.shape[:2] != tuple(self.index.sizes[position]):
            height, width = self.index.sizes[position]
            raise ValueError(
                f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, its annotation says {width} x {height}: boxes would be misplaced"
            )
        return pixels

    def missing_files(self) -> list[str]:
        """Names of the index that are not on disk; one listing a folder, not one look a file."""
        names = [self.index.file(i) for i in range(len(self.index))]
        present: dict[str, set[str]] = {}
        for parent in {os.path.dirname(name) for name in names}:
            folder = self.folder / parent
            present[parent] = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
        return [name for name in names if os.path.basename(name) not in present[os.path.dirname(name)]]


class CocoImage(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int = 0
    width: int = 0


class CocoAnnotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int = 0
    area: float = -1.0
    iscrowd: int = 0


class CocoCategory(msgspec.Struct):
    id: int
    name: str


class CocoFile(msgspec.Struct):
    images: list[CocoImage]
    categories: list[CocoCategory]
    annotations: list[CocoAnnotation]


def decode_coco(path: Path) -> CocoFile:
    """Only the fields that are used are decoded: polygons, most of the file, are skipped without building them."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=CocoFile)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a COCO annotation file: {error}") from error


def read_coco(path: Path, folder: Path, name: str) -> FolderDataset:
    """COCO JSON. Classes are the file's categories in the order of their ids, whatever gaps those have."""
    data = decode_coco(path)
    categories = sorted((c for c in data.categories if _is_used(c, data)), key=lambda c: c.id)
    image_ids = np.fromiter((image.id for image in data.images), np.int64, len(data.images))
    if len(np.unique(image_ids)) < len(image_ids):
        ids, counts = np.unique(image_ids, return_counts=True)
        raise ValueError(f"{path}: image ids used twice: {_some(ids[counts > 1])}. `steadydetr check` lists every finding")
    total = len(data.annotations)
    raw_image = np.fromiter((a.image_id for a in data.annotations), np.int64, total)
    raw_category = np.fromiter((a.category_id for a in data.annotations), np.int64, total)
    positions = lookup(image_ids, raw_image, f"{path}: annotations of images that the file does not list, image_id")
    category_ids = np.array([c.id for c in categories], dtype=np.int64)
    labels = lookup(category_ids, raw_category, f"{path}: annotations of categories that the file does not list, category_id")
    boxes = np.fromiter((v for a in data.annotations for v in a.bbox), np.float32, 4 * total).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    areas = np.fromiter((a.area for a in data.annotations), np.float32, total)
    order = np.argsort(positions, kind="stable")
    index = AnnotationIndex.build(
        image_ids=image_ids,
        files=[image.file_name for image in data.images],
        sizes=np.array([(image.height, image.width) for image in data.images]).reshape(-1, 2),
        counts=np.bincount(positions, minlength=len(image_ids)),
        boxes_xyxy=boxes[order],
        labels=labels[order],
        classes=tuple(c.name for c in categories),
        category_ids=tuple(c.id for c in categories),
        crowd=np.fromiter((a.iscrowd for a in data.annotations), bool, total)[order],
        areas=np.where(areas < 0, (boxes[:, 2:] - boxes[:, :2]).prod(1), areas)[order],
        annotation_ids=np.fromiter((a.id for a in data.annotations), np.int64, total)[order],
    )
    return FolderDataset(index, folder, name)


def _is_used(category: CocoCategory, data: CocoFile) -> bool:
    """Roboflow writes a category 0 that stands for all others and that no box has."""
    return category.id != 0 or any(a.category_id == 0 for a in data.annotations)


def lookup(known: NDArray[np.int64], wanted: NDArray[np.int64], message: str) -> NDArray[np.int64]:
    """Position of every `wanted` in `known`; ValueError with `message` and the values where some are not there."""
    order = np.argsort(known)
    found = np.searchsorted(known, wanted, sorter=order).clip(max=max(len(known) - 1, 0))
    positions = order[found] if len(known) else np.zeros(len(wanted), np.int64)
    if len(bad := wanted[known[positions] != wanted] if len(known) else wanted):
        raise ValueError(f"{message} {_some(np.unique(bad))}. `steadydetr check` lists every finding")
    return positions


def _some(values: Iterable[object], limit: int = 10) -> str:
    listed = [str(value) for value in values]
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


@dataclass(frozen=True)
class VocImage:
    file: str
    size: tuple[int, int]  # (h, w)
    objects: list[tuple[str, tuple[float, float, float, float], bool]]  # name, xyxy in pixels from 0, difficult


def read_voc_image(root: Path, stem: str) -> VocImage:
    """One annotation file. VOC counts pixels from 1 and includes the last: (xmin - 1, ymin - 1, xmax, ymax)."""
    path = root / "Annotations" / f"{stem}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, but a file of {root / 'ImageSets' / 'Main'} lists {stem}") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not XML: {error}") from error
    objects = []
    for entry in tree.iter("object"):
        name, box = entry.findtext("name"), entry.find("bndbox")
        corners = [None if box is None else box.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")]
        if name is None or any(c is None for c in corners):
            raise ValueError(f"{path}: an object without name or bndbox")
        x0, y0, x1, y1 = (float(c) for c in corners if c is not None)
        # a box that ends where it starts is a slip of the annotator, not one pixel: kept as it is, and dropped in training
        low = 1 if x1 > x0 and y1 > y0 else 0
        objects.append((name.strip(), (x0 - low, y0 - low, x1, y1), entry.findtext("difficult", "0").strip() == "1"))
    file = f"JPEGImages/{_voc_file(root, stem, tree.findtext('filename') or '')}"
    height, width = (int(tree.findtext(f"size/{key}", "0")) for key in ("height", "width"))
    if not height or not width:
        with Image.open(root / file) as image:
            width, height = image.size
    return VocImage(file, (height, width), objects)


def _voc_file(root: Path, stem: str, written: str) -> str:
    """The image beside the annotation goes by its stem; what the XML says only gives the ending, for it is often wrong."""
    suffix = Path(written).suffix
    return f"{stem}{suffix}" if suffix and (root / "JPEGImages" / f"{stem}{suffix}").exists() else f"{stem}.jpg"


def read_voc(root: Path, split: str, name: str) -> FolderDataset:
    """Pascal VOC folder. The classes are those of all annotation files, so that every split agrees on them."""
    stems = voc_split(root, split)
    every = {path.stem: read_voc_image(root, path.stem) for path in sorted((root / "Annotations").glob("*.xml"))}
    names = {label for image in every.values() for label, _, _ in image.objects}
    classes = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))
    images = [every.get(stem) or read_voc_image(root, stem) for stem in stems]
    objects = [entry for image in images for entry in image.objects]
    index = AnnotationIndex.build(
        image_ids=voc_image_ids(stems),
        files=[image.file for image in images],
        sizes=np.array([image.size for image in images]).reshape(-1, 2),
        counts=np.array([len(image.objects) for image in images]),
        boxes_xyxy=np.array([box for _, box, _ in objects], dtype=np.float32).reshape(-1, 4),
        labels=np.array([classes.index(label) for label, _, _ in objects], dtype=np.int32),
        classes=classes,
        category_ids=tuple(range(1, len(classes) + 1)),
        difficult=np.array([difficult for _, _, difficult in objects], dtype=bool),
    )
    return FolderDataset(index, root, name)


def voc_split(root: Path, split: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{split}.txt"
    if not path.exists():
        raise ValueError(f"{root} has no split {split!r}; ImageSets/Main holds {_some(sorted(p.stem for p in path.parent.glob('*.txt')))}")
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def voc_image_ids(stems: list[str]) -> NDArray[np.int64]:
    """Numbers of their own for images: the digits of the name where those are unique, else 1, 2, ..."""
    digits = ["".join(c for c in stem if c.isdigit()) for stem in stems]
    if all(digits) and len({int(d) for d in digits}) == len(stems) and all(len(d) < 18 for d in digits):
        return np.array([int(d) for d in digits], dtype=np.int64)
    return np.arange(1, len(stems) + 1)


@dataclass(frozen=True)
class Subset:
    """Some images of a data set, or some of its annotations, under a new index."""

    index: AnnotationIndex
    source: Dataset
    positions: NDArray[np.int64]

    @property
    def name(self) -> str:
        return self.source.name

    def load_image(self, position: int) -> NDArray[np.uint8]:
        return self.source.load_image(int(self.positions[position]))


@dataclass(frozen=True)
class JoinedDataset:
    """Several data sets one after the other."""

    index: AnnotationIndex
    parts: tuple[Dataset, ...]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    def load_image(self, position: int) -> NDArray[np.uint8]:
        for part in self.parts:
            if position < len(part.index):
                return part.load_image(position)
            position -= len(part.index)
        raise IndexError(position)


def parts_of(dataset: Dataset) -> tuple[Dataset, ...]:
    """The data sets that it takes its images from."""
    if isinstance(dataset, Subset):
        return parts_of(dataset.source)
    return tuple(p for part in dataset.parts for p in parts_of(part)) if isinstance(dataset, JoinedDataset) else (dataset,)
