"""Arrays that take long to find out, kept in the user's cache for the next time."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from steadydetr.fetching import cache_folder
from steadydetr.files import replacing
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def kept_place(folder: str, key: str) -> Path:
    """The file for what is known by this key, in a folder of the cache."""
    return cache_folder() / folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.npz"


def read_kept(path: Path, *names: str) -> list[NDArray[Any]] | None:
    """The arrays of these names; None where there are none, or the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            return [saved[name] for name in names]
    except (OSError, ValueError, KeyError, BadZipFile, EOFError):
        return None


def keep(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays for `read_kept`; a full or read-only disk is no reason to stop."""
    with suppress(OSError), replacing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
