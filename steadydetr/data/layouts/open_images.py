"""Open Images (from version 4 on): one CSV file of boxes for each split, read in bulk."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from steadydetr.data.columns import counts_in_order
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import Finding, InspectedLayout, Report, fault
from steadydetr.data.layouts.common import choose_split, files_below, ids_of_names, splits_of
from steadydetr.data.picture_sizes import picture_sizes
from steadydetr.data.reading import MIB, decode_text, expanded
from steadydetr.files import printable
from steadydetr.kinds import register
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BOXES = "annotations-bbox.csv"
CLASSES = ("*class-descriptions-boxable.csv", "*class-descriptions.csv")  # the first has the classes with boxes, the second all 20,000
FOLDERS = (".", "annotations", "labels", "csv")  # where the files may lie
COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
CHUNK = 16 * MIB  # bytes of a file that are read at a time
LONGEST_NAME, LONGEST_LABEL = 128, 64  # bytes
ROW = [("ImageID", f"S{LONGEST_NAME}"), ("LabelName", f"S{LONGEST_LABEL}"), *((side, "f8") for side in COLUMNS[2:])]  # a numpy dtype
META = [("name", f"S{LONGEST_NAME}"), ("height", "i4"), ("width", "i4")]


@register("open-images-layout")
@dataclass(frozen=True)
class OpenImages(InspectedLayout):
    """SPLIT-annotations-bbox.csv with class-descriptions-boxable.csv, and folders of images called as the splits."""

    looked_for = (
        "Open Images: SPLIT-annotations-bbox.csv and class-descriptions-boxable.csv, images in train/, validation/, test/ by their ImageID"
    )

    def recognises(self, where: str) -> bool:
        return bool(_box_files(expanded(where)))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(_box_files(expanded(where)))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root, source = expanded(where), self.folder(where)
        files = _box_files(root)
        name = choose_split(root, files, split)
        path = files[name]
        labels, classes = read_classes(root, source, report)
        folder = next((f for f in (root / name, root / "images" / name, root / "images", root) if f.is_dir()), root)
        source.check_inside(folder)  # before it is listed: a link could lead to the whole disk
        images = list(files_below(folder))
        if not images:
            raise ValueError(f"there is no image in {printable(folder)}: put the images of {printable(name)} there, named by their ImageID")
        names, ids = _names_and_ids(images)
        sizes = _sizes(root, folder, images, names, source, report)
        boxes = read_boxes(path, names, sizes, labels, source, report)
        known = sizes[:, 0] > 0
        if not known.any():
            raise ValueError(f"{printable(folder)} has no image that can be used")
        index = AnnotationIndex.build(
            image_ids=ids,
            files=images,
            sizes=sizes,
            counts=counts_in_order(boxes.images, len(images)),
            boxes_xyxy=boxes.boxes_xyxy,
            labels=boxes.labels,
            crowd=boxes.group,
            classes=classes,
            category_ids=tuple(range(1, len(classes) + 1)),
        )
        index = index if known.all() else index.keep_images(np.flatnonzero(known))
        return FolderDataset(index, folder, f"{root.name}-{name}", source)


def _box_files(root: Path) -> dict[str, Path]:
    """The files of boxes by split: `train` for oidv6-train-annotations-bbox.csv."""
    files = [file for folder in FOLDERS for file in sorted((root / folder).glob(f"*-{BOXES}"))]
    return {re.sub(r"^oidv\d+-", "", file.name.removesuffix(f"-{BOXES}")): file for file in files}


def _names_and_ids(images: Sequence[str]) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """The names of image files in UTF-8, without ending, and their ids. A function of its own, to free the texts before boxes are read."""
    stems = [file.rpartition(".")[0] for file in images]
    return np.array([stem.encode() for stem in stems], np.bytes_), ids_of_names(stems)


# Classes


def read_classes(root: Path, source: DataFolder, report: Report) -> tuple[list[str], tuple[str, ...]]:
    """The labels (/m/0cmf2) and the names that people have for them (Airplane), in the order of the file of descriptions.

    Raises ValueError where there is no such file.
    """
    found = [file for pattern in CLASSES for folder in FOLDERS for file in sorted((root / folder).glob(pattern))]
    if not found:
        raise ValueError(
            f"{printable(root)} has no class-descriptions-boxable.csv, which names the classes: put it beside the file of boxes"
        )
    path, labels, names = found[0], list[str](), list[str]()
    rows = csv.reader(io.StringIO(decode_text(source.read_list(path), path).lstrip("\ufeff")))
    for number, row in enumerate(rows, 1):
        if row == ["LabelName", "DisplayName"] or not row:  # a head from version 7 on
            continue
        if len(row) != 2 or not all(map(str.strip, row)):
            report(fault("not a class", path, f"line {number}", f"{','.join(row)[:80]!r} is no label and name"))
        elif row[0] in labels or row[1] in names:
            report(fault("class name used twice", path, f"line {number}", f"{row[0]!r} or {row[1]!r} has a line before it"))
        else:
            labels.append(row[0])
            names.append(row[1])
    return labels, tuple(names)


# Sizes


def _sizes(
    root: Path, folder: Path, images: Sequence[str], names: NDArray[np.bytes_], source: DataFolder, report: Report
) -> NDArray[np.int32]:
    """[I, 2] height and width: of images.meta, which CVAT and datumaro write, or else of the image files; 0 where there is none."""
    sizes, order = np.zeros((len(images), 2), np.int32), np.argsort(names)
    meta = next((file for place in FOLDERS if (file := root / place / "images.meta").is_file()), None)
    for rows in _read_meta(meta, source) if meta else ():
        found = _find(names, order, rows["name"])
        sizes[found[found >= 0]] = np.column_stack((rows["height"], rows["width"]))[found >= 0]
    unknown = np.flatnonzero((sizes <= 0).any(1))
    sizes[unknown] = 0

    def wrong(position: int, reason: str) -> None:
        report(fault("unknown image size", folder / images[unknown[position]], "", reason))

    sizes[unknown] = picture_sizes(source, folder, [images[i] for i in unknown.tolist()], wrong)
    return sizes


def _read_meta(path: Path, source: DataFolder) -> Iterator[NDArray[np.void]]:
    """Height and width by image, of lines such as `"photo 1" 480 640`. The file may begin with comments, which start with `#`."""
    source.check_list(path)
    with open(path, "rb") as file:
        start = 0
        while (line := file.readline(CHUNK)).startswith(b"#") or line.isspace():
            start = file.tell()
        file.seek(start)
        while block := file.read(CHUNK) + file.readline(CHUNK):
            try:
                yield _parse(block, META, [0, 1, 2], " ")
            except ValueError as error:
                raise ValueError(f"{printable(path)} has lines that are no name, height and width: {error}") from error


def _parse(block: bytes, kind: list[tuple[str, str]], columns: Sequence[int], delimiter: str) -> NDArray[np.void]:
    """Lines of text as an array of records; a ValueError says which line is wrong, and how."""
    found: NDArray[np.void] = np.loadtxt(
        io.BytesIO(block), kind, delimiter=delimiter, usecols=columns, comments=None, quotechar='"', ndmin=1, encoding="latin-1"
    )
    return found


# Boxes


@dataclass(frozen=True)
class Boxes:
    """The rows of a file of boxes whose images are there, in the order of the images. R rows."""

    images: NDArray[np.int32]  # [R] position of the image
    boxes_xyxy: NDArray[np.float32]  # [R, 4] pixels
    labels: NDArray[np.int32]  # [R]
    group: NDArray[np.bool_]  # [R] one box around several objects

    def rows(self, keep: NDArray[np.int64] | slice) -> Boxes:
        return Boxes(self.images[keep], self.boxes_xyxy[keep], self.labels[keep], self.group[keep])


def read_boxes(
    path: Path, images: NDArray[np.bytes_], sizes: NDArray[np.int32], labels: Sequence[str], source: DataFolder, report: Report
) -> Boxes:
    """The boxes of a file, of which a part at a time is in memory.

    Args:
        images: [I] names in UTF-8, without ending.
        sizes: [I, 2] height and width; 0 where the image cannot be read, and is left out.
    """
    order = np.argsort(images)
    label_of = {label.encode(): position for position, label in enumerate(labels)}
    count = count_lines(path, source)
    boxes = Boxes(np.empty(count, np.int32), np.empty((count, 4), np.float32), np.empty(count, np.int32), np.empty(count, bool))
    filled, absent, missing = 0, 0, ""
    for lines, rows in read_rows(path, source, report):
        starts = np.flatnonzero(np.concatenate(([True], rows["ImageID"][1:] != rows["ImageID"][:-1])))  # runs of one image
        found = np.repeat(_find(images, order, rows["ImageID"][starts]), np.diff(np.append(starts, len(rows))))
        label = np.fromiter(map(label_of.get, rows["LabelName"].tolist(), repeat(-1)), np.int32, len(rows))
        for row in np.flatnonzero(label < 0).tolist():
            name = rows["LabelName"][row].decode("utf-8", "replace")
            report(fault("unknown class", path, f"line {lines[row]}", f"{name!r} is no label of the file of class descriptions"))
        absent += int((found < 0).sum())
        missing = missing or next((rows["ImageID"][row].decode("utf-8", "replace") for row in np.flatnonzero(found < 0)[:1]), "")
        keep = np.flatnonzero((found >= 0) & (label >= 0) & (sizes[found, 0] > 0))
        part = slice(filled, filled := filled + len(keep))
        height, width = sizes[found[keep]].T.astype(np.float64)
        boxes.images[part], boxes.labels[part], boxes.group[part] = found[keep], label[keep], rows["IsGroupOf"][keep] == 1
        for column, (name, side) in enumerate((("XMin", width), ("YMin", height), ("XMax", width), ("YMax", height))):
            boxes.boxes_xyxy[part, column] = rows[name][keep] * side
    if absent:
        what = f"{absent} boxes, the first of image {printable(missing)}"
        report(Finding("boxes of other images", printable(path), what, "their images are not in the folder: they are left out"))
    boxes = boxes.rows(slice(filled))
    in_order = bool((np.diff(boxes.images) >= 0).all())
    return boxes if in_order else boxes.rows(np.argsort(boxes.images, kind="stable"))


def _find(known: NDArray[np.bytes_], order: NDArray[np.int64], wanted: NDArray[np.bytes_]) -> NDArray[np.int64]:
    """Position of every `wanted` name in `known`, which `order` sorts; -1 where it is not there."""
    if not len(known):
        return np.full(len(wanted), -1)
    short = wanted.astype(known.dtype)  # of one length, so that numpy need not copy all that are known
    found = order[np.searchsorted(known, short, sorter=order).clip(max=len(known) - 1)]
    return np.where((known[found] == short) & (short == wanted), found, -1)


def count_lines(path: Path, source: DataFolder) -> int:
    """At most how many rows a file has. Raises what `DataFolder.read_list` raises."""
    source.check_list(path)
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(CHUNK), b"")) + 1


def read_rows(path: Path, source: DataFolder, report: Report) -> Iterator[tuple[NDArray[np.int64], NDArray[np.void]]]:
    """Some lines of a file at a time: their numbers, and their fields as in ROW.

    Lines that cannot be read are reported and left out. Raises ValueError where columns are missing.
    """
    with open(path, "rb") as file:
        head = file.readline(CHUNK).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").strip().split(",")
        if lacking := [name for name in COLUMNS if name not in head]:
            raise ValueError(f"{printable(path)} has no column {', '.join(lacking)}: it is no file of boxes of Open Images")
        columns, line = [head.index(name) for name in COLUMNS], 2
        while block := file.read(CHUNK) + file.readline(CHUNK):
            if not block.strip():
                break
            try:
                rows = _parse(block, ROW, columns, ",")
                lines = np.arange(line, line + len(rows))
            except ValueError:
                lines, rows = _parse_each(block, columns, line, path, report)
            if _cut(rows):
                raise ValueError(f"{printable(path)} has an ImageID of {LONGEST_NAME} bytes or a LabelName of {LONGEST_LABEL}, or longer")
            if len(rows):
                yield lines, rows
            line += block.count(b"\n")


def _cut(rows: NDArray[np.void]) -> bool:
    """Whether a text fills its field to the last byte, and so may be longer."""
    last = [LONGEST_NAME - 1, LONGEST_NAME + LONGEST_LABEL - 1]  # the first two fields of ROW
    return bool(rows.view(np.uint8).reshape(len(rows), -1)[:, last].any())


def _parse_each(block: bytes, columns: Sequence[int], first: int, path: Path, report: Report) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """The same line by line, because at least one cannot be read."""
    lines, found = list[int](), [np.empty(0, ROW)]
    for line, text in enumerate(block.split(b"\n"), first):
        if not text.strip():
            continue
        try:
            found.append(_parse(text, ROW, columns, ","))
            lines += [line] * len(found[-1])
        except ValueError as error:
            report(fault("unreadable line", path, f"line {line}", re.sub(r" at row \d+", "", str(error))))
    return np.array(lines, np.int64), np.concatenate(found)
