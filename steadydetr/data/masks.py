"""The masks of objects as flat arrays, and their decoding: exactly as pycocotools does it, to the last pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from steadydetr.data.columns import Lists
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

PRESENT, MISSING, EMPTY, OTHER_SIZE, LINES = range(5)  # what became of the mask of an annotation; but for the first it has none
WITHOUT = {
    MISSING: "has no `segmentation`",
    EMPTY: "its `segmentation` is empty",
    LINES: "no polygon of its `segmentation` has three corners",
    OTHER_SIZE: "`size` of its `segmentation` is not that of its image",
}  # in words


@dataclass(frozen=True)
class Masks:
    """Masks of A annotations: polygons of any number, or runs of pixels, or none of both."""

    state: NDArray[np.uint8]  # [A] PRESENT, or why there is none
    polygons: Lists  # A lists: how many numbers each polygon of an annotation has
    coordinates: Lists  # A lists of float32: x, y, x, y, ... in pixels of all its polygons, one after the other
    runs: Lists  # A lists of uint32: how many pixels are outside, inside, outside, ... column by column from the top left

    def __len__(self) -> int:
        return len(self.state)

    @property
    def present(self) -> NDArray[np.bool_]:
        """[A] whether an annotation has a mask."""
        return self.state == PRESENT

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """All that they are made of."""
        return [self.state, *(array for part in (self.polygons, self.coordinates, self.runs) for array in (part.values, part.offsets))]

    def take(self, rows: NDArray[np.int64]) -> Masks:
        """Only the annotations in these rows, in that order."""
        return Masks(self.state[rows], self.polygons.take(rows), self.coordinates.take(rows), self.runs.take(rows))

    def joined(self, others: Sequence[Masks]) -> Masks:
        """These, and then all others."""
        parts = (self, *others)
        lists = [Lists.cat([getattr(part, field.name) for part in parts]) for field in fields(Masks)[1:]]
        return Masks(np.concatenate([part.state for part in parts]), *lists)

    def decode(self, rows: slice, height: int, width: int) -> NDArray[np.bool_]:
        """[G, height, width] the masks of G annotations of one image of that size; no pixel of one that has none.

        Raises ImportError without pycocotools, where there are polygons.
        """
        found = np.zeros((rows.stop - rows.start, height, width), bool)
        for mask, row in zip(found, range(rows.start, rows.stop), strict=True):
            if self.state[row] != PRESENT:
                continue
            if len(runs := self.runs.of_image(row)):
                mask[:] = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
            else:
                polygons = np.split(self.coordinates.of_image(row), np.cumsum(self.polygons.of_image(row))[:-1])
                mask[:] = fill_polygons(polygons, height, width)
        return found


def fill_polygons(polygons: Sequence[ArrayLike], height: int, width: int) -> NDArray[np.uint8]:
    """[height, width] 1 within any of the polygons, each x, y, x, y, ... in pixels."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError("masks need the package pycocotools: pip install 'steadydetr[masks]'") from error
    filled: NDArray[np.uint8] = mask.decode(mask.merge(mask.frPyObjects(list(polygons), height, width)))
    return filled


def as_float32(coordinates: NDArray[np.float64]) -> NDArray[np.float32]:
    """Coordinates below 2^20 in half the memory, changed so little that polygons fill the same pixels.

    pycocotools rounds each to a fifth of a pixel. Where the nearest float32 is rounded to another fifth, its neighbour is taken.
    """
    near = coordinates.astype(np.float32)
    off = _fifths(near.astype(np.float64)) - _fifths(coordinates)
    towards = np.where(off > 0, -np.inf, np.inf).astype(np.float32)
    return np.where(off == 0, near, np.nextafter(near, towards))


def _fifths(coordinates: NDArray[np.float64]) -> NDArray[np.int32]:
    """As `rleFrPoly` of pycocotools rounds."""
    return (5 * coordinates + 0.5).astype(np.int32)
