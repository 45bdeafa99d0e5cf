"""Label Studio's own exports: JSON, a list of tasks, and JSON-MIN, a list of annotations."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.layouts.base import ALL, Finding, InspectedLayout, Report, fault
from steadydetr.data.layouts.common import (
    AnnotatedImage,
    Box,
    ImageFiles,
    Remarks,
    annotated_size,
    box_around,
    build_index,
    choose_split,
    decode_entries,
    head_of,
    is_image,
    is_split,
    splits_of,
    unsaid,
)
from steadydetr.data.reading import Name, decode_json, expanded, is_file_name
from steadydetr.files import printable
from steadydetr.kinds import register

# Words of which every export has at least one near its start
MARKS = (b'"was_cancelled"', b'"completed_by"', b'"total_annotations"', b'"annotation_id"', b'"from_name"', b'"rectanglelabels"')
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # which Label Studio puts before the names of uploaded files
SEVERAL = "the one marked as ground truth is taken, else the one updated last"
NAME = "Label Studio"


@register("label-studio-layout")
@dataclass(frozen=True)
class LabelStudio(InspectedLayout):
    """A JSON or JSON-MIN export, or one for each split (train.json, val.json), with the images anywhere below the folder."""

    looked_for = "Label Studio: an export as JSON or JSON-MIN (*.json, or train.json and val.json) with the images below its folder"

    def recognises(self, where: str) -> bool:
        return bool(_exports(expanded(where)))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(_splits(_exports(expanded(where))))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        """The classes are those of all exports in the folder, in the order of the alphabet, so that every split agrees on them."""
        root, source = expanded(where), self.folder(where)
        files = _exports(root)
        splits = _splits(files)
        chosen = splits[choose_split(root, splits, split, ".json")]
        tasks = {path: read_tasks(source.read_list(path), path, report if path in chosen else unsaid) for path in files}
        classes = tuple(sorted({label for found in tasks.values() for task in found for label in task.class_names()}))
        reader = TaskReader(ImageFiles(root), source, report, Remarks(), Counter())
        images = [image for path in chosen for image in reader.images(tasks[path], path)]
        if not images:
            raise ValueError(f"{', '.join(map(printable, chosen))} has no annotated image that can be used")
        return FolderDataset(build_index(images, classes), root, f"{root.name}-{split}", source)


def _exports(root: Path) -> list[Path]:
    """The exports that lie in a folder itself."""
    heads = ((path, head_of(path)) for path in sorted(root.glob("*.json")))
    return [path for path, head in heads if re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", head) and any(mark in head for mark in MARKS)]


def _splits(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The exports of each split: those that are named after one, or else all of them as one."""
    named = {path.stem: [path] for path in files if is_split(path.stem)}
    return named or {ALL: list(files)}


class Value(msgspec.Struct):
    """A shape, in percent of the image, with its labels; what has none of these fields is no shape."""

    x: float | None = None
    y: float | None = None
    width: float | None = None
    height: float | None = None
    rotation: float | None = None  # degrees, clockwise around the first corner (of an ellipse its centre)
    radiusX: float | None = None
    radiusY: float | None = None
    points: list[tuple[float, float]] | None = None
    rectanglelabels: list[str] | None = None
    polygonlabels: list[str] | None = None
    ellipselabels: list[str] | None = None
    brushlabels: list[str] | None = None
    keypointlabels: list[str] | None = None
    labels: list[str] | None = None  # of a <Labels> tag beside a tag of shapes without labels
    original_width: float | None = None  # of JSON-MIN, which has no Result
    original_height: float | None = None

    @property
    def names(self) -> list[str]:
        every = (self.rectanglelabels, self.polygonlabels, self.ellipselabels, self.brushlabels, self.keypointlabels, self.labels)
        return [name for names in every for name in names or ()]


class Result(msgspec.Struct):
    """A shape, a choice, a text or a relation that an annotator has entered."""

    value: Value | None = None
    original_width: float | None = None
    original_height: float | None = None
    image_rotation: float | None = None


class Annotation(msgspec.Struct):
    """The work of one annotator on one task."""

    result: list[Result]
    was_cancelled: bool | None = False
    ground_truth: bool | None = False
    updated_at: str | None = None
    created_at: str | None = None

    def rank(self) -> tuple[bool, str]:
        return bool(self.ground_truth), self.updated_at or self.created_at or ""


class Task(msgspec.Struct):
    """An image to annotate. Predictions and drafts are not read."""

    data: dict[str, Any]
    id: Name | None = None
    annotations: list[Annotation] | None = None
    completions: list[Annotation] | None = None  # what version 0.x called them

    @property
    def finished(self) -> list[Annotation]:
        return [annotation for annotation in self.annotations or self.completions or () if not annotation.was_cancelled]

    @property
    def chosen(self) -> Annotation | None:
        """The annotation that counts; None where there is none that was not cancelled."""
        return max(reversed(self.finished), key=Annotation.rank, default=None)

    @property
    def image(self) -> str:
        """Where the image lay: the field `image`, or else the first text that looks like an image file or an address of one."""
        texts = {key: value for key, value in self.data.items() if isinstance(value, str)}
        likely = (text for text in texts.values() if is_image(file_of(text)))
        return texts.get("image") or next(likely, "")

    def class_names(self) -> Iterator[str]:
        for result in self.chosen.result if self.chosen else ():
            if result.value is not None and shape_of(result.value) in BOXED:
                yield from result.value.names


def read_tasks(content: bytes, path: Path, report: Report) -> list[Task]:
    """The tasks of an export. Entries that cannot be used are reported and left out.

    Raises ValueError where the file is no list; names it.
    """
    try:
        raw = decode_json(content, path, list[msgspec.Raw])
    except msgspec.ValidationError as error:
        raise ValueError(f"{printable(path)} is not an export of Label Studio: {error}") from error
    if raw and not _is_task(raw[0]):
        return _minimal_tasks(raw, path, report)
    try:
        return decode_json(content, path, list[Task])
    except msgspec.ValidationError:
        return list(decode_entries(raw, "tasks", Task, path, report, NAME))


def _is_task(entry: msgspec.Raw) -> bool:
    """Whether an entry is a task of the full export; JSON-MIN has what is in `data` beside the annotations."""
    try:
        return isinstance(msgspec.json.decode(entry).get("data"), dict)
    except (msgspec.DecodeError, AttributeError):
        return True  # it will be named where it is decoded


def _minimal_tasks(raw: Sequence[msgspec.Raw], path: Path, report: Report) -> list[Task]:
    """The tasks of a JSON-MIN export, which has an entry for each annotation: the task's data, and a list for each tag of shapes."""
    tasks: dict[object, Task] = {}
    for number, fields in enumerate(decode_entries(raw, "tasks", dict[str, Any], path, report, NAME)):
        lists = [v for v in fields.values() if isinstance(v, list) and v and all(isinstance(one, dict) for one in v)]
        try:
            values = [msgspec.convert(value, Value) for found in lists for value in found]
        except msgspec.ValidationError as error:
            report(fault(f"not {NAME}", path, f"tasks[{number}]", f"is not as a {NAME} annotation file has it: {error}"))
            continue
        result = [Result(value, value.original_width, value.original_height) for value in values]
        stamps = {key: fields.get(key) for key in ("updated_at", "created_at") if isinstance(fields.get(key), str)}
        data = {key: value for key, value in fields.items() if isinstance(value, str)}
        key = fields.get("id", number)
        task = tasks.setdefault(repr(key), Task(data, key if isinstance(key, (int, str)) else None, []))
        assert task.annotations is not None
        task.annotations.append(Annotation(result, **stamps))
    return list(tasks.values())


def file_of(address: str) -> str:
    """The path in an address that Label Studio knows an image by, with `/`: `/data/local-files/?d=a/b.jpg` is `a/b.jpg`."""
    parts = urlsplit(address)
    if parts.path.startswith("/data/local-files") and parts.query.startswith("d="):
        name = unquote(parts.query[2:])
    elif parts.scheme or parts.path.startswith("/data/"):
        name = unquote(parts.path)
    else:
        name = address
    return name.replace("\\", "/").strip("/")


@dataclass(frozen=True)
class TaskReader:
    """Turns tasks into images with boxes, and reports what is remarkable."""

    files: ImageFiles
    source: DataFolder
    report: Report
    remarks: Remarks
    skipped: Counter[str]

    def images(self, tasks: Sequence[Task], path: Path) -> Iterator[AnnotatedImage]:
        several = 0
        for number, task in enumerate(tasks):
            entry = f"task {printable(number if task.id is None else task.id)[:80]}"
            annotation = task.chosen
            several += len(task.finished) > 1
            if annotation is None:
                cancelled = bool(task.annotations or task.completions)
                self.skipped["whose annotations were cancelled" if cancelled else "without annotation"] += 1
                continue
            try:
                yield self._image(task, annotation, entry)
            except ValueError as error:
                self.report(fault("unusable task", path, entry, str(error)))
        if several:
            self.report(Finding("several annotations", printable(path), f"{several} tasks", SEVERAL))
        for what, count in sorted(self.skipped.items()):
            message = "only images that somebody has annotated are read"
            self.report(Finding("tasks left out", printable(path), f"{count} tasks {what}", message))
        self.remarks.tell(path, self.report)

    def _image(self, task: Task, annotation: Annotation, entry: str) -> AnnotatedImage:
        """Raises ValueError where the image has no possible name, or its size or a shape cannot be known."""
        file = self._file(task.image)
        with_shape = [result for result in annotation.result if result.value is not None and shape_of(result.value)]
        sizes = {annotated_size(r.original_height, r.original_width) for r in with_shape} - {None}
        if len(sizes) > 1:
            raise ValueError(f"its shapes name different sizes of the image: {sorted(filter(None, sizes))}")
        size = next(iter(sizes), None) or self.source.picture_size(self.files.root / file)
        labels, boxes = list[str](), list[Box]()
        for result in with_shape:
            assert result.value is not None
            if result.image_rotation:
                raise ValueError(f"it was annotated turned by {result.image_rotation:g} degrees: turn the image file, or export as COCO")
            names, box = result.value.names, self._box(result.value, *size, entry)
            labels += names if box else []
            boxes += [box] * len(names) if box else []
        return AnnotatedImage(file.rpartition(".")[0], file, size, labels, boxes)

    def _file(self, address: str) -> str:
        """The image file, by the longest end of its path that is found, with or without the prefix of an upload."""
        name = file_of(address)
        if not is_file_name(name) or address.startswith("data:"):
            raise ValueError(f"its data name no image file: {address[:80]!r}")
        folder, _, last = name.rpartition("/")
        return self.files.find(name) or self.files.find(f"{folder}/{UPLOAD_PREFIX.sub('', last)}") or last

    def _box(self, value: Value, height: int, width: int, entry: str) -> Box | None:
        """The box of a shape in pixels; None, counted, where it has none."""
        shape = shape_of(value)
        if shape not in BOXED:
            self.remarks.left_out(f"shapes of the kind {shape}", entry, len(value.names))
            return None
        if shape != "rectangle":
            self.remarks.boxed(f"shapes of the kind {shape}", entry, len(value.names))
        box = box_around(outline(value, shape, width, height))
        if not all(map(math.isfinite, box)):
            raise ValueError(f"a {shape} has no finite coordinates")
        return box


BOXED = ("rectangle", "rotated rectangle", "polygon", "ellipse")


def shape_of(value: Value) -> str:
    """What kind of shape a value is; empty where it is none. A tag of shapes without labels has a twin with labels, which is read."""
    if value.brushlabels is not None:
        return "brush stroke"
    if value.keypointlabels is not None:
        return "key point"
    if not value.names:
        return ""
    if value.points is not None:
        return "polygon" if len(value.points) > 1 else ""
    if value.x is None or value.y is None:
        return ""
    if value.radiusX is not None and value.radiusY is not None:
        return "ellipse"
    if value.width is None or value.height is None:
        return ""
    return "rotated rectangle" if (value.rotation or 0) % 360 else "rectangle"


def outline(value: Value, shape: str, width: int, height: int) -> Sequence[tuple[float, float]]:
    """Points of a shape in pixels, around which its box lies. Turns are clockwise, in pixels, as the tool draws them."""
    if shape == "polygon":
        return [(x * width / 100, y * height / 100) for x, y in value.points or ()]
    assert value.x is not None and value.y is not None
    angle = math.radians(value.rotation or 0)
    x, y = value.x * width / 100, value.y * height / 100
    if shape == "ellipse":
        a, b = (value.radiusX or 0) * width / 100, (value.radiusY or 0) * height / 100
        half_width, half_height = math.hypot(a * math.cos(angle), b * math.sin(angle)), math.hypot(a * math.sin(angle), b * math.cos(angle))
        return [(x - half_width, y - half_height), (x + half_width, y + half_height)]
    assert value.width is not None and value.height is not None
    if shape == "rectangle":
        return [(x, y), ((value.x + value.width) * width / 100, (value.y + value.height) * height / 100)]
    along, down = value.width * width / 100, value.height * height / 100
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in ((0, 0), (along, 0), (along, down), (0, down))]
