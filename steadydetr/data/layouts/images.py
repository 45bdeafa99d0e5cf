"""The image files of a layout that lists none: found in their folders, by their names without ending; and what is known of each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steadydetr.data.folder import DataFolder
from steadydetr.data.images import picture_size
from steadydetr.data.layouts.base import STANDARD, Report, fault, standard_split

ENDINGS = tuple(
    e for ending in (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jfif") for e in (ending, ending.upper())
)
HEAD = 4096  # bytes of a file by which its kind is told


def is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


@dataclass(frozen=True)
class ImageFiles:
    """The files below `root`, of which each folder is listed once."""

    root: Path
    listings: dict[str, dict[str, bool]] = field(default_factory=dict)  # by folder: the names in it, and which are links
    stems: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # by folder: names by the same without ending

    def find(self, stem: str, written: str = "") -> str:
        """The image file of an annotation file: of its name, with the ending in `written` or else any that is there, or else .jpg."""
        folder, name = os.path.split(stem)
        if folder not in self.stems:
            self.stems[folder] = {}
            for file in self._names(folder):
                self.stems[folder].setdefault(os.path.splitext(file)[0], []).append(file)
        files = self.stems[folder].get(name, [])
        as_written = f"{name}{os.path.splitext(written.strip())[1]}"
        found = as_written if as_written in files else next((f"{name}{ending}" for ending in ENDINGS if f"{name}{ending}" in files), None)
        return f"{folder}/{found or f'{name}.jpg'}".lstrip("/")

    def is_there(self, file: str) -> bool:
        folder, name = os.path.split(file)
        return name in self._names(folder)

    def is_link(self, file: str) -> bool:
        folder, name = os.path.split(file)
        return self._names(folder).get(name, False)

    def _names(self, folder: str) -> dict[str, bool]:
        if folder not in self.listings:
            try:
                with os.scandir(self.root / folder) as entries:
                    self.listings[folder] = {entry.name: entry.is_symlink() for entry in entries}
            except (OSError, ValueError):  # there is no such folder: the images are missing
                self.listings[folder] = {}
        return self.listings[folder]


def files_below(folder: Path, ending: str = "") -> list[str]:
    """The images below a folder, or the files with that ending, relative to it, in order. Links to folders are not followed.

    Hidden folders, and the files `._NAME` in which macOS keeps what other systems cannot, are left out.
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = os.path.relpath(parent, folder)
        names = (file for file in files if not file.startswith("._") and (file.endswith(ending) if ending else is_image(file)))
        found += [os.path.normpath(os.path.join(place, file)).replace(os.sep, "/") for file in names]
    return sorted(found)


def named(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """The names of the files with one of these endings, in small letters or capitals, in a folder that may not exist."""
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if _is_named(entry.name, endings) and entry.is_file())


def _is_named(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings) and not name.startswith("._")


def split_folders(folder: Path) -> list[str]:
    """The folders in a folder that are called train, val or test, or what exports call these."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if standard_split(entry.name) in STANDARD and entry.is_dir())


def picture_sizes(files: list[str], images: ImageFiles, source: DataFolder, report: Report) -> list[tuple[int, int] | None]:
    """Height and width of every image, from its head; None where it cannot be read, which is reported."""
    for folder in {os.path.dirname(file) for file in files}:
        source.check_inside(images.root / folder)

    sizes = list[tuple[int, int] | None]()
    for file in files:
        path = images.root / file
        try:  # of files in these folders only a link can lead elsewhere
            sizes.append(source.picture_size(path) if images.is_link(file) else picture_size(path, source.limits))
        except ValueError as error:
            report(fault("unknown image size", path, "", str(error)))
            sizes.append(None)
    return sizes


def image_ids(stems: Iterable[str]) -> NDArray[np.int64]:
    """A number for every image: the digits of its name where those are unique, else 1, 2, ..."""
    digits = ["".join(c for c in stem if c in "0123456789") for stem in stems]
    if all(0 < len(d) < 18 for d in digits) and len({int(d) for d in digits}) == len(digits):
        return np.array([int(d) for d in digits], dtype=np.int64)
    return np.arange(1, len(digits) + 1)
