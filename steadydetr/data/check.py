"""What is wrong with a data set, before training finds out. Names file and entry of every finding."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from steadydetr.data.config import DataConfig
from steadydetr.data.dataset import NONE_IS_THERE, Dataset, FolderDataset, join_data, parts_of
from steadydetr.data.folder import ALLOW
from steadydetr.data.hold_out import DEFAULT_HOLD_OUT, HoldOut
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts import ALL, ENCODING, DataLayout, Finding, NoSplit, Report, fault, joined_places, layout_of
from steadydetr.data.masks import WITHOUT
from steadydetr.data.opening import open_train_and_val
from steadydetr.data.overlap import shared_images
from steadydetr.data.trainable import (
    ALLOW_SAME,
    CORNERS,
    MASKS_BESIDE,
    NORMALISED,
    alike_classes,
    how_classes_differ,
    how_images_are_shared,
    how_versions_are_shared,
    look_like_corners,
    look_normalised,
    masks_beside_their_boxes,
    why_no_object,
)
from steadydetr.files import listed, printable
from steadydetr.lazy import np
from steadydetr.limits import DEFAULT_LIMITS, Limits

DEEP, TURNED, MISSING = "image of more than 8 bits", "turned image", "missing image"  # kinds of findings that all images may share
SMALL, MEDIUM = 32**2, 96**2  # COCO's limits between small, medium and large objects: areas in pixels


@dataclass(frozen=True)
class SplitReport:
    name: str
    images: int
    empty_images: int
    most_in_image: int
    class_counts: dict[str, int]
    small: int
    medium: int
    large: int
    crowd: int
    difficult: int


@dataclass(frozen=True)
class CheckReport:
    splits: tuple[SplitReport, ...]
    findings: tuple[Finding, ...]
    held_out: tuple[str, ...] = ()  # how data without a split to validate on were divided, in sentences

    @property
    def fatal(self) -> bool:
        return any(finding.fatal for finding in self.findings)

    @property
    def failed(self) -> bool:
        """Whether something must be mended: training here would stop at it, or other tools do."""
        return self.fatal or any(finding.kind == ENCODING for finding in self.findings)


def check_data(
    where: str | Path,
    splits: tuple[str, ...] = ("train", "val", "test"),
    workers: int = 4,
    limits: Limits = DEFAULT_LIMITS,
    hold_out: HoldOut = DEFAULT_HOLD_OUT,
    masks: bool = False,
) -> CheckReport:
    """Inspect every split that is there: annotations, every image file, and what the splits have in common.

    Args:
        hold_out: how data are divided that bring no split to validate on, as `train` divides them.
        masks: look at the masks of objects too.

    Raises ValueError where no layout or no split of `where` can be recognised.
    """
    findings, held_out = list[Finding](), list[str]()
    places = [(layout_of(place, limits, masks), place) for place in joined_places(where)]
    datasets, absent = _open_splits(where, places, splits, findings.append)
    asked = [split for split in ("train", "val") if split in splits]
    if absent.keys() & set(asked) and "val" not in datasets and all(split in datasets or split in absent for split in asked):
        config = DataConfig(source=str(where), **asdict(limits), **asdict(hold_out), masks=masks)
        datasets |= _divide(config, asked, findings.append, held_out.append)
        if not datasets:  # so that what is wrong with all images is found
            datasets |= _open_splits(where, places, (ALL,), findings.append)[0]
    if not datasets and not findings and absent:
        raise next(iter(absent.values()))
    if "train" in absent and not {"train", ALL} & datasets.keys():  # a set to evaluate on may have none
        findings.append(Finding("missing split", printable(where), "train", printable(f"there is none to train on: {absent['train']}")))
    if not any(finding.fatal for finding in findings):  # otherwise their entries may be the objects
        findings += [finding for split, dataset in datasets.items() for finding in _check_objects(split, dataset)]
    for dataset in datasets.values():
        for part in parts_of(dataset):
            findings += _check_boxes(part.index, part.name)
            findings += _check_masks(part.index, part.name)
            if isinstance(part, FolderDataset):
                findings += _check_images(part, workers)
    findings += _check_classes(where, datasets)
    findings += _check_overlap(where, datasets)
    described = tuple(_describe(split, datasets[split]) for split in (*splits, ALL) if split in datasets)
    return CheckReport(described, tuple(dict.fromkeys(findings)), tuple(held_out))


def _open_splits(
    where: str | Path, places: Sequence[tuple[DataLayout, str]], splits: Sequence[str], report: Report
) -> tuple[dict[str, Dataset], dict[str, NoSplit]]:
    """The splits that are there, without the entries that are reported, and why others are not."""
    datasets, absent, failed = dict[str, Dataset](), dict[str, NoSplit](), dict[str, list[str]]()
    for split in splits:
        try:
            datasets[split] = _inspect(places, split, report)
        except NoSplit as error:
            absent[split] = error
        except (ValueError, OSError) as error:
            failed.setdefault(str(error), []).append(split)
    for message, alike in failed.items():
        report(fault("unreadable split", where, ", ".join(alike), message))
    return datasets, absent


def _divide(config: DataConfig, splits: Sequence[str], report: Report, say: Callable[[str], None]) -> dict[str, Dataset]:
    """Of these splits those to train and to validate on, where data are divided for that, as `say` is told."""
    try:
        both = open_train_and_val(config, report, say)
    except NoSplit:  # which is told of each split
        return {}
    except (ValueError, OSError) as error:
        report(fault("missing split", config.source, "val", str(error)))
        return {}
    return {split: getattr(both, split) for split in splits}


def _inspect(places: Sequence[tuple[DataLayout, str]], split: str, report: Report) -> Dataset:
    """The split of joined places, without the entries that are reported. NoSplit where one that can be made of others is missing in any of
    them, or another in all."""
    parts: list[Dataset] = []
    absent: list[NoSplit] = []
    for layout, place in places:
        try:
            parts.append(layout.inspect(place, split, report))
        except NoSplit as error:
            absent.append(error)
    if absent:
        raise ValueError(str(absent[0])) if parts and split not in ("train", "val") else absent[0]
    return parts[0] if len(parts) == 1 else join_data(parts)


def _check_objects(split: str, dataset: Dataset) -> Iterator[Finding]:
    """Findings for a split in which there is nothing to learn or to find."""
    index, name = dataset.index, printable(dataset.name)
    if split == "train" and (reason := why_no_object(index)):
        yield fault("no object to train on", name, "", reason)
    elif not (~index.crowd).any():
        yield Finding("no object", name, "", "AP is undefined (-1)")
    if look_normalised(index):
        found = fault("boxes that look normalised", name, f"{len(index.labels)} annotations", NORMALISED)
        yield replace(found, fatal=split == "train")
    if (beside := masks_beside_their_boxes(index)).any() and beside.sum() == index.usable().sum():
        found = fault("masks beside their boxes", name, f"{beside.sum()} annotations", f"all of them: {MASKS_BESIDE}")
        yield replace(found, fatal=split == "train")
    if look_like_corners(index):
        yield Finding("boxes that look like corners", name, f"{len(index.labels)} annotations", CORNERS)
    if split == "train" and (unseen := np.setdiff1d(np.arange(len(index.classes)), index.labels)).size:
        names = printable(listed((index.classes[label] for label in unseen.tolist()), 10))
        yield Finding("classes without objects", name, "", f"no image to train on shows {names}")
    for first, second in alike_classes(index.classes):
        yield Finding(
            "classes that look alike",
            name,
            printable(f"{first!r} and {second!r}"),
            "they are two classes: where they mean one, give it one name",
        )


def _check_boxes(index: AnnotationIndex, name: str) -> Iterator[Finding]:
    """Findings for boxes that training drops or clips."""
    boxes, image = index.boxes_xyxy, index.image_of_row
    height, width = index.sizes[image].T
    with np.errstate(invalid="ignore"):
        size = boxes[:, 2:] - boxes[:, :2]
    finite = np.isfinite(boxes).all(1)
    flat = ~(size > 0).all(1)
    gone = ~flat & ((boxes[:, 0] >= width) | (boxes[:, 1] >= height) | (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0))
    tiny = (size < 1).any(1)
    beyond = (boxes[:, 0] < -1) | (boxes[:, 1] < -1) | (boxes[:, 2] > width + 1) | (boxes[:, 3] > height + 1)
    rules = (
        ("box of endless size", ~finite, "dropped in training"),
        ("box without area", finite & flat, "dropped in training"),
        ("box outside the image", finite & gone, "dropped in training"),
        ("box smaller than a pixel", finite & ~flat & ~gone & tiny, "dropped in training, unless that enlarges it to a pixel"),
        ("box reaches out of the image", finite & ~flat & ~gone & beyond, "clipped in training"),
    )
    for kind, rows, message in rules:
        for row in np.flatnonzero(rows).tolist():
            corners = ", ".join(f"{value:g}" for value in boxes[row].tolist())
            entry = (
                f"annotation {printable(index.annotation_ids[row])[:80]} ({printable(index.classes[index.labels[row]])}), xyxy ({corners})"
            )
            yield Finding(kind, printable(f"{name}: {index.file(int(image[row]))}"), entry, message)


def _check_masks(index: AnnotationIndex, name: str) -> Iterator[Finding]:
    """Findings for annotations without a mask, or with one that is not where their box is, where masks were asked for."""
    image = index.image_of_row
    for row in np.flatnonzero(masks_beside_their_boxes(index)).tolist():
        file, entry = printable(f"{name}: {index.file(int(image[row]))}"), f"annotation {printable(index.annotation_ids[row])[:80]}"
        yield Finding("mask beside its box", file, entry, "more than half of the mask lies outside the box, or outside the image")
    for row in np.flatnonzero(index.without_mask).tolist():
        why = WITHOUT[int(index.masks.state[row])] if index.masks else ""
        size = " x ".join(map(str, index.sizes[image[row]].tolist()))
        file, entry = printable(f"{name}: {index.file(int(image[row]))}"), f"annotation {printable(index.annotation_ids[row])[:80]}"
        yield Finding("annotation without a mask", file, entry, f"{why} (h x w: {size}); it is not trained on")


def _check_images(dataset: FolderDataset, workers: int) -> list[Finding]:
    """Decode every image file, because a truncated one can be opened and fails only when it is decoded, in the middle of an epoch."""
    names = [dataset.index.file(position) for position in range(len(dataset.index))]
    folder = dataset.data_folder
    pool = ThreadPoolExecutor(workers)
    try:
        ways_out = list(pool.map(dataset.way_out, range(len(names))))
        readable = [position for position, way in enumerate(ways_out) if not way or folder.limits.outside == "allow"]
        found = [finding for findings in pool.map(lambda position: _check_image(dataset, position), readable) for finding in findings]
        if len(found) == len(names) > 1 and all(finding.kind == MISSING for finding in found):
            message = f"none of the {len(names)} images is there: {NONE_IS_THERE}"
            found = [fault(MISSING, dataset.folder, f"the first is {names[0]}", message)]
        return [*_report_outside(dataset, names, ways_out), *_together(found, dataset.folder)]
    finally:
        pool.shutdown(cancel_futures=True)  # after an exception or Ctrl-C, the images that are left are not waited for


def _report_outside(dataset: FolderDataset, names: list[str], ways_out: list[str]) -> Iterator[Finding]:
    """A finding for each way out of the data folder: a link of a folder can be that of all images."""
    allowed = dataset.data_folder.limits.outside == "allow"
    for way, count in Counter(way for way in ways_out if way).items():
        first = printable(names[ways_out.index(way)])
        entry = first if count == 1 else f"{count} images, the first is {first}"
        message = f"{way}: {'it is read, as you allow' if allowed else f'it is read only with {ALLOW}'}"
        yield Finding("image outside the data folder", printable(dataset.folder), entry, message, fatal=not allowed)


def _check_image(dataset: FolderDataset, position: int) -> list[Finding]:
    path, remarks = dataset.folder / dataset.index.file(position), list[Finding]()
    entry = f"image {printable(dataset.index.image_ids[position])[:80]}"
    if dataset.missing(position):
        return [fault(MISSING, path, entry, "the file is not there")]
    try:
        decoded = dataset.picture(position)
    except ValueError as error:
        return [fault("unreadable image", path, entry, str(error))]
    if decoded.cut:
        remarks.append(Finding("image cut off", printable(path), entry, f"{decoded.cut}; what is there is read"))
    if decoded.scaled:
        remarks.append(Finding(DEEP, printable(path), entry, decoded.scaled))
    try:
        picture = dataset.as_annotated(decoded, position)
    except ValueError as error:
        return [*remarks, fault("wrong image size", path, entry, str(error))]
    tag = f"EXIF orientation {decoded.orientation}"
    if dataset.boxes_fit_only(position, decoded.stored.size, decoded.image.size) and picture.size == decoded.image.size:
        message = f"{tag}: it is turned, {picture.width} x {picture.height}, but its boxes fit only the picture as it is stored"
        remarks.append(Finding("boxes of the stored picture", printable(path), entry, f"{message}: they would be misplaced"))
    elif picture.size != decoded.image.size:
        message = f"{tag}, but its annotated size and its boxes fit the picture as it is stored, {picture.width} x {picture.height}"
        remarks.append(Finding("image not turned", printable(path), entry, f"{message}: it is read so"))
    elif decoded.stored.size == decoded.image.size and decoded.orientation != 1:
        message = f"{tag}: it is turned, and its boxes must have been drawn on the turned picture, which its size cannot tell"
        remarks.append(Finding(TURNED, printable(path), entry, message))
    return remarks


def _together(findings: Sequence[Finding], folder: Path) -> Iterator[Finding]:
    """The findings, of which those that whole data sets share are one for each kind."""
    alike = {kind: [finding for finding in findings if finding.kind == kind] for kind in (DEEP, TURNED)}
    yield from (finding for finding in findings if finding.kind not in alike)
    for kind, found in alike.items():
        if len(found) > 1:
            first = found[0]
            yield Finding(kind, printable(folder), f"{len(found)} images, the first is {first.file}", first.message)
        else:
            yield from found


def _check_classes(where: str | Path, datasets: dict[str, Dataset]) -> Iterator[Finding]:
    """Findings for splits whose classes are not those of the first split, in the same order. Training takes no others than its two."""
    first, *others = datasets or [""]
    for split in others:
        if differ := how_classes_differ(*(datasets[name].index.classes for name in (first, split))):
            found = fault("different classes", where, f"{first} and {split}", differ)
            yield found if {first, split} == {"train", "val"} else replace(found, kind="other classes", fatal=False)


def _check_overlap(where: str | Path, datasets: dict[str, Dataset]) -> Iterator[Finding]:
    """Findings for images that a split lists twice, or two splits, whose metric would then count images that were trained on."""
    for number, (split, dataset) in enumerate(datasets.items()):
        for part in parts_of(dataset):
            files = Counter(os.path.normpath(part.index.file(position)) for position in range(len(part.index)))
            for file in (file for file, times in files.items() if times > 1):
                yield Finding("image listed twice", printable(file), part.name, "it counts as often as it is listed")
        for earlier in list(datasets)[:number]:
            for position in shared_images(dataset, datasets[earlier]):
                file = printable(os.path.normpath(dataset.index.file(position)))
                yield Finding("image in both splits", file, f"{earlier} and {split}", "the metric would count training images")
    if {"train", "val"} <= datasets.keys():
        shared = how_images_are_shared(datasets["train"], datasets["val"])
        if shared.all:
            yield fault("same images", where, "train and val", f"{shared.sentence}. {ALLOW_SAME}")
        if versions := how_versions_are_shared(datasets["train"], datasets["val"]):
            yield Finding("versions of an image in both splits", printable(where), "train and val", versions)


def _describe(split: str, dataset: Dataset) -> SplitReport:
    index = dataset.index
    counts = np.bincount(index.labels, minlength=len(index.classes)).tolist()
    with np.errstate(invalid="ignore", over="ignore"):
        sizes = (index.boxes_xyxy[:, 2:] - index.boxes_xyxy[:, :2]).prod(1)
    small, medium = int((sizes < SMALL).sum()), int(((sizes >= SMALL) & (sizes < MEDIUM)).sum())
    return SplitReport(
        name=split,
        images=len(index),
        empty_images=int((index.counts == 0).sum()),
        most_in_image=int(index.counts.max(initial=0)),
        class_counts=dict(zip(index.classes, counts, strict=True)),
        small=small,
        medium=medium,
        large=len(sizes) - small - medium,
        crowd=int(index.crowd.sum()),
        difficult=int(index.difficult.sum()),
    )
