"""COCO annotations in other places than COCO's own: a JSON file beside or above its images, as most tools export it."""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.layouts.base import ALL, STANDARD, InspectedLayout, Report
from steadydetr.data.layouts.coco import ANNOTATIONS, INSTANCES, Coco, coco_kind, read_coco
from steadydetr.data.layouts.common import choose_split, head_of, named, split_folders, splits_of, standard_split
from steadydetr.data.layouts.lvis import Lvis
from steadydetr.data.reading import expanded
from steadydetr.files import printable
from steadydetr.kinds import register

IMAGE_FOLDERS = ("images", "data", "JPEGImages", "Images")
HEAD = 2**20  # bytes of a file by which its kind is told
MOST_FILES = 20  # JSON files of a folder that may be COCO's: of all images, or of a split each


@register("coco-json-layout")
@dataclass(frozen=True)
class CocoJson(InspectedLayout):
    """COCO files of any name beside or above their images: one for all, one for each split by its name, or one in each split's folder."""

    gives_masks = True
    looked_for = "COCO elsewhere: a *.json of COCO beside or above its images, whose name may tell the split, or the file itself"

    def recognises(self, where: str) -> bool:
        return not any(kind().recognises(where) for kind in (Coco, Lvis)) and bool(coco_files(expanded(where)))

    def splits(self, where: str) -> tuple[str, ...]:
        return splits_of(coco_files(expanded(where)))

    def inspect(self, where: str, split: str, report: Report) -> FolderDataset:
        root = expanded(where)
        files = coco_files(root)
        name = choose_split(root, files, split)
        if len(files[name]) > 1:
            both = " and ".join(printable(path.relative_to(root)) for path in files[name])
            raise ValueError(f"{printable(root)} has {both} for split {split!r}: remove one of them, or give one as --data")
        (path,) = files[name]
        if root.is_file():
            root = path.parent.parent if path.parent.name == ANNOTATIONS else path.parent
        source = DataFolder(root, self.limits)
        return read_coco(path, list(_image_folders(root, path, name)), f"{root.name}-{name}", source, report, coco_kind(self.masks))


def coco_files(place: Path) -> dict[str, list[Path]]:
    """The COCO files of a place by split, which their names tell, or the folders that they lie in. A place may be the file itself."""
    if place.is_file():
        return {ALL: [place]} if place.suffix.lower() == ".json" and _is_coco(place) else {}
    found: dict[str, list[Path]] = {}
    for folder in (place, place / ANNOTATIONS):
        for path in _coco_in(folder):
            words = {standard_split(word) for word in re.split(r"[^a-z]+", path.stem.lower())} & set(STANDARD)
            found.setdefault(words.pop() if len(words) == 1 else path.stem, []).append(path)
        if found:
            return found
    in_folders = {name: _coco_in(place / name) for name in split_folders(place)}
    return {name: paths for name, paths in in_folders.items() if paths}


def _coco_in(folder: Path) -> list[Path]:
    """The COCO files in a folder. Where it has many JSON files, these are of an image each, and not looked at."""
    names = sorted(itertools.islice(named(folder, (".json",)), MOST_FILES + 1))
    return [folder / name for name in names if _is_coco(folder / name)] if len(names) <= MOST_FILES else []


def _is_coco(path: Path) -> bool:
    """Whether a JSON file begins as COCO's do, with one of their five lists, and lists images, which a long one may do later on."""
    head = head_of(path, HEAD)
    begins = re.match(rb'\s*\{\s*"(info|licenses|images|annotations|categories)"', head.removeprefix(codecs.BOM_UTF8)) is not None
    return begins and (len(head) == HEAD or b'"images"' in head)


def _image_folders(root: Path, path: Path, split: str) -> Iterator[Path]:
    """Where the images of a COCO file may lie."""
    names = dict.fromkeys((split, path.stem, path.stem.removeprefix(INSTANCES)))
    for folder in dict.fromkeys((path.parent, root)):
        yield folder
        for images in IMAGE_FOLDERS:
            yield from (folder / images, *(folder / images / name for name in names))
        for name in names:
            yield from (folder / name, folder / name / "images")
