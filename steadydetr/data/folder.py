"""The folder of a data set: what is read of it lies in it, where links and names are not allowed to lead elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from steadydetr.data.images import picture_size
from steadydetr.data.reading import check_file, open_json, read_file
from steadydetr.files import printable
from steadydetr.limits import Limits

ALLOW = "--data.outside allow (of all commands but train, distill and compare: --outside allow)"


@dataclass(frozen=True)
class DataFolder:
    """The folder of a data set as the user named it, and what may be read of it."""

    root: Path
    limits: Limits = Limits()

    def read_list(self, path: Path) -> bytes:
        """The content of a file about all images of a split."""
        self.check_inside(path)
        return read_file(path, self.limits.max_annotation_mb, "max_annotation_mb")

    def open_list(self, path: Path) -> BinaryIO:
        """Such a file of JSON, opened as `open_json` does."""
        self.check_list(path)
        return open_json(path)

    def check_list(self, path: Path) -> None:
        """Raise what `read_list` raises, without reading the file: for one that is read a part at a time."""
        self.check_inside(path)
        check_file(path, self.limits.max_annotation_mb, "max_annotation_mb")

    def read_entry(self, path: Path) -> bytes:
        """The content of an annotation file about one image."""
        self.check_inside(path)
        return read_file(path, self.limits.max_file_mb, "max_file_mb")

    def picture_size(self, path: Path) -> tuple[int, int]:
        """Height and width of the picture, turned as its EXIF orientation says."""
        self.check_inside(path)
        return picture_size(path, self.limits)

    def check_inside(self, path: Path) -> None:
        """Raise ValueError for a path out of the folder, which must be allowed."""
        if self.limits.outside == "refuse" and (how := self.way_out(path)):
            raise ValueError(f"{how}: it is read only with {ALLOW}")

    def way_out(self, path: Path) -> str:
        """How a path leads out of the folder, by a link or by its name; empty if it does not. The folder itself may be a link."""
        root = os.path.realpath(self.root)
        if _is_within(os.path.realpath(path), root):
            return ""
        for place in (*reversed(path.parents), path):
            if os.path.islink(place) and _is_within(os.path.realpath(place.parent), root):
                target = os.path.realpath(place)
                if not _is_within(target, root):
                    return f"{printable(place)} is a link to {printable(target)}, outside the data folder {printable(self.root)}"
        return f"{printable(path)} lies outside the data folder {printable(self.root)}"


def _is_within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
