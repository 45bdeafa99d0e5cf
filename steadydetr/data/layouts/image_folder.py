"""Hugging Face's imagefolder: images beside a metadata.jsonl or metadata.csv, read without the package `datasets`."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import yaml

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.layouts.base import ALL, InspectedLayout, Report, fault
from steadydetr.data.layouts.common import AnnotatedImage, annotated_size, build_index, choose_split, head_of, is_split, splits_of, unsaid
from steadydetr.data.reading import decode_text, expanded, is_file_name
from steadydetr.files import printable
from steadydetr.kinds import register

LONGEST_CARD = 2**20  # characters of README.md that are looked at
METADATA = ("metadata.jsonl", "metadata.csv")
BOX_FIELDS = ("bbox", "bboxes", "boxes")
CLASS_FIELDS = ("category", "categories", "category_id", "label", "labels", "class")


@register("image-folder-layout")
@dataclass(frozen=True)
class ImageFolder(InspectedLayout):
    """metadata.jsonl in each split's folder; boxes are x, y, width, height in pixels, as the task pages of the hub have them."""

    looked_for = "imagefolder: metadata.jsonl or metadata.csv with file_name and objects beside images, in the folder or in SPLIT/"

    def recognises(self, where: str) -> bool:
        return bool(_splits(expanded(where)))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(_splits(expanded(where)))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        """The classes are those of the card (README.md), or else all names of all splits in the order of the alphabet."""
        root, source = expanded(where), self.folder(where)
        splits = _splits(root)
        chosen = splits[choose_split(root, splits, split, "/")]
        card = card_classes(root, source)
        lines = {path: list(_lines(path, source, report if path == chosen else unsaid)) for path in splits.values()}
        used = {name for found in lines.values() for _, line in found for name in line.names(())}
        images = list(_images(root, chosen, lines[chosen], card, source, report))
        if not images:
            raise ValueError(f"{printable(chosen)} lists no image that can be used")
        return FolderDataset(build_index(images, card or tuple(sorted(used, key=by_number))), root, f"{root.name}-{split}", source)


def by_number(name: str) -> tuple[bool, int, str]:
    """Names that are numbers come first, in their order."""
    return not name.isdecimal(), int(name) if name.isdecimal() else 0, name


def _splits(root: Path) -> dict[str, Path]:
    """The metadata files by split: of the folders that are called so, or else the only one."""
    paths = [path for name in METADATA for pattern in (name, f"*/{name}", f"data/*/{name}") for path in sorted(root.glob(pattern))]
    paths = [path for path in paths if b"file_name" in (head := head_of(path)) and b"objects" in head]
    named = {path.parent.name: path for path in paths if is_split(path.parent.name)}
    return named or ({ALL: paths[0]} if len(paths) == 1 else {path.parent.name: path for path in paths})


def card_classes(root: Path, source: DataFolder) -> tuple[str, ...]:
    """The names of the classes in the head of the data set's README.md; none where it has none."""
    path = root / "README.md"
    if not path.is_file():
        return ()
    text = decode_text(source.read_entry(path), path)[:LONGEST_CARD]
    try:
        card = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (yaml.YAMLError, ValueError, IndexError, RecursionError):  # a card is for people, and may be anything
        return ()
    return _class_labels(card)


def _class_labels(card: object) -> tuple[str, ...]:
    """The names below the first `class_label` in a card, which has them by number. Values that refer to themselves are met once."""
    waiting, met = [card], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in met or not isinstance(value, (Mapping, list)):
            continue
        met.add(id(value))
        label = value.get("class_label") if isinstance(value, Mapping) else None
        names = label.get("names") if isinstance(label, Mapping) else None
        if isinstance(names, Mapping):
            return tuple(map(str, names.values()))
        waiting += reversed(value if isinstance(value, list) else list(value.values()))
    return ()


class Line(msgspec.Struct):
    """An image with its objects: lists of a value for each, or a list of objects."""

    file_name: str
    objects: dict[str, Any] | list[dict[str, Any]] | None  # None, as pandas writes it, of an image without any
    width: float | None = None
    height: float | None = None

    def boxes(self) -> list[tuple[float, float, float, float]]:
        """x, y, width, height. Raises ValueError where they are none."""
        return msgspec.convert(self._column(BOX_FIELDS), list[tuple[float, float, float, float]])

    def names(self, classes: Sequence[str]) -> list[str]:
        """The class of each object: as written, or by its number in `classes` where there are some. Raises ValueError for a wrong one."""
        values = msgspec.convert(self._column(CLASS_FIELDS), list[int | str])
        if wrong := [v for v in values if classes and (v not in classes if isinstance(v, str) else not 0 <= v < len(classes))]:
            raise ValueError(f"{wrong[0]!r} is no class of README.md, which has {len(classes)}")
        return [classes[v] if classes and isinstance(v, int) else str(v) for v in values]

    def _column(self, names: Sequence[str]) -> list[Any]:
        if not self.objects:
            return []
        fields = self.objects if isinstance(self.objects, dict) else self.objects[0]
        name = next((name for name in names if name in fields), None)
        if name is None:
            raise ValueError(f"objects have none of {', '.join(names)}")
        values = self.objects[name] if isinstance(self.objects, dict) else [one.get(name) for one in self.objects]
        return values if isinstance(values, list) else [values]


def _lines(path: Path, source: DataFolder, report: Report) -> Iterator[tuple[int, Line]]:
    """The lines of a metadata file that can be read, with their numbers."""
    text = decode_text(source.read_list(path), path).lstrip("\ufeff")
    if path.suffix == ".csv":
        rows: Iterator[Any] = enumerate(csv.DictReader(io.StringIO(text)), 2)
    else:
        rows = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, row in rows:
        try:
            if isinstance(row, str):
                line = msgspec.json.decode(row, type=Line)
            else:  # objects are JSON in a cell of their own
                objects = msgspec.json.decode(row.get("objects") or "{}")
                line = msgspec.convert({k: v for k, v in row.items() if k and v} | {"objects": objects}, Line, strict=False)
            if len(line.names(())) != len(line.boxes()):
                raise ValueError(f"{len(line.boxes())} boxes, but {len(line.names(()))} classes")
            yield number, line
        except (ValueError, RecursionError) as error:
            report(fault("unreadable line", path, f"line {number}", str(error)))


def _images(
    root: Path, path: Path, lines: Sequence[tuple[int, Line]], classes: tuple[str, ...], source: DataFolder, report: Report
) -> Iterator[AnnotatedImage]:
    place = os.path.relpath(path.parent, root)
    for number, line in lines:
        try:
            if not is_file_name(line.file_name):
                raise ValueError(f"file_name {line.file_name!r} cannot be the name of a file")
            file = os.path.normpath(os.path.join(place, line.file_name)).replace(os.sep, "/")
            size = annotated_size(line.height, line.width) or source.picture_size(root / file)
            boxes = [(x, y, x + width, y + height) for x, y, width, height in line.boxes()]
            yield AnnotatedImage(os.path.splitext(line.file_name)[0], file, size, line.names(classes), boxes)
        except ValueError as error:
            report(fault("unusable image", path, f"line {number}", str(error)))
