"""COCO annotations: of COCO itself, and of Roboflow's exports, which lie elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from steadydetr.data.dataset import FolderDataset, first_few
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import DataLayout, Finding
from steadydetr.kinds import register

ROBOFLOW = "_annotations.coco.json"


@register("coco-layout")
@dataclass(frozen=True)
class Coco(DataLayout):
    """annotations/instances_SPLIT*.json beside folders of images."""

    looked_for = "COCO       annotations/instances_SPLIT*.json beside folders of images"

    def recognises(self, where: str) -> bool:
        return any(Path(where).expanduser().glob("annotations/instances_*.json"))

    def open(self, where: str, split: str) -> FolderDataset:
        root, matching = Path(where).expanduser(), self._files(where, split)
        if len(matching) != 1:
            what = "no annotation file" if not matching else "several annotation files"
            present = ", ".join(path.name for path in self._files(where, ""))
            raise ValueError(
                f"{root / 'annotations'} has {what} for split {split!r}; it holds {present}."
                " Name one with --data.train-split or --data.val-split"
            )
        name = matching[0].stem.removeprefix("instances_")
        places = [root / name, root / "images" / name, root / "images", root]
        images = next((place for place in places if place.is_dir()), root)
        return read_coco(matching[0], images, f"{root.name}-{name}")

    def check(self, where: str, split: str) -> Iterator[Finding]:
        for path in self._files(where, split)[:1]:
            yield from check_coco(path)

    def _files(self, where: str, split: str) -> list[Path]:
        """The annotation file of that very split, or else those whose split begins like it."""
        files = sorted(Path(where).expanduser().glob("annotations/instances_*.json"))
        names = {path: path.stem.removeprefix("instances_") for path in files}
        return [path for path in files if names[path] == split] or [path for path in files if names[path].startswith(split)]


@register("roboflow-layout")
@dataclass(frozen=True)
class Roboflow(DataLayout):
    """SPLIT/_annotations.coco.json with the images beside it; validation is called valid."""

    looked_for = "Roboflow   SPLIT/_annotations.coco.json with the images beside it (SPLIT: train, valid, test)"

    def recognises(self, where: str) -> bool:
        return bool(self._splits(where))

    def open(self, where: str, split: str) -> FolderDataset:
        folder = self._folder(where, split)
        if folder is None:
            raise ValueError(f"{Path(where).expanduser()} has no split {split!r}; it holds {', '.join(self._splits(where))}")
        return read_coco(folder / ROBOFLOW, folder, f"{folder.parent.name}-{folder.name}")

    def check(self, where: str, split: str) -> Iterator[Finding]:
        folder = self._folder(where, split)
        return iter(()) if folder is None else check_coco(folder / ROBOFLOW)

    def _folder(self, where: str, split: str) -> Path | None:
        names = [name for name in ({"val": "valid"}.get(split, split), split) if name in self._splits(where)]
        return Path(where).expanduser() / names[0] if names else None

    def _splits(self, where: str) -> list[str]:
        return sorted(path.parent.name for path in Path(where).expanduser().glob(f"*/{ROBOFLOW}"))


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
    """Decode only the fields that are used. Polygons, most of the file, are skipped."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=CocoFile)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a COCO annotation file: {error}") from error


def read_coco(path: Path, folder: Path, name: str) -> FolderDataset:
    """Read a COCO JSON file. Classes are the file's categories in the order of their ids, whatever gaps those have."""
    data = decode_coco(path)
    categories = sorted((c for c in data.categories if _is_used(c, data)), key=lambda c: c.id)
    image_ids = np.fromiter((image.id for image in data.images), np.int64, len(data.images))
    if len(np.unique(image_ids)) < len(image_ids):
        ids, counts = np.unique(image_ids, return_counts=True)
        raise ValueError(f"{path}: image ids used twice: {first_few(ids[counts > 1])}. `steadydetr check` lists every finding")
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
    """Whether a category is a class. Roboflow writes a category 0 that stands for all others and that no box has."""
    return category.id != 0 or any(a.category_id == 0 for a in data.annotations)


def lookup(known: NDArray[np.int64], wanted: NDArray[np.int64], message: str) -> NDArray[np.int64]:
    """Position of every `wanted` in `known`; ValueError with `message` and the values where some are not there."""
    order = np.argsort(known)
    found = np.searchsorted(known, wanted, sorter=order).clip(max=max(len(known) - 1, 0))
    positions = order[found] if len(known) else np.zeros(len(wanted), np.int64)
    if len(bad := wanted[known[positions] != wanted] if len(known) else wanted):
        raise ValueError(f"{message} {first_few(np.unique(bad))}. `steadydetr check` lists every finding")
    return positions


def check_coco(path: Path) -> Iterator[Finding]:
    """What keeps a COCO file from being indexed at all."""
    try:
        data = decode_coco(path)
    except (ValueError, msgspec.MsgspecError) as error:
        yield Finding("not COCO", str(path), "", str(error), fatal=True)
        return
    for kind, ids in (("image", [i.id for i in data.images]), ("annotation", [a.id for a in data.annotations])):
        values, counts = np.unique(np.array(ids, dtype=np.int64), return_counts=True)
        for value in values[counts > 1].tolist():
            yield Finding(f"{kind} id used twice", str(path), f"{kind} {value}", "ids must be unique", fatal=kind == "image")
    yield from _check_references(data, path)


def _check_references(data: CocoFile, path: Path) -> Iterator[Finding]:
    images, categories = {i.id for i in data.images}, {c.id for c in data.categories}
    for annotation in data.annotations:
        if annotation.image_id not in images:
            message = f"refers to image {annotation.image_id}, which the file does not list"
            yield Finding("unknown image", str(path), f"annotation {annotation.id}", message, fatal=True)
        if annotation.category_id not in categories:
            message = f"refers to category {annotation.category_id}, which the file does not list"
            yield Finding("unknown class", str(path), f"annotation {annotation.id}", message, fatal=True)
