"""A layout of data: images in a folder, and boxes_SPLIT.csv with a line for every box: file, class, x0, y0, x1, y1 in pixels."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steadydetr import register
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.layouts import DataLayout, Finding, NoSplit


@register("boxes-csv")
@dataclass(frozen=True)
class BoxesCsv(DataLayout):
    """Classes are the words of all files, in the order of the alphabet."""

    looked_for = "boxes.csv: boxes_SPLIT.csv beside the images: file, class, x0, y0, x1, y1"

    def recognises(self, where: str) -> bool:
        return any(Path(where).glob("boxes_*.csv"))

    def open(self, where: str, split: str) -> FolderDataset:
        root = Path(where)
        path = root / f"boxes_{split}.csv"
        if not path.exists():
            raise NoSplit(f"{root} has no split {split!r}: {path.name} is not there")
        classes = tuple(sorted({row[1] for other in root.glob("boxes_*.csv") for row in read(other)}))
        rows = sorted(read(path))
        files = sorted({row[0] for row in rows})
        index = AnnotationIndex.build(
            image_ids=range(1, len(files) + 1),
            files=files,
            sizes=[self.folder(where).picture_size(root / file) for file in files],
            counts=[sum(row[0] == file for row in rows) for file in files],
            boxes_xyxy=[[float(side) for side in row[2:6]] for row in rows],
            labels=[classes.index(row[1]) for row in rows],
            classes=classes,
            category_ids=tuple(range(1, len(classes) + 1)),
        )
        return FolderDataset(index, root, f"{root.name}-{split}", self.folder(where))

    def check(self, where: str, split: str) -> Iterator[Finding]:
        path = Path(where) / f"boxes_{split}.csv"
        for number, row in enumerate(read(path) if path.exists() else [], 1):
            if len(row) != 6:
                yield Finding("short line", str(path), f"line {number}", f"{len(row)} values instead of 6", fatal=True)


def read(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))
