"""Pascal VOC folders: one year, or VOCdevkit with several."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from steadydetr.data.dataset import Dataset, FolderDataset, join_data
from steadydetr.data.folder import DataFolder
from steadydetr.data.images import IMAGE_SUFFIXES
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import ENCODING, DataLayout, Finding, NoSplit, Report, fault, stop
from steadydetr.data.layouts.common import ids_of_names
from steadydetr.data.reading import LONGEST, decode_text, decode_xml, expanded, foreign_encoding, is_file_name, is_hidden
from steadydetr.files import listed, printable
from steadydetr.kinds import register
from steadydetr.lazy import np

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


ANNOTATIONS, IMAGES, LISTS = "Annotations", "JPEGImages", "ImageSets/Main"
SHOWN = 20  # faults of one annotation file that are named


@register("voc-layout")
@dataclass(frozen=True)
class Voc(DataLayout):
    """A folder with JPEGImages, Annotations and ImageSets/Main/SPLIT.txt."""

    looked_for = "VOC: JPEGImages, Annotations, ImageSets/Main/SPLIT.txt (or VOC2007 and VOC2012 folders of these)"

    def recognises(self, where: str) -> bool:
        return (expanded(where) / LISTS).is_dir()

    def open(self, where: str, split: str) -> FolderDataset:
        return self.inspect(where, split, stop)

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root = expanded(where)
        return read_voc(root, split, f"{root.name}-{split}", self.folder(where), report)


@register("voc-years-layout")
@dataclass(frozen=True)
class VocYears(DataLayout):
    """VOCdevkit: every year that has the split (the test set of 2012 was never published)."""

    looked_for = ""

    def recognises(self, where: str) -> bool:
        return bool(self._years(where))

    def open(self, where: str, split: str) -> Dataset:
        return self.inspect(where, split, stop)

    def inspect(self, where: str, split: str, report: Report) -> Dataset:
        years, source = self._years(where), self.folder(where)
        with_split = [year for year in years if os.path.lexists(year / LISTS / f"{split}.txt")]
        if not with_split:
            raise NoSplit(f"none of {', '.join(printable(year.name) for year in years)} in {where} has a split {split!r}")
        parts: list[Dataset] = [read_voc(year, split, f"{year.name}-{split}", source, report) for year in with_split]
        return parts[0] if len(parts) == 1 else join_data(parts)

    def _years(self, where: str) -> list[Path]:
        return sorted(path for path in expanded(where).glob("VOC*") if (path / LISTS).is_dir())


@dataclass(frozen=True)
class VocAnnotation:
    """What an XML file says of its image."""

    filename: str
    size: tuple[int, int] | None  # (h, w); None where it is missing or 0
    objects: list[tuple[str, tuple[float, ...], bool]]  # name, xyxy in pixels from 0, difficult


def read_annotation(path: Path, source: DataFolder) -> VocAnnotation:
    """One annotation file. VOC counts pixels from 1 and includes the last: (xmin - 1, ymin - 1, xmax, ymax).

    Raises ValueError, which names everything that is wrong with it.
    """
    tree, wrong = decode_xml(source.read_entry(path), path), list[str]()
    if tree.tag != "annotation":  # its objects would not be found, and the image taken for one without any
        raise ValueError(f"{printable(path)} is no annotation of Pascal VOC: it begins with <{printable(tree.tag)[:80]}>, not <annotation>")
    objects = [_object(entry, f"object {number}", wrong) for number, entry in enumerate(tree.iter("object"), 1)]
    height, width = (_number(tree.findtext(f"size/{side}") or "0", side, wrong) for side in ("height", "width"))
    size = (height, width) if height > 0 and width > 0 else None
    if size and (height != int(height) or width != int(width) or max(size) > LONGEST):
        wrong.append(f"width {width:g} and height {height:g} are no size of an image in pixels")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{printable(path)}: {'; '.join(wrong[:SHOWN])}{more}")
    return VocAnnotation(tree.findtext("filename") or "", size and (int(height), int(width)), objects)


def _object(entry: ElementTree.Element, where: str, wrong: list[str]) -> tuple[str, tuple[float, ...], bool]:
    """Name, box and whether it is difficult; what is wrong is added to `wrong`."""
    name, box = (entry.findtext("name") or "").strip(), entry.find("bndbox")
    if not name or box is None:
        wrong.append(f"{where} is without {'name' if not name else 'bndbox'}")
        return name, (0.0, 0.0, 0.0, 0.0), False
    x0, y0, x1, y1 = (
        _number(box.findtext(side) or "", f"{where} ({printable(name)}), {side}", wrong) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    # a box that ends where it starts is a slip of the annotator, not one pixel: kept as it is, and dropped in training
    low = 1 if x1 > x0 and y1 > y0 else 0
    return name, (x0 - low, y0 - low, x1, y1), (entry.findtext("difficult") or "").strip().lower() in ("1", "true", "yes")


def _number(text: str, where: str, wrong: list[str]) -> float:
    """A finite number, or 0 where there is none, which is added to `wrong`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    wrong.append(f"{where} is {printable(text)[:80]!r} instead of a number" if text.strip() else f"{where} is empty or missing")
    return 0.0


def read_voc(root: Path, split: str, name: str, source: DataFolder | None = None, report: Report = stop) -> FolderDataset:
    """Pascal VOC folder. The classes are those of all annotation files, so that every split agrees on them.

    Args:
        source: the data folder; `root` if not given.
        report: takes what is wrong with an annotation file or an image, which is then left out.

    Raises:
        NoSplit: there is no list of such a split.
        ValueError: the list cannot be used at all; names it.
    """
    source = source or DataFolder(root)
    source.check_inside(root / ANNOTATIONS)  # before it is listed: a link could lead to the whole disk
    annotated = set(_stems(root / ANNOTATIONS))
    listed = voc_split(root, split, annotated, source, report)
    every = _read_annotations(root, [*sorted(annotated - set(listed)), *dict.fromkeys(listed)], source, report)
    names = {label for annotation in every.values() for label, _, _ in annotation.objects}
    classes = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))
    images = _Images(root)
    used = list[tuple[str, str, tuple[int, int]]]()  # stem, file, size
    for stem in (stem for stem in listed if stem in every):
        file = f"{IMAGES}/{images.find(stem, every[stem].filename)}"
        try:
            used.append((stem, file, every[stem].size or source.picture_size(root / file)))
        except ValueError as error:
            report(fault("unknown image size", root / file, "", f"its annotation has none, and {error}"))
    if not used:
        raise ValueError(f"{printable(root / LISTS / split)}.txt lists no image that can be used")
    objects = [entry for stem, _, _ in used for entry in every[stem].objects]
    label_of = {label: position for position, label in enumerate(classes)}
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and not trained on
        boxes = np.array([box for _, box, _ in objects], dtype=np.float64).reshape(-1, 4).astype(np.float32)
    index = AnnotationIndex.build(
        image_ids=ids_of_names([stem for stem, _, _ in used]),
        files=[file for _, file, _ in used],
        sizes=[size for _, _, size in used],
        counts=[len(every[stem].objects) for stem, _, _ in used],
        boxes_xyxy=boxes,
        labels=np.array([label_of[label] for label, _, _ in objects], dtype=np.int32),
        classes=classes,
        category_ids=tuple(range(1, len(classes) + 1)),
        difficult=np.array([difficult for _, _, difficult in objects], dtype=bool),
    )
    return FolderDataset(index, root, name, source)


def _read_annotations(root: Path, stems: Iterable[str], source: DataFolder, report: Report) -> dict[str, VocAnnotation]:
    """The annotation files that can be read, by the name of their image without ending."""
    found = {}
    for stem in stems:
        path = root / ANNOTATIONS / f"{stem}.xml"
        try:
            found[stem] = read_annotation(path, source)
        except FileNotFoundError:
            report(fault("missing annotation file", path, "", f"the file is not there, but a file of {root / LISTS} lists {stem}"))
        except ValueError as error:
            report(fault("unreadable annotation file", path, "", str(error)))
    return found


def _stems(folder: Path) -> Iterable[str]:
    """The XML files below a folder, relative to it and without ending."""
    for parent, _, files in os.walk(folder):
        place = os.path.relpath(parent, folder)
        for file in files:
            if file.endswith(".xml") and not is_hidden(file):
                yield os.path.normpath(os.path.join(place, file[:-4])).replace(os.sep, "/")


def voc_split(root: Path, split: str, annotated: set[str], source: DataFolder, report: Report) -> list[str]:
    """The images of a split without ending: a name a line, which may go on with 1, 0 or -1, as in the lists of single classes.

    Args:
        annotated: the images that have an annotation file, without ending.
    """
    path = root / LISTS / f"{split}.txt"
    if not os.path.lexists(path):
        there = listed(sorted(printable(p.stem) for p in path.parent.glob("*.txt")), 10)
        raise NoSplit(f"{printable(root)} has no split {split!r}; ImageSets/Main holds {there}")
    content, stems = source.read_list(path), []
    if encoding := foreign_encoding(content):
        report(Finding(ENCODING, printable(path), "", f"{encoding}: it is read here, but other tools want plain UTF-8; save it so"))
    for number, line in enumerate(decode_text(content, path).splitlines(), 1):
        whole = line.strip()
        stem = whole if whole in annotated else re.sub(r"\s+(-1|0|1)$", "", whole)
        name, ending = os.path.splitext(stem)
        if stem not in annotated and name in annotated and ending.lower() in IMAGE_SUFFIXES:  # the list names files of images
            stem = name
        if not is_file_name(stem) and stem:
            report(fault("impossible file name", path, f"line {number}", f"{stem!r} cannot be the name of a file"))
        elif stem:
            stems.append(stem)
    return stems


@dataclass(frozen=True)
class _Images:
    """The files of JPEGImages, of which each folder is listed once."""

    root: Path
    listings: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # files by folder and name without ending

    def find(self, stem: str, written: str) -> str:
        """The file of an image: named as its annotation file, with the ending that is written in that, or else any that is there."""
        folder, name = os.path.split(stem)
        if folder not in self.listings:
            self.listings[folder] = self._list(folder)
        files = self.listings[folder].get(name, [])
        as_written = f"{name}{os.path.splitext(written.strip())[1]}"
        images = [(IMAGE_SUFFIXES.index(ending), file) for file in files if (ending := file[len(name) :].lower()) in IMAGE_SUFFIXES]
        file = as_written if as_written in files else min(images, default=(0, f"{name}.jpg"))[1]
        return f"{folder}/{file}".lstrip("/")

    def _list(self, folder: str) -> dict[str, list[str]]:
        listing: dict[str, list[str]] = {}
        try:
            for file in os.listdir(self.root / IMAGES / folder):
                listing.setdefault(os.path.splitext(file)[0], []).append(file)
        except (OSError, ValueError):  # there is no such folder: the images are missing
            pass
        return listing
