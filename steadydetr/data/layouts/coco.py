"""COCO annotations: of COCO itself, and of Roboflow's exports, which lie elsewhere."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from steadydetr.data.columns import IdColumn, Ids, Names, counts_in_order, find_ids, id_array
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.index import AnnotationIndex, Federated, join_federated
from steadydetr.data.json_lists import NO_JSON, JsonLists
from steadydetr.data.layouts.base import ALL, STANDARD, Finding, InspectedLayout, NoSplit, Report, fault, stop
from steadydetr.data.layouts.coco_file import CocoCategory, CocoData, CocoFile, CocoImage, MaskedCocoFile, decode_coco
from steadydetr.data.layouts.common import ALIASES, Remarks, annotated_size, choose_split, splits_of, standard_split, unsaid
from steadydetr.data.reading import decode_json, expanded, is_file_name, name_on_disk
from steadydetr.files import printable
from steadydetr.kinds import register
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROBOFLOW = "_annotations.coco.json"
ANNOTATIONS, INSTANCES = "annotations", "instances_"  # the folder of COCO's files, and how their names begin
BLOCK = 2**21  # ids that are looked up at once
AWAY = re.compile(r"([A-Za-z]:)?[\\/]|\.\.[\\/]")  # how a path begins that leads out of the folder


@register("coco-layout")
@dataclass(frozen=True)
class Coco(InspectedLayout):
    """annotations/instances_SPLIT*.json beside folders of images."""

    gives_masks = True
    looked_for = "COCO: annotations/instances_SPLIT*.json beside folders of images"

    def recognises(self, where: str) -> bool:
        return any(expanded(where).glob(f"{ANNOTATIONS}/{INSTANCES}*.json"))

    def splits(self, where: str) -> tuple[str, ...]:
        names = [path.stem.removeprefix(INSTANCES) for path in self._files(where, "")]
        return splits_of(next((split for split in STANDARD if name.lower().startswith(split)), standard_split(name)) for name in names)

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root, matching = expanded(where), self._files(where, split)
        if len(matching) != 1:
            what = "no annotation file" if not matching else "several annotation files"
            present = ", ".join(printable(path.name) for path in self._files(where, ""))
            message = f"{printable(root / ANNOTATIONS)} has {what} for split {split!r}; it holds {present}."
            kind = ValueError if matching else NoSplit
            raise kind(f"{message} Name one with --data.train-split or --data.val-split")
        name = matching[0].stem.removeprefix(INSTANCES)
        places = [root / name, root / "images" / name, root / "images", root]
        return read_coco(matching[0], places, f"{root.name}-{name}", self.folder(where), report, coco_kind(self.masks))

    def _files(self, where: str, split: str) -> list[Path]:
        """The annotation file of that very split, or else those whose split begins like it, if in capitals; `all`: the only one."""
        files = sorted(expanded(where).glob(f"{ANNOTATIONS}/{INSTANCES}*.json"))
        if split == ALL and self.splits(where) == (ALL,):
            return files
        names = {path: path.stem.removeprefix(INSTANCES) for path in files}
        alike = [path for path in files if names[path].lower().startswith(ALIASES.get(split.lower(), split.lower()))]
        alike = alike or [path for path in files if standard_split(names[path]) == split]
        return [path for path in files if names[path] == split] or alike


@register("roboflow-layout")
@dataclass(frozen=True)
class Roboflow(InspectedLayout):
    """SPLIT/_annotations.coco.json with the images beside it; validation is called valid."""

    gives_masks = True
    looked_for = "Roboflow: SPLIT/_annotations.coco.json with the images beside it (SPLIT: train, valid, test)"

    def recognises(self, where: str) -> bool:
        return bool(self._splits(where))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(self._splits(where))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root = expanded(where)
        folder = root / choose_split(root, self._splits(where), split, "/")
        return read_coco(folder / ROBOFLOW, [folder], f"{root.name}-{folder.name}", self.folder(where), report, coco_kind(self.masks))

    def _splits(self, where: str) -> list[str]:
        return sorted(path.parent.name for path in expanded(where).glob(f"*/{ROBOFLOW}"))


def coco_kind(masks: bool) -> type[CocoFile]:
    return MaskedCocoFile if masks else CocoFile


def read_coco(
    path: Path,
    places: Sequence[Path],
    name: str,
    source: DataFolder | None = None,
    report: Report = stop,
    kind: type[CocoFile] = CocoFile,
) -> FolderDataset:
    """Read a COCO JSON file. Classes are the file's categories in the order of their ids, whatever gaps those have.

    Args:
        places: folders that the file names may be relative to; the first that holds the images is taken.
        source: the data folder; that folder if not given.
        report: takes what is wrong with an entry, which is then left out.
        kind: what the file holds, if it is more than a COCO file.

    Raises:
        ValueError: the file cannot be used at all; names it.
    """
    reader = source or DataFolder(path.parent)
    with reader.open_list(path) as file:
        data = _decode(JsonLists.of(path, file), report, kind)
        folder = _image_folder(places, data)
        source = source or DataFolder(folder)
        return FolderDataset(_index(data, path, folder, source, report, kind), folder, name, source)


def _decode(lists: JsonLists, report: Report, kind: type[CocoFile]) -> CocoData:
    """Decode a file, also one with NaN in it; a ValueError says what is wrong with it, and where."""
    try:
        return decode_coco(lists, report, kind)
    except NO_JSON:
        nulls = replace(lists, nulls=True)

    def with_reason(finding: Finding) -> None:
        report(replace(finding, message=f"{finding.message}; NaN and Infinity count as null"))

    try:
        return decode_coco(nulls, with_reason, kind)
    except NO_JSON as error:
        _refuse((nulls if isinstance(error, msgspec.ValidationError) else lists).text, lists.path, kind)
        raise ValueError(f"{printable(lists.path)} is not JSON: {error}") from error


class RawFile(msgspec.Struct):
    """A COCO file whose entries are not decoded."""

    images: list[msgspec.Raw]
    categories: list[msgspec.Raw]
    annotations: list[msgspec.Raw]


def _refuse(content: bytes, path: Path, kind: type[CocoFile]) -> None:
    """Decode a file that is no COCO file as a whole, which says why and where. Raises ValueError; names the file."""
    try:
        decode_json(content, path, kind)
    except msgspec.ValidationError as error:
        try:
            decode_json(content, path, RawFile)
        except msgspec.ValidationError:  # a list is missing or is no list
            raise ValueError(f"{printable(path)} is not a COCO annotation file: {error}") from error


def _index(data: CocoData, path: Path, folder: Path, source: DataFolder, report: Report, kind: type[CocoFile]) -> AnnotationIndex:
    """What of a file can be used. Arrays of all annotations are given up as soon as they can be: there may be many millions."""
    for finding in data.wrong:
        report(finding)
    categories = list(_usable_categories(data, path, report))
    images = _usable_images(data, categories, path, folder, source, report, kind)
    if not categories or not len(images.ids):
        raise ValueError(f"{printable(path)} lists no {'image' if categories else 'category'} that can be used")
    annotations = data.annotations
    positions = _find(images.ids, annotations.image_ids.values)
    labels = _find(id_array([c.id for c in categories]), annotations.category_ids.values)
    del annotations.image_ids, annotations.category_ids
    good = (positions >= 0) & (labels >= 0)
    _report_references(data, good, path, report)
    _report_ids(annotations.ids.values, path, report)
    order = np.argsort(positions, kind="stable")
    order = order if good.all() else order[good[order]]
    annotations.take(order)
    labels, positions = labels[order], positions[order]
    masks = None if annotations.masks is None else annotations.masks.take(order, images.sizes[positions])
    return AnnotationIndex.build(
        image_ids=images.ids,
        files=images.files,
        sizes=images.sizes,
        counts=counts_in_order(positions, len(images.ids)),
        boxes_xyxy=annotations.boxes_xyxy,
        labels=labels,
        classes=tuple(c.name for c in categories),
        category_ids=tuple(c.id for c in categories),
        crowd=annotations.crowd,
        areas=annotations.areas,
        annotation_ids=annotations.ids.values,
        federated=images.federated,
        masks=masks,
    )


def _find(known: Ids, wanted: Ids) -> NDArray[np.int32]:
    """As `find_ids`, for many: some millions at a time, in half the memory."""
    found = np.empty(len(wanted), np.int32)
    for start in range(0, len(wanted), BLOCK):
        found[start : start + BLOCK] = find_ids(known, wanted[start : start + BLOCK])
    return found


def _image_folder(places: Sequence[Path], data: CocoData) -> Path:
    """The first of the folders that holds one of the first images: their names may begin with the folder's own, `train/1.png`."""
    there = [place for place in places if place.is_dir()] or list(places[-1:])
    first = islice(chain.from_iterable(data.images.batches(unsaid)), 20)
    names = [image.file_name for image in first if is_file_name(image.file_name)]
    return next((p for p in there if any(os.path.lexists(p / _name_here(p, name)) for name in names)), there[0])


def _name_here(folder: Path, name: str) -> str:
    """The name of a file in the folder; of a path that leads out of it to nothing, as it was on another machine, the longest end that is
    a file here: Label Studio writes `..\\..\\label-studio\\media\\upload\\4\\a.png` for images/a.png (D-126)."""
    found = name_on_disk(folder, name)
    if not AWAY.match(name) or os.path.lexists(folder / found):
        return found
    parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".", "..")]
    ends = (name_on_disk(folder, "/".join(parts[start:])) for start in range(len(parts)))
    return next((end for end in ends if os.path.lexists(folder / end)), found)


def _usable_categories(data: CocoData, path: Path, report: Report) -> Iterator[CocoCategory]:
    """The classes. Roboflow writes a category 0 that all others name as theirs, and that no box has: it is none (D-104)."""
    groups = [c.supercategory for c in data.categories]
    used = bool((data.annotations.category_ids.values == 0).any())
    ids, names = set[int](), set[str]()
    for category in sorted(data.categories, key=lambda c: c.id):
        if category.id == 0 and category.supercategory in ("none", "", None) and category.name in groups and not used:
            continue
        if not category.name.strip():
            report(fault("category without name", path, f"category {category.id}", "its name is empty"))
        elif category.id in ids:
            report(fault("category id used twice", path, f"category {category.id}", f"{category.name!r} has the id of another category"))
        elif category.name in names:
            message = f"another category is called {category.name!r} too: results would not tell them apart"
            report(fault("category name used twice", path, f"category {category.id}", message))
        else:
            yield category
        ids.add(category.id)
        names.add(category.name)


@dataclass(frozen=True)
class UsableImages:
    """I images of a file."""

    ids: Ids  # [I]
    files: Names
    sizes: NDArray[np.int32]  # [I, 2] (h, w)
    federated: Federated | None


@dataclass
class ImageNames:
    """What the images of a file are called on disk."""

    data: CocoData
    folder: Path
    remarks: Remarks = field(default_factory=Remarks)  # on names that are read otherwise than they are written

    @cached_property
    def taken(self) -> set[str]:
        """The names as they are written, and those that were found in place of others. Needed only where a path leads elsewhere."""
        return {image.file_name for batch in self.data.images.batches(unsaid) for image in batch}

    def on_disk(self, written: str) -> str:
        """Raises ValueError where the end of a path of another machine is another image."""
        name = _name_here(self.folder, written)
        if AWAY.match(written) and not AWAY.match(name):
            if name in self.taken:
                raise ValueError(f"file_name {written!r} is not there, and its end, {name!r}, is another image")
            self.taken.add(name)
            self.remarks.add(
                "paths of another place", "paths that lead elsewhere", "are read by their ends", f"{name} in place of {written}"
            )
        return name


def _usable_images(
    data: CocoData,
    categories: Sequence[CocoCategory],
    path: Path,
    folder: Path,
    source: DataFolder,
    report: Report,
    kind: type[CocoFile],
) -> UsableImages:
    """The images that can be used, some at a time. Sizes are read from the image files where the annotations have none."""
    twice, seen, names = {*_used_twice(data.image_ids)}, set[int | str](), ImageNames(data, folder)
    ids, files, sizes, federated = IdColumn(data.images.most), list[Names](), [np.empty((0, 2), np.int32)], list[Federated | None]()
    for batch in data.images.batches(unsaid):
        pairs = list(_with_sizes(batch, twice, seen, path, names, source, report))
        images = [image for image, _ in pairs]
        ids.extend([image.id for image in images])
        files.append(Names.of(image.file_name for image in images))
        sizes.append(np.array([size for _, size in pairs], np.int32).reshape(-1, 2))
        federated.append(kind.federated(images, categories))
    names.remarks.tell(path, report)
    return UsableImages(id_array(ids.values), Names.cat(files), np.concatenate(sizes), join_federated(federated))


def _with_sizes(
    images: Sequence[CocoImage],
    twice: set[int | str],
    seen: set[int | str],
    path: Path,
    names: ImageNames,
    source: DataFolder,
    report: Report,
) -> Iterator[tuple[CocoImage, tuple[int, int]]]:
    """The images that can be used, as they are called on disk, with their sizes (h, w).

    Args:
        twice: ids that several images have.
        seen: those of them that images before had.
    """
    for image in images:
        if image.id in seen:
            report(fault("image id used twice", path, _entry(image), "ids must be unique"))
            continue
        if image.id in twice:
            seen.add(image.id)
        if not is_file_name(image.file_name):
            report(fault("impossible file name", path, _entry(image), f"file_name {image.file_name!r} cannot be the name of a file"))
            continue
        try:
            image.file_name = names.on_disk(image.file_name)
        except ValueError as error:
            report(fault("path of another place", path, _entry(image), str(error)))
            continue
        try:
            size = annotated_size(image.height, image.width) or source.picture_size(names.folder / image.file_name)
        except ValueError as error:
            report(fault("unknown image size", path, _entry(image), str(error)))
        else:
            yield image, size


def _entry(image: CocoImage) -> str:
    return f"image {printable(image.id)[:80]}"


def _report_references(data: CocoData, good: NDArray[np.bool_], path: Path, report: Report) -> None:
    """Report the annotations, among those that are not `good`, that refer to an image or category which the file does not list at all."""
    if good.all():
        return
    images = set(data.image_ids.tolist())
    categories = {category.id for category in data.categories}
    for row, annotation in enumerate(data.each_annotation()):
        if good[row]:
            continue
        entry = f"annotation {f'number {row}' if annotation.id is None else printable(annotation.id)[:80]}"
        if annotation.image_id not in images:
            report(fault("unknown image", path, entry, f"its image_id {repr(annotation.image_id)[:80]} is no image that the file lists"))
        if annotation.category_id not in categories:
            report(fault("unknown class", path, entry, f"its category_id {annotation.category_id} is no category that the file lists"))


def _report_ids(ids: Ids, path: Path, report: Report) -> None:
    """Report the ids that several annotations have, which do no harm: they only name them."""
    for value in _used_twice(ids):
        report(Finding("annotation id used twice", printable(path), f"annotation {printable(value)[:80]}", "ids must be unique"))


def _used_twice(ids: Ids) -> list[int | str]:
    """Values that are there more than once, in the order in which they come first."""
    if ids.dtype == object:
        return [value for value, times in Counter(ids.tolist()).items() if times > 1]
    in_order = np.sort(ids)
    again = in_order[1:][in_order[1:] == in_order[:-1]]
    return list(dict.fromkeys(ids[np.isin(ids, again)].tolist())) if len(again) else []
