"""What several layouts share: usual names of splits, image files found by name, entries decoded one by one, an index of what was read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import Finding, NoSplit, Report, fault
from steadydetr.data.reading import LONGEST
from steadydetr.files import listed, printable

T = TypeVar("T")
Box = tuple[float, float, float, float]  # xyxy in pixels
SPLIT_NAMES = {  # what tools and people call the three splits
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
USUAL_SPLITS = frozenset(name for names in SPLIT_NAMES.values() for name in names)
ENDINGS = tuple(e for ending in (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff") for e in (ending, ending.upper()))
HEAD = 2**16  # bytes at the start of a file that its kind is told by


# Splits


def choose_split(root: Path, split: str, present: Mapping[str, T], ending: str = "") -> T:
    """What belongs to a split: that of its own name, and for train, val and test that of another usual name (validation for val).

    Args:
        ending: what follows the names of `present` on disk: `/` for folders.

    Raises:
        NoSplit: there is none; says what there is.
        ValueError: two could be it (D-105).
    """
    found = [name for name in present if name.lower() in SPLIT_NAMES.get(split, (split,)) or name == split]
    if not found:
        raise NoSplit(f"{printable(root)} has no split {split!r}; it holds {listed(map(printable, present), 10) or 'none'}")
    if len(found) > 1:
        both = " and ".join(f"{printable(name)}{ending}" for name in sorted(found, key=split.__eq__))
        raise ValueError(f"{printable(root)} has {both}, which both could be split {split!r}: remove or rename one of them")
    return present[found[0]]


# Files


def head_of(path: Path) -> bytes:
    """The first bytes of a regular file; empty where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would block
            return b""
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


def files_below(root: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """The files below a folder with one of these endings, relative to it with `/`, folder by folder in order; hidden ones are left out."""
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        place = os.path.relpath(parent, root)
        for file in sorted(files):
            if file.endswith(endings) and not file.startswith("."):
                yield os.path.normpath(os.path.join(place, file)).replace(os.sep, "/")


def some_files(root: Path, ending: str, folders: int = 64, entries: int = 1000) -> Iterator[Path]:
    """Files with this ending in a folder and below, the nearest first, of which only so many entries of so many folders are looked at.

    No link is followed, so that one to a whole disk costs nothing.
    """
    waiting = [root]
    for folder in waiting:  # which grows while it is gone through
        try:
            with os.scandir(folder) as listing:
                found = sorted(islice(listing, entries), key=lambda entry: entry.name)
        except OSError:
            continue
        yield from (Path(entry.path) for entry in found if entry.name.endswith(ending) and not entry.name.startswith("."))
        below = [Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")]
        waiting += below[: folders - len(waiting)]


@dataclass(frozen=True)
class ImageFiles:
    """The image files below a folder, found by what a labelling tool calls them."""

    root: Path

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """Files relative to the root, by their last part."""
        found: dict[str, list[str]] = {}
        for file in files_below(self.root, ENDINGS):
            found.setdefault(file.rpartition("/")[2], []).append(file)
        return found

    def find(self, written: str) -> str | None:
        """The file whose path ends as `written` does, in as many parts as any; None where no file has its last part.

        Raises ValueError where several files fit equally.
        """
        parts = written.split("/")[::-1]

        def agreeing(file: str) -> int:
            pairs = enumerate(zip(parts, file.split("/")[::-1], strict=False))
            return next((depth for depth, (one, other) in pairs if one != other), min(len(parts), file.count("/") + 1))

        files = self.by_name.get(parts[0], [])
        depth = max(map(agreeing, files), default=0)
        best = [file for file in files if agreeing(file) == depth]
        if len(best) > 1:
            raise ValueError(f"{written!r} could be {listed(map(repr, best), 4)}: rename the files, or keep the folders of the export")
        return best[0] if best else None


# Entries


def decode_entries(raw: Iterable[msgspec.Raw], field: str, kind: type[T], path: Path, report: Report, what: str) -> Iterator[T]:
    """The entries of a list, decoded one by one because there is at least one in the file that cannot be.

    Args:
        field: what the list is called in messages, `images`.
        what: whose format it is: `COCO`.
    """
    for number, entry in enumerate(raw):
        try:
            yield msgspec.json.decode(entry, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            for wrong in _wrong_fields(entry, kind) or [str(error).replace("`$", f"`{field}[{number}]")]:
                report(fault(f"not {what}", path, f"{field}[{number}]", f"is not as a {what} annotation file has it: {wrong}"))


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


def annotated_size(height: float | None, width: float | None) -> tuple[int, int] | None:
    """Height and width as annotated; None where they are missing, or 0 or -1, which some tools write for unknown.

    Raises ValueError where they are no whole numbers of pixels.
    """
    height, width = height or 0, width or 0
    if not (height > 0 and width > 0):
        return None
    if height != int(height) or width != int(width) or max(height, width) > LONGEST:
        raise ValueError(f"width {width:g} and height {height:g} are no size of an image in pixels")
    return int(height), int(width)


# Shapes that are no upright rectangles


@dataclass(frozen=True)
class ShapeCounts:
    """How many shapes of each kind a reader has met that are no upright rectangles, for the remarks on them."""

    boxed: Counter[str]  # of which the upright box around them is taken
    left_out: Counter[str]  # which have no box

    @staticmethod
    def none() -> ShapeCounts:
        return ShapeCounts(Counter(), Counter())

    def report(self, place: Path, report: Report) -> None:
        """Remarks, one for all that became boxes and one for all that are left out."""
        for kind, counts, message in (
            ("shapes that become boxes", self.boxed, "the upright box around each is taken"),
            ("shapes left out", self.left_out, "they have no box"),
        ):
            if counts:
                what = ", ".join(f"{number} {printable(shape)}" for shape, number in sorted(counts.items()))
                report(Finding(kind, printable(place), what, message))


def box_around(points: Sequence[Sequence[float]]) -> Box:
    """The upright box around points (x, y)."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


# The index


@dataclass(frozen=True)
class AnnotatedImage:
    """One image with its objects, as a labelling tool has it."""

    name: str  # what its id is made from
    file: str  # relative to the data folder
    size: tuple[int, int]  # (h, w)
    labels: list[str]
    boxes: list[Box]
    difficult: list[bool] | None = None


def build_index(images: Sequence[AnnotatedImage], classes: tuple[str, ...]) -> AnnotationIndex:
    """The index of images whose labels are all among `classes`."""
    label_of = {label: position for position, label in enumerate(classes)}
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and not trained on
        boxes = np.array([box for image in images for box in image.boxes], dtype=np.float64).reshape(-1, 4).astype(np.float32)
    return AnnotationIndex.build(
        image_ids=ids_of_names([image.name for image in images]),
        files=[image.file for image in images],
        sizes=[image.size for image in images],
        counts=[len(image.labels) for image in images],
        boxes_xyxy=boxes,
        labels=np.array([label_of[label] for image in images for label in image.labels], dtype=np.int32),
        classes=classes,
        category_ids=tuple(range(1, len(classes) + 1)),
        difficult=[hard for image in images for hard in image.difficult or [False] * len(image.labels)],
    )


def ids_of_names(names: Sequence[str]) -> NDArray[np.int64]:
    """A number for every image: the digits of its name where those are unique, else 1, 2, ..."""
    digits = ["".join(c for c in name if c in "0123456789") for name in names]
    if all(0 < len(d) < 18 for d in digits) and len({int(d) for d in digits}) == len(names):
        return np.array([int(d) for d in digits], dtype=np.int64)
    return np.arange(1, len(names) + 1)
