"""Sizes of many image files, for annotations that do not have them: read from the heads of the files, and kept for the next time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from steadydetr.data.folder import DataFolder
from steadydetr.data.kept import keep, kept_place, read_kept
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

THREADS = 8
KEPT_FROM = 10_000  # images; fewer are read again each time


def picture_sizes(source: DataFolder, folder: Path, files: Sequence[str], wrong: Callable[[int, str], None]) -> NDArray[np.int32]:
    """Height and width [I, 2] of image files as they are turned; 0 where one cannot be read.

    Args:
        files: relative to `folder`, of which each may lie anywhere inside the data folder.
        wrong: is told the position of a file that cannot be read, and the reason.
    """
    stamps = np.array([_stamp(folder / file) for file in files], np.int64).reshape(-1, 2)
    sizes, kept = _kept(folder, files, stamps)

    def size(position: int) -> tuple[int, int] | str:
        try:
            return source.picture_size(folder / files[position])
        except ValueError as error:
            return str(error)

    missing = np.flatnonzero(sizes[:, 0] == 0).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        for position, found in zip(missing, pool.map(size, missing), strict=True):
            if isinstance(found, str):
                wrong(position, found)
            else:
                sizes[position] = found
    if kept is not None and missing:
        keep(kept, stamps=stamps, sizes=sizes)
    return sizes


def _stamp(path: Path) -> tuple[int, int]:
    """Bytes and time of the last change, by which a file is known not to have changed."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _kept(folder: Path, files: Sequence[str], stamps: NDArray[np.int64]) -> tuple[NDArray[np.int32], Path | None]:
    """The sizes that were kept of the same files, 0 where there are none, and where to keep them; None for a few files."""
    sizes = np.zeros((len(files), 2), np.int32)
    if len(files) < KEPT_FROM:
        return sizes, None
    names = "\0".join((os.path.realpath(folder), *files))  # of a folder each split has a file of its own
    path = kept_place("picture-sizes", names)
    if found := read_kept(path, "stamps", "sizes"):
        unchanged = (found[0] == stamps).all(1)
        sizes[unchanged] = found[1][unchanged]
    return sizes, path
