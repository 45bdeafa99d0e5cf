"""Data sets whose images lie in tar files, or at an address."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from steadydetr.data.columns import Names
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.folder import DataFolder
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.picture_inputs import Encoded, is_address
from steadydetr.data.reading import expanded, parts_in_common
from steadydetr.data.stores import Store, names_tar_files, store_of
from steadydetr.data.tar_index import TarIndex, index_tars
from steadydetr.files import counted, listed, printable
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray


NOWHERE = -1


@dataclass(frozen=True)
class Members:
    """I members of tar files, one for each image of a data set."""

    store: Store
    files: tuple[str, ...]  # the tar files
    stamps: tuple[str, ...]
    file_of: NDArray[np.int32]  # [I] in which of these it lies, or NOWHERE
    offsets: NDArray[np.int64]  # [I] of its first byte
    sizes: NDArray[np.int64]  # [I] in bytes

    def read(self, position: int) -> bytes:
        """The content of a member; a ValueError says why it cannot be had."""
        number, size = int(self.file_of[position]), int(self.sizes[position])
        content = self.store.read(self.files[number], int(self.offsets[position]), size, self.stamps[number])
        if len(content) != size:
            raise ValueError(f"{printable(self.files[number])} gives {len(content)} bytes where {size} were asked for")
        return content

    def take(self, positions: NDArray[np.int64]) -> Members:
        """Those at `positions`, in that order."""
        return Members(self.store, self.files, self.stamps, self.file_of[positions], self.offsets[positions], self.sizes[positions])


def all_members(store: Store, indices: Sequence[TarIndex]) -> Members:
    """All members of tar files, one file after the other; the last row stands for none."""
    lengths = [len(index.names) for index in indices]
    return Members(
        store,
        tuple(index.file for index in indices),
        tuple(index.stamp for index in indices),
        np.append(np.repeat(np.arange(len(indices), dtype=np.int32), lengths), np.int32(NOWHERE)),
        np.concatenate([*(index.offsets for index in indices), [0]]),
        np.concatenate([*(index.sizes for index in indices), [0]]),
    )


def members_of(store: Store, tars: Sequence[TarIndex], index: AnnotationIndex) -> Members:
    """The members that annotations mean: of the same name and, of several such, that with most of the path alike.

    Raises ValueError where two members fit equally.
    """
    paths, everything = Names.cat([tar.names for tar in tars]), all_members(store, tars)
    hashes = _hashes(paths)  # a table of 1.7 million texts would take 400 MiB
    order = np.argsort(hashes)
    wanted = _hashes(index.file(position) for position in range(len(index)))
    first, end = (np.searchsorted(hashes, wanted, side, sorter=order) for side in ("left", "right"))
    rows = (
        _most_alike(index.file(position), order[a:b].tolist(), paths, everything)
        for position, (a, b) in enumerate(zip(first.tolist(), end.tolist(), strict=True))
    )
    return everything.take(np.fromiter(rows, np.int64, len(index)))


def _hashes(files: Iterable[str]) -> NDArray[np.int64]:
    """Of the last parts of paths."""
    return np.fromiter((hash(file.rpartition("/")[2]) for file in files), np.int64)


def _most_alike(file: str, rows: Sequence[int], paths: Names, members: Members) -> int:
    """The row whose path ends as a file's does, in as many parts as any; NOWHERE where none has its name."""
    depths = [parts_in_common(file, paths[row]) for row in rows]
    most = max(depths, default=0)
    best = [row for row, depth in zip(rows, depths, strict=True) if depth == most > 0]  # 0: another name of the same hash
    if len(best) > 1:
        both = listed((printable(f"{paths[row]} in {members.files[members.file_of[row]]}") for row in best), 2)
        raise ValueError(f"{printable(file)} is twice in the tar files, as {both}: take one of them out, or name fewer tar files")
    return best[0] if best else NOWHERE


@dataclass(frozen=True)
class StoredDataset(FolderDataset):
    """A data set whose annotations lie in a folder, and its images elsewhere."""

    where: str = ""  # what the user calls that place
    members: Members | None = None  # None: it is a folder at an address, of image files

    def image_file(self, position: int) -> Path | Encoded:
        """The content of an image file. Raises ValueError where it is not there, or larger than allowed; names it."""
        name, limits = self.index.file(position), self.data_folder.limits
        if self.members is None:
            content = store_of(self.where, limits).read(f"{self.where.rstrip('/')}/{name}")
        elif self.missing(position):
            raise ValueError(
                f"{printable(name)} is in none of the {counted(len(self.members.files), 'tar file')} of {printable(self.where)}"
            )
        else:
            content = self.members.read(position)
        if len(content) > limits.max_file_mb * 2**20:
            raise ValueError(f"{printable(name)} has {len(content) / 2**20:.0f} MiB, more than max_file_mb = {limits.max_file_mb} allows")
        return Encoded(content, name)

    def way_out(self, position: int) -> str:
        return ""  # the user has named the place itself

    def take(self, positions: NDArray[np.int64], name: str) -> StoredDataset:
        """Only the images at these positions, with their members, under another name."""
        index, members = self.index.keep_images(positions), self.members and self.members.take(positions)
        return replace(self, index=index, members=members, name=name)

    def missing(self, position: int) -> bool:
        return self.members is not None and bool(self.members.file_of[position] < 0)

    def check_files(self) -> None:
        """Raise ValueError where an image is in none of the tar files. A folder at an address is not listed, which can take long."""
        if self.members is None or not len(missing := np.flatnonzero(self.members.file_of < 0)):
            return
        first = printable(self.index.file(int(missing[0])))
        tars = f"the {counted(len(self.members.files), 'tar file')} of {printable(self.where)}"
        raise ValueError(f"{printable(self.name)}: {len(missing)} images are in none of {tars}, the first is {first}")


def with_images(dataset: FolderDataset, where: str) -> FolderDataset:
    """The data set with its images from a folder, from tar files or from an address. Raises ValueError where there are none; names it."""
    limits, index = dataset.data_folder.limits, dataset.index
    store = store_of(where, limits)
    if files := store.tars():
        members = members_of(store, index_tars(store, files), index)
        return StoredDataset(index, dataset.folder, dataset.name, dataset.source, where=where, members=members)
    if is_address(where) and not names_tar_files(where):
        return StoredDataset(index, dataset.folder, dataset.name, dataset.source, where=where)
    folder = expanded(where)
    if not folder.is_dir():
        raise ValueError(f"images-in={printable(where)}: there is no such folder, and no tar file of that name; shards/*.tar names several")
    return FolderDataset(index, folder, dataset.name, DataFolder(folder, limits))
