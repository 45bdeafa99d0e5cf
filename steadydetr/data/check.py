"""`steadydetr check`: what is wrong with a data set, before training finds out. Names file and entry of every finding."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console, Group, RenderableType
from rich.table import Table

from steadydetr.data.dataset import Dataset, FolderDataset, parts_of
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts import Finding
from steadydetr.data.opening import joined_places, layout_of, open_data

SMALL, MEDIUM = 32**2, 96**2  # COCO's limits between small, medium and large objects: areas in pixels


@dataclass(frozen=True)
class SplitReport:
    name: str
    images: int
    empty_images: int
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

    @property
    def fatal(self) -> bool:
        return any(finding.fatal for finding in self.findings)


def check_data(where: str | Path, splits: tuple[str, ...] = ("train", "val", "test"), workers: int = 4) -> CheckReport:
    """Inspect every split that is there: annotations, every image file, and images that stand in two splits.

    Raises ValueError where no split of `where` can be recognised.
    """
    findings: list[Finding] = []
    datasets: dict[str, Dataset] = {}
    problems: list[ValueError] = []
    for split in splits:
        raw = [finding for place in joined_places(where) for finding in layout_of(place).check(place, split)]
        findings += raw
        try:
            datasets[split] = open_data(where, split)
        except ValueError as error:
            problems.append(error)
            if raw:
                findings.append(Finding("unreadable split", str(where), split, str(error), fatal=True))
    if not datasets and not findings:
        raise problems[0]
    for dataset in datasets.values():
        for part in parts_of(dataset):
            findings += _check_boxes(part.index, part.name)
            if isinstance(part, FolderDataset):
                findings += _check_images(part, workers)
    findings += _check_overlap(datasets)
    return CheckReport(tuple(_describe(split, d) for split, d in datasets.items()), tuple(findings))


def _check_boxes(index: AnnotationIndex, name: str) -> Iterator[Finding]:
    boxes, image = index.boxes_xyxy, index.image_of_row
    height, width = index.sizes[image].T
    size = boxes[:, 2:] - boxes[:, :2]
    flat = ~(size > 0).all(1)
    gone = ~flat & ((boxes[:, 0] >= width) | (boxes[:, 1] >= height) | (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0))
    beyond = (boxes[:, 0] < -1) | (boxes[:, 1] < -1) | (boxes[:, 2] > width + 1) | (boxes[:, 3] > height + 1)
    rules = (
        ("box without area", flat, "dropped in training"),
        ("box outside the image", gone, "dropped in training"),
        ("box reaches out of the image", ~flat & ~gone & beyond, "clipped in training"),
    )
    for kind, rows, message in rules:
        for row in np.flatnonzero(rows).tolist():
            corners = ", ".join(f"{value:g}" for value in boxes[row].tolist())
            entry = f"annotation {index.annotation_ids[row]} ({index.classes[index.labels[row]]}), xyxy ({corners})"
            yield Finding(kind, f"{name}: {index.file(int(image[row]))}", entry, message)


def _check_images(dataset: FolderDataset, workers: int) -> list[Finding]:
    """Decode every image file, because a truncated one can be opened and fails only when it is decoded, in the middle of an epoch."""
    pool = ThreadPoolExecutor(workers)
    try:
        found = pool.map(lambda position: _check_image(dataset, position), range(len(dataset.index)))
        return [finding for finding in found if finding is not None]
    finally:
        pool.shutdown(cancel_futures=True)  # after an exception or Ctrl-C, the images that are left are not waited for


def _check_image(dataset: FolderDataset, position: int) -> Finding | None:
    path = dataset.folder / dataset.index.file(position)
    entry = f"image {dataset.index.image_ids[position]}"
    if not path.exists():
        return Finding("missing image", str(path), entry, "the file is not there", fatal=True)
    try:
        with Image.open(path) as image:
            image.load()
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        return Finding("unreadable image", str(path), entry, str(error), fatal=True)
    if (height, width) != tuple(dataset.index.sizes[position]):
        annotated = "{1} x {0}".format(*dataset.index.sizes[position])
        return Finding("wrong image size", str(path), entry, f"{width} x {height} pixels, annotated as {annotated}", fatal=True)
    return None


def _check_overlap(datasets: dict[str, Dataset]) -> Iterator[Finding]:
    """Findings for images of the same name in two splits: the metric would then count images that were trained on."""
    seen: dict[str, str] = {}
    for split, dataset in datasets.items():
        if not all(isinstance(part, FolderDataset) for part in parts_of(dataset)):
            continue
        for position in range(len(dataset.index)):
            file = Path(dataset.index.file(position)).name
            if file in seen:
                yield Finding("image in both splits", file, f"{seen[file]} and {split}", "the metric would count training images")
            else:
                seen[file] = split


def _describe(split: str, dataset: Dataset) -> SplitReport:
    index = dataset.index
    counts = np.bincount(index.labels, minlength=len(index.classes)).tolist()
    sizes = (index.boxes_xyxy[:, 2:] - index.boxes_xyxy[:, :2]).prod(1)
    small, medium = int((sizes < SMALL).sum()), int(((sizes >= SMALL) & (sizes < MEDIUM)).sum())
    return SplitReport(
        name=split,
        images=len(index),
        empty_images=int((index.counts == 0).sum()),
        class_counts=dict(zip(index.classes, counts, strict=True)),
        small=small,
        medium=medium,
        large=len(sizes) - small - medium,
        crowd=int(index.crowd.sum()),
        difficult=int(index.difficult.sum()),
    )


def render(report: CheckReport, limit: int = 20) -> RenderableType:
    """Tables for the console; `limit` findings of each kind are shown, all are in the report."""
    parts: list[RenderableType] = []
    overview = Table("split", "images", "without objects", "small", "medium", "large", "crowd", "difficult", title="Splits")
    for s in report.splits:
        overview.add_row(*map(str, (s.name, s.images, s.empty_images, s.small, s.medium, s.large, s.crowd, s.difficult)))
    parts.append(overview)
    if report.splits:
        classes = Table("class", *(s.name for s in report.splits), title="Objects of each class")
        for name in report.splits[0].class_counts:
            classes.add_row(name, *(str(s.class_counts.get(name, 0)) for s in report.splits))
        parts.append(classes)
    for kind in dict.fromkeys(finding.kind for finding in report.findings):
        parts.append(_render_kind([finding for finding in report.findings if finding.kind == kind], limit))
    parts.append("No findings: ready to train." if not report.findings else f"{len(report.findings)} findings.")
    return Group(*parts)


def _render_kind(rows: list[Finding], limit: int) -> Table:
    table = Table("file", "entry", "what", title=f"{rows[0].kind}: {len(rows)}" + (" (stops training)" if rows[0].fatal else ""))
    for finding in rows[:limit]:
        table.add_row(finding.file, finding.entry, finding.message)
    if len(rows) > limit:
        table.add_row(f"... and {len(rows) - limit} more", "", "")
    return table


def print_report(report: CheckReport, console: Console | None = None) -> None:
    (console or Console()).print(render(report))
