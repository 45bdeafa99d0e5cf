"""Pascal VOC folders: one year, or VOCdevkit with several."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from steadydetr.data.dataset import Dataset, FolderDataset, first_few, join_data
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import DataLayout
from steadydetr.kinds import register

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


@register("voc-layout")
@dataclass(frozen=True)
class Voc(DataLayout):
    """A folder with JPEGImages, Annotations and ImageSets/Main/SPLIT.txt."""

    looked_for = "VOC        JPEGImages, Annotations, ImageSets/Main/SPLIT.txt (or VOC2007 and VOC2012 folders of these)"

    def recognises(self, where: str) -> bool:
        return (Path(where).expanduser() / "ImageSets" / "Main").is_dir()

    def open(self, where: str, split: str) -> FolderDataset:
        root = Path(where).expanduser()
        return read_voc(root, split, f"{root.name}-{split}")


@register("voc-years-layout")
@dataclass(frozen=True)
class VocYears(DataLayout):
    """VOCdevkit: every year that has the split (the test set of 2012 was never published)."""

    looked_for = ""

    def recognises(self, where: str) -> bool:
        return bool(self._years(where))

    def open(self, where: str, split: str) -> Dataset:
        years = self._years(where)
        with_split = [year for year in years if (year / "ImageSets" / "Main" / f"{split}.txt").exists()]
        if not with_split:
            raise ValueError(f"none of {', '.join(year.name for year in years)} in {where} has a split {split!r}")
        parts: list[Dataset] = [read_voc(year, split, f"{year.name}-{split}") for year in with_split]
        return parts[0] if len(parts) == 1 else join_data(parts)

    def _years(self, where: str) -> list[Path]:
        return sorted(path for path in Path(where).expanduser().glob("VOC*") if (path / "ImageSets" / "Main").is_dir())


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
    """The file name of an annotation's image: the stem of the annotation, with the ending that the XML names; its stem is often wrong."""
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
        raise ValueError(
            f"{root} has no split {split!r}; ImageSets/Main holds {first_few(sorted(p.stem for p in path.parent.glob('*.txt')))}"
        )
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def voc_image_ids(stems: list[str]) -> NDArray[np.int64]:
    """A number for every image: the digits of its name where those are unique, else 1, 2, ..."""
    digits = ["".join(c for c in stem if c.isdigit()) for stem in stems]
    if all(digits) and len({int(d) for d in digits}) == len(stems) and all(len(d) < 18 for d in digits):
        return np.array([int(d) for d in digits], dtype=np.int64)
    return np.arange(1, len(stems) + 1)
