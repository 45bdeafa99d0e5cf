"""What several layouts share: names of splits, files found by name, entries decoded one by one, remarks, an index of what was read."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from steadydetr.data.columns import Lists
from steadydetr.data.images import IMAGE_SUFFIXES
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts.base import ALL, STANDARD, Finding, NoSplit, Report, fault
from steadydetr.data.masks import Masks
from steadydetr.data.reading import LONGEST, is_hidden, parts_in_common
from steadydetr.files import listed, printable
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
Box = tuple[float, float, float, float]  # xyxy in pixels
ALIASES = {
    "training": "train",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "testing": "test",
}  # what exports call the splits
HEAD = 2**16  # bytes at the start of a file that its kind is told by
EXACT = 2**53  # below it numbers with a decimal point keep every digit


# Splits


def standard_split(name: str) -> str:
    """train, val or test for what exports call these (valid, Validation, val2017, ...); any other name as it is."""
    lower = re.sub(r"(19|20)\d\d$", "", name.lower())
    return ALIASES.get(lower, lower if lower in STANDARD else name)


def is_split(name: str) -> bool:
    """Whether a file or folder of this name is of one of the three splits."""
    return standard_split(name) in STANDARD


def splits_of(names: Iterable[str]) -> tuple[str, ...]:
    """The splits of a place by the names that its files or folders give them: train, val, test first; a single other one is `all`."""
    found = list(dict.fromkeys(map(standard_split, names)))
    if len(found) == 1 and found[0] not in STANDARD:
        return (ALL,)
    return tuple(sorted(found, key=lambda name: (STANDARD.index(name) if name in STANDARD else len(STANDARD), name)))


def choose_split(place: Path, names: Iterable[str], split: str, ending: str = "", holder: str = "it") -> str:
    """The name, among those that a place has, which means `split`.

    Args:
        ending: what follows the names on disk: `/` for folders.
        holder: what the names were found in, in words.

    Raises:
        NoSplit: there is none; says what there is.
        ValueError: several of them mean it (D-105); names them.
    """
    there = list(dict.fromkeys(names))
    if split == ALL and splits_of(there) == (ALL,):
        return there[0]
    found = [name for name in there if standard_split(name) == split] or [name for name in there if name == split]
    found = found or [name for name in there if standard_split(name) == ALIASES.get(split.lower())]
    found = found or [name for name in there if split == "train" and name == "trainval"]  # of VOC, where someone left out the other lists
    if not found and splits_of(there) == (ALL,):
        raise NoSplit(f"{printable(place)} is not split, so it has no split {split!r}: all its images are the split {ALL!r}")
    if not found:
        holds = listed(map(printable, sorted(there)), 10) or "none"
        raise NoSplit(f"{printable(place)} has no split {split!r}; {holder} holds {holds}")
    if len(found) > 1:
        both = " and ".join(f"{printable(name)}{ending}" for name in sorted(found, key=split.__eq__))
        raise ValueError(f"{printable(place)} has {both}, which both could be split {split!r}: remove or rename one of them")
    return found[0]


def unsaid(finding: Finding) -> None:
    """The report of files of another split, which are read for the names of their classes alone."""


# Files


def is_image(name: str) -> bool:
    """Whether a file is called as images are."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def head_of(path: Path, most: int = HEAD) -> bytes:
    """The first bytes of a regular file; empty where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would block
            return b""
        with open(path, "rb") as file:
            return file.read(most)
    except OSError:
        return b""


def files_below(folder: Path, endings: tuple[str, ...] = IMAGE_SUFFIXES) -> Iterator[str]:
    """The files below a folder with one of these endings, also in capitals, relative to it with `/`, folder by folder in order.

    Hidden ones are left out, and links to folders are not followed.
    """
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        place = os.path.relpath(parent, folder)
        for file in sorted(files):
            if is_called(file, endings):
                yield os.path.normpath(os.path.join(place, file)).replace(os.sep, "/")


def is_called(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a file that is not hidden has one of these endings, which are in small letters."""
    return name.lower().endswith(endings) and not is_hidden(name)


def named(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """The names of the files with one of these endings in a folder that may not exist."""
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if is_called(entry.name, endings) and entry.is_file())


def split_folders(folder: Path) -> list[str]:
    """The folders in a folder that are called train, val or test, or what exports call these."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_split(entry.name) and entry.is_dir())


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
        yield from (Path(entry.path) for entry in found if is_called(entry.name, (ending,)))
        below = [Path(entry.path) for entry in found if entry.is_dir(follow_symlinks=False) and not is_hidden(entry.name)]
        waiting += below[: folders - len(waiting)]


@dataclass(frozen=True)
class Listings:
    """The files below a folder, of which each folder in it is listed once."""

    root: Path
    names: dict[str, dict[str, bool]] = field(default_factory=dict)  # by folder: the names in it, and which are links
    stems: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # by folder: names by the same without ending

    def image_of(self, stem: str, written: str = "") -> str:
        """The image file of an annotation file: of its name, with the ending in `written`, or else any that is there, or else .jpg."""
        folder, name = os.path.split(stem)
        if folder not in self.stems:
            self.stems[folder] = {}
            for file in self._names(folder):
                self.stems[folder].setdefault(os.path.splitext(file)[0], []).append(file)
        files = self.stems[folder].get(name, [])
        as_written = f"{name}{os.path.splitext(written.strip())[1]}"
        images = [(IMAGE_SUFFIXES.index(ending), file) for file in files if (ending := file[len(name) :].lower()) in IMAGE_SUFFIXES]
        file = as_written if as_written in files else min(images, default=(0, f"{name}.jpg"))[1]
        return f"{folder}/{file}".lstrip("/")

    def is_there(self, file: str) -> bool:
        folder, name = os.path.split(file)
        return name in self._names(folder)

    def is_link(self, file: str) -> bool:
        folder, name = os.path.split(file)
        return self._names(folder).get(name, False)

    def names_in(self, folder: str) -> Collection[str]:
        return self._names(folder).keys()

    def _names(self, folder: str) -> dict[str, bool]:
        if folder not in self.names:
            try:
                with os.scandir(self.root / folder) as entries:
                    self.names[folder] = {entry.name: entry.is_symlink() for entry in entries}
            except (OSError, ValueError):  # there is no such folder: the images are missing
                self.names[folder] = {}
        return self.names[folder]


@dataclass(frozen=True)
class ImageFiles:
    """The image files below a folder, found by what a labelling tool calls them."""

    root: Path

    @cached_property
    def by_name(self) -> dict[str, list[str]]:
        """Files relative to the root, by their last part."""
        found: dict[str, list[str]] = {}
        for file in files_below(self.root):
            found.setdefault(file.rpartition("/")[2], []).append(file)
        return found

    def find(self, written: str) -> str | None:
        """The file whose path ends as `written` does, in as many parts as any; None where no file has its last part.

        Raises ValueError where several files fit equally.
        """
        files = self.by_name.get(written.rpartition("/")[2], [])
        depth = max((parts_in_common(written, file) for file in files), default=0)
        best = [file for file in files if parts_in_common(written, file) == depth]
        if len(best) > 1:
            raise ValueError(f"{written!r} could be {listed(map(repr, best), 4)}: rename the files, or keep the folders of the export")
        return best[0] if best else None


# Entries


def decode_entries(
    raw: Iterable[msgspec.Raw], field: str, kind: type[T], path: Path, report: Report, what: str, first: int = 0, strict: bool = True
) -> Iterator[T]:
    """The entries of a list, decoded one by one because there is at least one in the file that cannot be.

    Args:
        field: what the list is called in messages, `images`.
        what: whose format it is: `COCO`.
        first: the number of the first in the whole list.
        strict: whether a number must be one, and not a text of one.
    """
    for number, entry in enumerate(raw, first):
        try:
            yield msgspec.convert(_whole_ids(msgspec.json.decode(entry)), kind, strict=strict)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            for wrong in _wrong_fields(entry, kind) or [str(error).replace("`$", f"`{field}[{number}]")]:
                report(fault(f"not {what}", path, f"{field}[{number}]", f"is not as a {what} annotation file has it: {wrong}"))


def _whole_ids(entry: Any) -> Any:
    """The entry with ids such as 7.0, as pandas writes a column with gaps, as the whole numbers that they are."""
    for name in ("id", "image_id", "category_id") if isinstance(entry, dict) else ():
        value = entry.get(name)
        if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
            entry[name] = int(value)
    return entry


def _wrong_fields(entry: msgspec.Raw, kind: type[Any]) -> list[str]:
    """What is wrong with every field of an entry; empty where it has no fields at all."""
    try:
        values = msgspec.json.decode(entry)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    found = []
    for known in msgspec.structs.fields(kind) if isinstance(values, dict) else ():
        if known.name not in values and known.required:
            found.append(f"Object missing required field `{known.name}`")
        elif known.name in values:
            try:
                msgspec.convert(values[known.name], known.type)
            except (ValueError, OverflowError) as error:
                place = str(error).replace("`$", f"`{known.name}")
                found.append(place if "`" + known.name in place else f"{place} - at `{known.name}`")
    return found


def annotated_size(height: float | None, width: float | None) -> tuple[int, int] | None:
    """Height and width as annotated; None where they are missing, or 0 or -1, which some tools write for unknown.

    Raises ValueError where they are no whole numbers of pixels.
    """
    height, width = height or 0, width or 0
    return whole_size(height, width) if height > 0 and width > 0 else None


def whole_size(height: float, width: float) -> tuple[int, int]:
    """Height and width as whole numbers of pixels. Raises ValueError where they are none."""
    if not 0 < min(height, width) <= max(height, width) <= LONGEST or height != int(height) or width != int(width):
        raise ValueError(f"width {width:g} and height {height:g} are no size of an image in pixels")
    return int(height), int(width)


# What is no box


BOXED = "shapes that become boxes"  # a kind of finding


@dataclass
class Remarks:
    """What a reader makes of entries that are no boxes, counted over a whole split, because it can be all of them."""

    counts: dict[tuple[str, str, str], int] = field(default_factory=dict)  # by kind of finding, what they are, what is made of them
    first: dict[tuple[str, str, str], str] = field(default_factory=dict)  # where the first of each is

    def add(self, kind: str, what: str, made: str, where: str, count: int = 1) -> None:
        if count:
            self.counts[kind, what, made] = self.counts.get((kind, what, made), 0) + count
            self.first.setdefault((kind, what, made), where)

    def boxed(self, what: str, where: str, count: int = 1) -> None:
        """Shapes of which the upright box around them is taken."""
        self.add(BOXED, what, "are taken as the boxes around them", where, count)

    def left_out(self, what: str, where: str, count: int = 1) -> None:
        """Shapes that have no box."""
        self.add("shapes left out", what, "are left out, for they have no box", where, count)

    def tell(self, place: object, report: Report) -> None:
        """Report them all, each as a sentence with the number and the first place, as findings that stop nothing."""
        for (kind, what, made), count in self.counts.items():
            sentence = f"{count} {what} {made}; the first: {self.first[kind, what, made]}"
            report(Finding(kind, printable(place), "", printable(sentence)))


def box_around(points: Sequence[Sequence[float]]) -> Box:
    """The upright box around points (x, y)."""
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def as_corners(boxes: NDArray[np.floating[Any]], sizes: NDArray[np.integer[Any]]) -> tuple[bool, int]:
    """Whether boxes (x, y, width, height) all fit their images, of sizes [A, 2] (h, w), as if they were two corners, and how many end
    beyond them as what they are."""
    x, y, z, w = boxes.T
    height, width = sizes.T
    fit = (z > x) & (w > y) & (z <= width + 1) & (w <= height + 1)
    with np.errstate(over="ignore", invalid="ignore"):
        beyond = (x + z > width + 1) | (y + w > height + 1)
    return bool(fit.all()), int(beyond.sum())


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
    polygons: list[list[list[float]]] | None = None  # x, y, x, y, ... in pixels of each part of every object; None: not asked for


def build_index(images: Sequence[AnnotatedImage], classes: tuple[str, ...], masks: bool = False) -> AnnotationIndex:
    """The index of images whose labels are all among `classes`; with their polygons as masks, if asked for."""
    label_of = {label: position for position, label in enumerate(classes)}
    polygons = [parts for image in images for parts in image.polygons or ()]
    coordinates = Lists.of([list(chain.from_iterable(parts)) for parts in polygons], "float64")
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
        masks=Masks.of_polygons(coordinates, Lists.of([list(map(len, parts)) for parts in polygons])) if masks else None,
    )


def ids_of_names(names: Sequence[str]) -> NDArray[np.int64]:
    """A number for every image: the digits of its name where those are unique, else 1, 2, ..."""
    digits = ["".join(c for c in name if c in "0123456789") for name in names]
    if all(0 < len(d) < 18 for d in digits) and len({int(d) for d in digits}) == len(names):
        return np.array([int(d) for d in digits], dtype=np.int64)
    return np.arange(1, len(names) + 1)
