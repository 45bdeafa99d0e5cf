"""Images that two splits have in common."""

from __future__ import annotations

import filecmp
import os
from functools import cache

from steadydetr.data.dataset import Dataset, FolderDataset, place_of
from steadydetr.data.hold_out import version_of
from steadydetr.data.picture_inputs import Encoded
from steadydetr.data.shapes import ShapesDataset


def shared_images(first: Dataset, second: Dataset) -> list[int]:
    """The positions of the images in the first data set that are in the second too: the same file, or one of the same name and content.

    Names alone may be numbers. Files are opened only where names and sizes of the images are the same.
    """
    names = [os.path.normpath(first.index.file(position)) for position in range(len(first.index))]
    whole, last = set(names), {os.path.basename(name) for name in names}
    places, by_name = set[str](), dict[str, int]()
    for position in range(len(second.index)):
        name = os.path.normpath(second.index.file(position))
        if os.path.basename(name) in last:
            places.add(_place(second, position))
            if name in whole:
                by_name[name] = position
    found = []
    for position, name in enumerate(names if places else ()):
        other = by_name.get(name)
        if _place(first, position) in places or (other is not None and _is_same_content(first, position, second, other)):
            found.append(position)
    return found


def shared_versions(first: Dataset, second: Dataset) -> list[int]:
    """The positions of the images in the first data set of which the second has another version by Roboflow, as their names tell."""
    there = {version_of(second.index.file(position)) for position in range(len(second.index))} - {""}
    return [position for position in range(len(first.index)) if there and version_of(first.index.file(position)) in there]


def _place(dataset: Dataset, position: int) -> str:
    """Where an image lies."""
    part, inner = place_of(dataset, position)
    file = part.index.file(inner)
    if isinstance(part, FolderDataset) and part.in_files:
        return os.path.normpath(os.path.join(_real(str(part.folder)), file))
    options = part.config if isinstance(part, ShapesDataset) else ""
    return f"{part.name} {options}: {file}"


_real = cache(os.path.realpath)


def _is_same_content(first: Dataset, position: int, second: Dataset, other: int) -> bool:
    (here, i), (there, j) = place_of(first, position), place_of(second, other)
    if not (isinstance(here, FolderDataset) and isinstance(there, FolderDataset)):
        return False
    if here.index.sizes[i].tolist() != there.index.sizes[j].tolist():
        return False
    try:
        a, b = here.image_file(i), there.image_file(j)
        if isinstance(a, Encoded) or isinstance(b, Encoded):
            return isinstance(a, Encoded) and isinstance(b, Encoded) and a.getvalue() == b.getvalue()
        return filecmp.cmp(a, b, shallow=False)
    except (ValueError, OSError):  # what is wrong with them is said elsewhere
        return False
