"""Pascal VOC: a year, VOCdevkit with several, and its annotation files without lists, as labelImg, Roboflow and Label Studio write them."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from steadydetr.data.dataset import Dataset, FolderDataset, join_data
from steadydetr.data.folder import DataFolder
from steadydetr.data.images import IMAGE_SUFFIXES
from steadydetr.data.layouts.base import ALL, ENCODING, Finding, InspectedLayout, NoSplit, Report, fault, stop
from steadydetr.data.layouts.common import (
    AnnotatedImage,
    Box,
    Listings,
    Remarks,
    annotated_size,
    build_index,
    choose_split,
    files_below,
    head_of,
    named,
    split_folders,
    splits_of,
    standard_split,
)
from steadydetr.data.reading import decode_text, decode_xml, expanded, foreign_encoding, is_file_name
from steadydetr.files import printable
from steadydetr.kinds import register

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


ANNOTATIONS, IMAGES, LISTS = "Annotations", "JPEGImages", "ImageSets/Main"
XML_FOLDERS, IMAGE_FOLDERS = (ANNOTATIONS, "annotations", "labels"), (IMAGES, "images", "Images")  # what exports call them
SHOWN = 20  # faults of one annotation file that are named


@register("voc-layout")
@dataclass(frozen=True)
class Voc(InspectedLayout):
    """A folder with JPEGImages, Annotations and ImageSets/Main/SPLIT.txt."""

    looked_for = "VOC: JPEGImages, Annotations, ImageSets/Main/SPLIT.txt (or VOC2007 and VOC2012 folders of these)"

    def recognises(self, where: str) -> bool:
        return (expanded(where) / LISTS).is_dir()

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(_splits(expanded(where)))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root = expanded(where)
        return read_voc(root, split, f"{root.name}-{split}", self.folder(where), report)


@register("voc-years-layout")
@dataclass(frozen=True)
class VocYears(InspectedLayout):
    """VOCdevkit: every year that has the split (the test set of 2012 was never published)."""

    looked_for = ""

    def recognises(self, where: str) -> bool:
        return bool(self._years(where))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(name for year in self._years(where) for name in _splits(year))

    def inspect(self, where: str, split: str, report: Report) -> Dataset:
        years, source = self._years(where), self.folder(where)
        with_split = [year for year in years if any(split in (name, standard_split(name)) for name in _lists(year))]
        if not with_split:
            raise NoSplit(f"none of {', '.join(printable(year.name) for year in years)} in {where} has a split {split!r}")
        parts: list[Dataset] = [read_voc(year, split, f"{year.name}-{split}", source, report) for year in with_split]
        return parts[0] if len(parts) == 1 else join_data(parts)

    def _years(self, where: str) -> list[Path]:
        return sorted(path for path in expanded(where).glob("VOC*") if (path / LISTS).is_dir())


@register("voc-folders-layout")
@dataclass(frozen=True)
class VocFolders(InspectedLayout):
    """Annotation files of VOC without lists: beside their images or in a folder of their own, in one for each split or for all."""

    looked_for = (
        "VOC without lists: an XML file for each image, beside the images or in Annotations/, with folders train, valid, test or without"
    )

    def recognises(self, where: str) -> bool:
        root = expanded(where)
        return not (root / LISTS).is_dir() and bool(xml_places(root))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(xml_places(expanded(where)))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root, source = expanded(where), self.folder(where)
        places = xml_places(root)
        chosen = places[choose_split(root, places, split, "/")]
        entries = {place: [(place, stem) for stem in _stems(root, place, source)] for place in places.values()}
        others = [entry for place, found in entries.items() if place != chosen for entry in found]
        what = f"{printable(root / chosen.annotations)} for split {split!r}"
        data = _read_entries(root, entries[chosen], others, f"{root.name}-{split}", source, report, what)
        remarks = Remarks()
        for file in _without_annotations(root, chosen, data):
            made = "are left out, for they may have objects that nobody has marked"
            remarks.add("images left out", "images without an XML file", made, file)
        remarks.tell(root, report)
        return data


def xml_places(root: Path) -> dict[str, XmlPlace]:
    """Where the annotation files of each split lie; of the split `all` if there are no folders of splits. Empty where there are none."""
    found = {name: place for name in split_folders(root) if (place := _xml_place(root, name))}
    if found:
        return found
    for folder in XML_FOLDERS:
        images = next((name for name in IMAGE_FOLDERS if (root / name).is_dir()), "")
        for name in split_folders(root / folder):
            if _is_voc(root / folder / name):
                parallel = os.path.join(images, name)
                found[name] = XmlPlace(os.path.join(folder, name), parallel if (root / parallel).is_dir() else images)
        if found:
            return found
    whole = _xml_place(root, "")
    return {ALL: whole} if whole else {}


def _xml_place(root: Path, base: str) -> XmlPlace | None:
    """The annotation files of VOC in a folder of `root`: in one of their own, or beside the images."""
    for folder in (*XML_FOLDERS, ""):
        annotations = os.path.join(base, folder)
        if _is_voc(root / annotations):
            images = next((os.path.join(base, name) for name in IMAGE_FOLDERS if (root / base / name).is_dir()), annotations)
            return XmlPlace(annotations.rstrip("/"), images.rstrip("/"))
    return None


def _is_voc(folder: Path) -> bool:
    """Whether the first XML file of a folder is an annotation file of VOC, by its head."""
    for name in itertools.islice(named(folder, (".xml",)), 1):
        head = head_of(folder / name).replace(b"\0", b"")  # of UTF-16
        return re.search(rb"<annotation[\s>]", head) is not None
    return False


def _without_annotations(root: Path, place: XmlPlace, data: FolderDataset) -> list[str]:
    """The images below a place's folder that none of its annotation files belongs to (D-128)."""
    used = {os.path.splitext(data.index.file(position))[0] for position in range(len(data.index))}
    files = [os.path.join(place.images, file) for file in files_below(root / place.images)]
    return [file for file in files if os.path.splitext(file)[0] not in used]


@dataclass(frozen=True)
class VocAnnotation:
    """What an XML file says of its image."""

    filename: str
    size: tuple[int, int] | None  # (h, w); None where it is missing or 0
    objects: list[tuple[str, Box, bool]]  # name, xyxy in pixels from 0, difficult


def read_annotation(path: Path, source: DataFolder) -> VocAnnotation:
    """One annotation file. VOC counts pixels from 1 and includes the last: (xmin - 1, ymin - 1, xmax, ymax). Some tools do not (D-125).

    Raises ValueError, which names everything that is wrong with it.
    """
    tree, wrong = decode_xml(source.read_entry(path), path), list[str]()
    if tree.tag != "annotation":  # its objects would not be found, and the image taken for one without any
        raise ValueError(f"{printable(path)} is no annotation of Pascal VOC: it begins with <{printable(tree.tag)[:80]}>, not <annotation>")
    first = 0 if _counts_from_0(tree) else 1
    objects = [_object(entry, f"object {number}", first, wrong) for number, entry in enumerate(tree.iter("object"), 1)]
    height, width = (_number(tree.findtext(f"size/{side}") or "0", side, wrong) for side in ("height", "width"))
    size = None
    try:
        size = annotated_size(height, width)
    except ValueError as error:
        wrong.append(str(error))
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{printable(path)}: {'; '.join(wrong[:SHOWN])}{more}")
    return VocAnnotation(tree.findtext("filename") or "", size, objects)


def _counts_from_0(tree: ElementTree.Element) -> bool:
    """Whether the file is one of Label Studio or CVAT, which write the corners of boxes as they are in the plane."""
    of_cvat = all(tree.findtext(f"source/{name}") == "Unknown" for name in ("database", "annotation", "image"))
    return of_cvat or tree.findtext("owner/name") == "Label Studio"


def _object(entry: ElementTree.Element, where: str, first: int, wrong: list[str]) -> tuple[str, Box, bool]:
    """Name, box and whether it is difficult; what is wrong is added to `wrong`. `first` is the number of the first pixel."""
    name, box = (entry.findtext("name") or "").strip(), entry.find("bndbox")
    if not name or box is None:
        wrong.append(f"{where} is without {'name' if not name else 'bndbox'}")
        return name, (0.0, 0.0, 0.0, 0.0), False
    x0, y0, x1, y1 = (
        _number(box.findtext(side) or "", f"{where} ({printable(name)}), {side}", wrong) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    # a box that ends where it starts is a slip of the annotator, not one pixel: kept as it is, and dropped in training
    low = first if x1 > x0 and y1 > y0 else 0
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


@dataclass(frozen=True)
class XmlPlace:
    """A folder of annotation files and the folder of their images, both relative to the data folder, and of the same folders below."""

    annotations: str
    images: str


Entry = tuple[XmlPlace, str]  # an annotation file by its place and its name without ending


def read_voc(root: Path, split: str, name: str, source: DataFolder | None = None, report: Report = stop) -> FolderDataset:
    """Pascal VOC folder with lists. The classes are those of all annotation files, so that every split agrees on them.

    Args:
        source: the data folder; `root` if not given.
        report: takes what is wrong with an annotation file or an image, which is then left out.

    Raises:
        NoSplit: there is no list of such a split.
        ValueError: the list cannot be used at all; names it.
    """
    source, place = source or DataFolder(root), XmlPlace(ANNOTATIONS, IMAGES)
    annotated = set(_stems(root, place, source))
    path = root / LISTS / f"{choose_split(root, _lists(root), split, holder=LISTS)}.txt"
    listed = voc_split(path, annotated, source, report)
    others = [(place, stem) for stem in sorted(annotated - set(listed))]
    why = f", but a file of {root / LISTS} lists it"
    return _read_entries(root, [(place, stem) for stem in listed], others, name, source, report, printable(path), why)


def _read_entries(
    root: Path, entries: list[Entry], others: list[Entry], name: str, source: DataFolder, report: Report, what: str, why: str = ""
) -> FolderDataset:
    """The data set of annotation files, with the classes of these and of the `others`, which are those of other splits.

    Args:
        what: says which split this is, for errors.
        why: why an annotation file is looked for.
    """
    every = _read_annotations(root, [*others, *dict.fromkeys(entries)], source, report, why)
    names = {label for annotation in every.values() for label, _, _ in annotation.objects}
    classes = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names))
    listings = {place: Listings(root / place.images) for place, _ in entries}
    images = list[AnnotatedImage]()
    for entry in (entry for entry in entries if entry in every):
        (place, stem), annotation = entry, every[entry]
        file = os.path.join(place.images, listings[place].image_of(stem, annotation.filename))
        labels, boxes = [label for label, _, _ in annotation.objects], [box for _, box, _ in annotation.objects]
        difficult = [hard for _, _, hard in annotation.objects]
        try:
            size = annotation.size or source.picture_size(root / file)
        except ValueError as error:
            report(fault("unknown image size", root / file, "", f"its annotation has none, and {error}"))
        else:
            images.append(AnnotatedImage(stem, file, size, labels, boxes, difficult))
    if not images:
        raise ValueError(f"{what} lists no image that can be used")
    return FolderDataset(build_index(images, classes), root, name, source)


def _read_annotations(root: Path, entries: Iterable[Entry], source: DataFolder, report: Report, why: str) -> dict[Entry, VocAnnotation]:
    """The annotation files that can be read."""
    found = {}
    for place, stem in entries:
        path = root / place.annotations / f"{stem}.xml"
        try:
            found[place, stem] = read_annotation(path, source)
        except FileNotFoundError:
            report(fault("missing annotation file", path, "", f"the file is not there{why}"))
        except ValueError as error:
            report(fault("unreadable annotation file", path, "", str(error)))
    return found


def _stems(root: Path, place: XmlPlace, source: DataFolder) -> list[str]:
    """The annotation files of a place without ending."""
    source.check_inside(root / place.annotations)  # before it is listed: a link could lead to the whole disk
    return [file[:-4] for file in files_below(root / place.annotations, (".xml",)) if file.endswith(".xml")]


def _lists(root: Path) -> list[str]:
    """The names of all lists."""
    return sorted(path.stem for path in (root / LISTS).glob("*.txt"))


def _splits(root: Path) -> list[str]:
    """The names of lists but for those of single classes, such as cat_train, of which VOC has many."""
    names = _lists(root)
    return [name for name in names if not any(name.endswith(f"_{split}") for split in names)]


def voc_split(path: Path, annotated: set[str], source: DataFolder, report: Report) -> list[str]:
    """The images of a list without ending: a name a line, which may go on with 1, 0 or -1, as in the lists of single classes."""
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
