"""Where in tar files their members lie, so that any of them is read at once. The index of a file is kept until the file changes."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from steadydetr.data.columns import Names
from steadydetr.data.images import IMAGE_SUFFIXES
from steadydetr.data.kept import keep, kept_place, read_kept
from steadydetr.data.stores import Stamp, Store, named_errors
from steadydetr.files import printable
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

THREADS = 8
KEPT = (*IMAGE_SUFFIXES, ".json")  # endings of the members that are indexed
COMPRESSED = {b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz"), b"(\xb5/\xfd": ("zstd", "unzstd")}


@dataclass(frozen=True)
class TarIndex:
    """M members of a tar file in their order."""

    file: str
    stamp: Stamp
    names: Names  # paths within the tar file
    offsets: NDArray[np.int64]  # [M] of their first byte
    sizes: NDArray[np.int64]  # [M] in bytes


def index_tars(store: Store, files: Sequence[str]) -> list[TarIndex]:
    """The indices of tar files; a ValueError names one that is compressed, cut off, damaged or not there."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda file: _index_of(store, file), files))


def _index_of(store: Store, file: str) -> TarIndex:
    """The index that was kept of the same file, or else one that is made."""
    stamp = store.stamp(file)
    kept = kept_place("tar-index", os.path.abspath(file))
    if (saved := read_kept(kept, "stamp", "names", "name_ends", "offsets", "sizes")) and str(saved[0]) == stamp:
        return TarIndex(file, stamp, Names(saved[1], saved[2]), saved[3], saved[4])
    with named_errors(file), store.open(file) as opened:
        members = list(_members(opened, file))
    names, offsets, sizes = zip(*members, strict=True) if members else ((), (), ())
    index = TarIndex(file, stamp, Names.of(names), np.array(offsets, np.int64), np.array(sizes, np.int64))
    keep(
        kept,
        stamp=np.array(stamp),
        names=index.names.encoded,
        name_ends=index.names.ends,
        offsets=index.offsets,
        sizes=index.sizes,
    )
    return index


def _members(opened: IO[bytes], file: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and bytes of every member that is a file with one of the endings. Raises ValueError where the tar file is not whole."""
    head = opened.read(8)
    for magic, (what, command) in COMPRESSED.items():
        if head.startswith(magic):
            raise ValueError(
                f"{printable(file)} is compressed ({what}), so that no image in it can be read alone: unpack it, {command} FILE"
            )
    opened.seek(0)
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if member.isreg() and not member.issparse() and member.name.lower().endswith(KEPT):
                    yield os.path.normpath(member.name), member.offset_data, member.size
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{printable(file)} is no tar file, or cut off: {error}") from error
    opened.seek(end)
    if opened.read(tarfile.BLOCKSIZE) != b"\0" * tarfile.BLOCKSIZE:
        raise ValueError(f"{printable(file)} has no end after {end} bytes, as tar files have: it is cut off or damaged, copy it again")
