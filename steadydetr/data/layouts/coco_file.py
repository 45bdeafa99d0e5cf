"""What a COCO file holds, decoded some entries at a time: the file may be larger than memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

import msgspec

from steadydetr.data.columns import IdColumn
from steadydetr.data.index import Federated
from steadydetr.data.json_lists import JsonLists
from steadydetr.data.layouts.base import Finding, Report, fault
from steadydetr.data.layouts.coco_masks import AS_WRITTEN, MaskColumn, Segmentation, polygons_of
from steadydetr.data.layouts.common import decode_entries, unsaid
from steadydetr.data.reading import Id, Name
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")

Number = float | None
OTHER_TYPE = re.compile(r"got `(?!null).* at `segmentation[\[`]")  # as msgspec says it; null is told of otherwise, as what NaN counts as


class CocoImage(msgspec.Struct, gc=False):
    id: Name
    file_name: str
    height: Number = None
    width: Number = None


class CocoAnnotation(msgspec.Struct, gc=False):
    image_id: Name
    category_id: Id | float | str  # whole numbers once the file is read
    bbox: tuple[float, float, float, float]
    id: Any = None  # many exports have texts here; it is used only to name the annotation
    area: Number = None
    iscrowd: float | bool | None = 0


class MaskedAnnotation(CocoAnnotation, gc=False):
    segmentation: Segmentation = None

    def __post_init__(self) -> None:
        if isinstance(self.segmentation, list):
            self.segmentation = [*polygons_of(self.segmentation)]


class CocoCategory(msgspec.Struct):
    id: Id
    name: str
    supercategory: Any = None


class CocoFile(msgspec.Struct):
    """Which entries a file has, and what they say together. Masks, most of many files, are skipped."""

    images: Sequence[CocoImage]
    categories: Sequence[CocoCategory]
    annotations: Sequence[CocoAnnotation]

    @staticmethod
    def federated(images: Sequence[Any], categories: Sequence[Any]) -> Federated | None:
        """What the images and categories that are used say of a federated data set; COCO is none."""
        return None


class MaskedCocoFile(CocoFile):
    annotations: Sequence[MaskedAnnotation]


@dataclass(frozen=True)
class Entries(Generic[T]):
    """The entries of one list of a file. They are decoded anew whenever they are gone through."""

    lists: JsonLists
    name: str
    kind: type[T]
    one_by_one: bool  # because there is at least one in the file that cannot be decoded

    @property
    def most(self) -> int:
        """How many there are, at most."""
        return self.lists.most(self.name)

    def batches(self, report: Report) -> Iterator[list[T]]:
        """Some at a time. Raises msgspec.ValidationError for one that cannot be decoded; one by one these are reported and left out."""
        if not self.one_by_one:
            kind: Any = list[self.kind]  # type: ignore[name-defined]
            yield from map(msgspec.json.Decoder(kind).decode, self.lists.read(self.name))
            return
        if issubclass(self.kind, MaskedAnnotation):
            report = _telling_how_masks_are_written(report)
        decoder, first = msgspec.json.Decoder(list[msgspec.Raw]), 0
        for raw in map(decoder.decode, self.lists.read(self.name)):
            yield list(decode_entries(raw, self.name, self.kind, self.lists.path, report, "COCO", first, strict=self.name != "categories"))
            first += len(raw)


def _telling_how_masks_are_written(report: Report) -> Report:
    """A report that says it of a `segmentation` with values of other types."""

    def told(finding: Finding) -> None:
        if OTHER_TYPE.search(finding.message):
            finding = replace(finding, message=f"{finding.message}; {AS_WRITTEN}")
        report(finding)

    return told


class Annotations:
    """The annotations of a file as columns, in the order of the file."""

    def __init__(self, most: int, masks: bool = False) -> None:
        self.masks = MaskColumn() if masks else None
        self.image_ids, self.category_ids, self.ids = IdColumn(most), IdColumn(most), IdColumn(most)
        self.boxes_xyxy = np.empty((most, 4), np.float32)
        self.areas = np.empty(most, np.float32)  # NaN: not said
        self.crowd = np.empty(most, bool)

    def extend(self, batch: Sequence[CocoAnnotation]) -> None:
        start = self.ids.count
        rows = slice(start, start + len(batch))
        self.image_ids.extend([a.image_id for a in batch])
        self.category_ids.extend([int(a.category_id) for a in batch])
        self.ids.extend(_ids([a.id for a in batch], start + 1))
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is infinite, and not trained on
            corners = np.fromiter(chain.from_iterable([a.bbox for a in batch]), np.float64, 4 * len(batch)).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            self.boxes_xyxy[rows] = corners.astype(np.float32)
            areas = np.array([-1 if a.area is None else a.area for a in batch], dtype=np.float64).astype(np.float32)
            self.areas[rows] = np.where(areas < 0, np.nan, areas)
        self.crowd[rows] = [bool(a.iscrowd) for a in batch]
        if self.masks is not None:
            self.masks.extend([a.segmentation for a in batch if isinstance(a, MaskedAnnotation)])

    def take(self, order: NDArray[np.int64]) -> None:
        """Keep only these rows, in that order."""
        self.crowd, self.areas, self.ids.array = self.crowd[order], self.areas[order], self.ids.array[order]
        self.ids.count = len(order)
        for column in range(4):  # one after the other, because memory may be short
            self.boxes_xyxy[: len(order), column] = self.boxes_xyxy[order, column]
        self.boxes_xyxy = self.boxes_xyxy[: len(order)]


def _ids(ids: list[Any], first: int) -> list[int | str]:
    """The ids of annotations, which only name them: where one has none, its number; what is no number as text."""
    if {*map(type, ids)} <= {int}:
        return ids
    return [number if i is None else i if type(i) is int else str(i) for number, i in enumerate(ids, first)]


@dataclass(frozen=True)
class CocoData:
    """A COCO file: its categories and annotations, and its images, which are decoded whenever they are asked for."""

    images: Entries[CocoImage]
    image_ids: NDArray[Any]  # of all of them
    categories: list[CocoCategory]
    annotations: Annotations
    annotation_entries: Entries[CocoAnnotation]
    wrong: list[Finding]  # annotations whose category is no number, and which are left out

    def each_annotation(self) -> Iterator[CocoAnnotation]:
        """What every row of `annotations` was in the file."""
        return chain.from_iterable(with_category_ids(self.annotation_entries, unsaid, unsaid))


def decode_coco(lists: JsonLists, report: Report, kind: type[CocoFile]) -> CocoData:
    """Decode only the fields that are used.

    Raises:
        msgspec.ValidationError: a list is missing or is no list.
        msgspec.DecodeError, UnicodeDecodeError, RecursionError: the file is no JSON.
    """
    msgspec.json.decode(lists.without_lists, type=kind)
    used = [field.name for field in msgspec.structs.fields(kind)]
    for name in lists.names.keys() - {*used}:
        lists.check(name)
    try:
        return _decode(lists, report, kind, one_by_one=False)
    except msgspec.ValidationError:
        for name in used:
            lists.check(name)
        return _decode(lists, report, kind, one_by_one=True)


def _decode(lists: JsonLists, report: Report, kind: type[CocoFile], one_by_one: bool) -> CocoData:
    """Decode every entry once; what is wrong is told in the order of the lists, whatever their order in the file is."""
    types = {field.name: get_args(field.type)[0] for field in msgspec.structs.fields(kind)}
    images, categories, entries = (Entries(lists, name, types[name], one_by_one) for name in ("images", "categories", "annotations"))
    image_ids = IdColumn(images.most)
    for batch in images.batches(report):
        image_ids.extend([image.id for image in batch])
    known = list(chain.from_iterable(categories.batches(report)))
    annotations = Annotations(entries.most, issubclass(types["annotations"], MaskedAnnotation))
    wrong = list[Finding]()
    for part in with_category_ids(entries, report, wrong.append):
        annotations.extend(part)
    return CocoData(images, image_ids.values, known, annotations, entries, wrong)


def with_category_ids(entries: Entries[CocoAnnotation], report: Report, wrong: Report) -> Iterator[list[CocoAnnotation]]:
    """Batches with whole numbers as ids of categories, which some tools write as "3" or 3.0; `wrong` takes what is no number."""
    first = 0
    for batch in entries.batches(report):
        whole = batch
        if not {type(a.category_id) for a in batch} <= {int}:
            whole = []
            for number, annotation in enumerate(batch, first):
                try:
                    value = msgspec.convert(annotation.category_id, Id, strict=False)
                except msgspec.ValidationError as error:
                    message = f"is not as a COCO annotation file has it: {error} - at `category_id`"
                    wrong(fault("not COCO", entries.lists.path, f"annotations[{number}]", message))
                else:
                    whole.append(msgspec.structs.replace(annotation, category_id=value))
        first += len(batch)
        yield whole
