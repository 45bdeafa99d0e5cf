"""Columns of a data set: texts, lists and ids as flat arrays, which take a fraction of the memory of Python's objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

Ids: TypeAlias = "NDArray[np.int64] | NDArray[np.object_]"  # numbers of 64 bits, or else larger ones and texts as they are in the file
BLOCK = 2**10  # lists that are taken at once: a number of them takes 24 bytes meanwhile


@dataclass(frozen=True)
class Names:
    """M texts as one array, which takes a quarter of the memory that Python's texts do."""

    encoded: NDArray[np.uint8]  # all of them, one after the other
    ends: NDArray[np.int64]  # [M]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> str:
        start = int(self.ends[row - 1]) if row else 0
        return self.encoded[start : self.ends[row]].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    @staticmethod
    def of(names: Iterable[str]) -> Names:
        encoded = [name.encode(errors="surrogateescape") for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return Names(np.frombuffer(b"".join(encoded), np.uint8), ends)

    @staticmethod
    def cat(parts: Sequence[Names]) -> Names:
        before = np.cumsum([0, *(len(part.encoded) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, before[:-1], strict=True)]
        return Names(np.concatenate([part.encoded for part in parts]), np.concatenate(ends))


@dataclass(frozen=True)
class Lists:
    """M lists of numbers, as of the labels of an image; list i is values[offsets[i] : offsets[i + 1]]."""

    values: NDArray[Any]
    offsets: NDArray[np.int64]  # [M + 1]

    @staticmethod
    def of(lists: Sequence[Sequence[float]], dtype: DTypeLike = "int32") -> Lists:
        values = np.fromiter(chain.from_iterable(lists), dtype)
        return Lists(values, offsets_of(np.fromiter(map(len, lists), np.int64, len(lists))))

    @staticmethod
    def cat(parts: Sequence[Lists]) -> Lists:
        return Lists(np.concatenate([p.values for p in parts]), offsets_of(np.concatenate([np.diff(p.offsets) for p in parts])))

    def take(self, positions: NDArray[np.int64]) -> Lists:
        """Those at `positions`, in that order; some at a time, because memory may be short."""
        offsets = offsets_of(self.offsets[positions + 1] - self.offsets[positions])
        values = np.empty(offsets[-1], self.values.dtype)
        for start in range(0, len(positions), BLOCK):
            some = positions[start : start + BLOCK]
            values[offsets[start] : offsets[start + len(some)]] = self.values[rows_of(self.offsets, some)[0]]
        return Lists(values, offsets)

    def of_image(self, position: int) -> NDArray[Any]:
        return self.values[self.offsets[position] : self.offsets[position + 1]]


def id_array(ids: Iterable[int | str] | Ids) -> Ids:
    """Ids as an array: of int64 where all are numbers of 64 bits, else of the objects as they are."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "i":
        return ids.astype(np.int64, copy=False)
    values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if {*map(type, values)} <= {int, np.int64}:
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            pass
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


class IdColumn:
    """Ids one after the other, in an array that has room for `most`: of 32 bits as long as they fit, else as `id_array` has them."""

    def __init__(self, most: int) -> None:
        self.array: NDArray[Any] = np.empty(most, np.int32)
        self.count = 0

    def extend(self, ids: Sequence[int | str]) -> None:
        added: NDArray[Any] = id_array(ids)
        if added.dtype != object and (added == added.astype(np.int32)).all():
            added = added.astype(np.int32)
        self.array = self.array.astype(np.result_type(self.array, added), copy=False)
        self.array[self.count : self.count + len(added)] = added
        self.count += len(added)

    @property
    def values(self) -> NDArray[Any]:
        return self.array[: self.count]


def find_ids(known: Ids, wanted: Ids) -> NDArray[np.int64]:
    """Position of every `wanted` id in `known`; -1 where it is not there. A text is never the number that it looks like."""
    if object in (known.dtype, wanted.dtype) or not len(known):
        position_of = {id_: position for position, id_ in enumerate(known.tolist())}
        return np.array([position_of.get(id_, -1) for id_ in wanted.tolist()], dtype=np.int64)
    order = np.argsort(known)
    found = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[found] == wanted, found, -1)


def counts_in_order(positions: NDArray[np.int32], total: int) -> NDArray[np.int64]:
    """How often each of 0 to total - 1 is among positions in ascending order: as `np.bincount`, without a copy of them in 64 bits."""
    return np.diff(np.searchsorted(positions, np.arange(total + 1, dtype=np.int32)))


def offsets_of(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def rows_of(offsets: NDArray[np.int64], positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of the images at `positions`, one after the other, and the offsets that they have then."""
    counts = offsets[positions + 1] - offsets[positions]
    taken = offsets_of(counts)
    return np.repeat(offsets[positions] - taken[:-1], counts) + np.arange(taken[-1]), taken
