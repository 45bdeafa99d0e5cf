"""Sizes of many image files, for annotations that do not have them: read from the heads of the files, and kept for the next time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

from steadydetr.data.folder import DataFolder
from steadydetr.fetching import cache_folder
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
        _keep(kept, stamps, sizes)
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
    path = cache_folder() / "picture-sizes" / f"{hashlib.sha256(os.fsencode(names)).hexdigest()[:32]}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            unchanged = (saved["stamps"] == stamps).all(1)
            sizes[unchanged] = saved["sizes"][unchanged]
    except (OSError, ValueError, KeyError, BadZipFile, EOFError):  # there is none, or it is damaged: the files are read
        pass
    return sizes, path


def _keep(path: Path, stamps: NDArray[np.int64], sizes: NDArray[np.int32]) -> None:
    """Write the sizes; a full or read-only disk is no reason to stop."""
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(unfinished, stamps=stamps, sizes=sizes)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
