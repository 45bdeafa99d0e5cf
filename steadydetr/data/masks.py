"""The masks of objects and of detections as flat arrays, and their decoding: exactly as pycocotools does it, to the last pixel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from steadydetr.data.columns import BLOCK, Lists, offsets_of
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

PRESENT, MISSING, EMPTY, OTHER_SIZE, LINES, BOX = range(6)  # what became of the mask of an annotation; but for the first it has none
WITHOUT = {
    MISSING: "has no `segmentation`",
    EMPTY: "its `segmentation` is empty",
    LINES: "no polygon of its `segmentation` has three corners",
    BOX: "it is a box, not a polygon",
    OTHER_SIZE: "`size` of its `segmentation` is not that of its image",
}  # in words


FARTHEST = 2**20  # pixels that a coordinate may be from 0, and an outline may be long: filling takes 80 bytes of memory for each


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
        """[G, height, width] the masks of G annotations of one image of that size; no pixel of one that has none."""
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

    def extents(self, heights: NDArray[np.int64]) -> NDArray[np.float64]:
        """[A, 4] x0, y0, x1, y1 of the boxes around masks in images of these heights [A], nothing filled; NaN where there is none."""
        found = np.full((len(self), 4), np.nan)
        for lists, ends_of, each in ((self.coordinates, _corners, 2), (self.runs, _ends_of_runs, 1)):
            rows = np.flatnonzero(self.present & (np.diff(lists.offsets) > 0))
            for start in range(0, len(rows), BLOCK):  # some at a time, because memory may be short
                some = rows[start : start + BLOCK]
                part = lists.take(some)
                low, high = ends_of(part, heights[some])
                first = part.offsets[:-1] // each
                found[some] = np.concatenate((np.minimum.reduceat(low, first), np.maximum.reduceat(high, first)), 1)
        return found

    def as_coco(self, row: int, height: int, width: int) -> list[list[float]] | dict[str, Any]:
        """The mask of an annotation of an image of that size as COCO writes it: polygons, or run lengths; no pixel if it has none."""
        if self.state[row] != PRESENT:
            return {"size": [height, width], "counts": [height * width]}
        if len(runs := self.runs.of_image(row)):
            return {"size": [height, width], "counts": runs.tolist()}
        ends = np.cumsum(self.polygons.of_image(row))[:-1]
        return [polygon.tolist() for polygon in np.split(self.coordinates.of_image(row), ends)]

    @staticmethod
    def of_polygons(polygons: Lists) -> Masks:
        """A polygon of each annotation, as x, y, x, y, ... in pixels with 64 bits; an empty list where it has none."""
        lengths = np.diff(polygons.offsets)
        one_each = Lists(lengths[lengths > 0].astype(np.int32), offsets_of((lengths > 0).astype(np.int64)))
        state = np.where(lengths > 0, PRESENT, BOX).astype(np.uint8)
        coordinates = Lists(as_float32(polygons.values), polygons.offsets)
        return Masks(state, one_each, coordinates, Lists(np.zeros(0, np.uint32), np.zeros(len(lengths) + 1, np.int64)))

    @staticmethod
    def of_pixels(masks: Iterable[NDArray[np.bool_]]) -> Masks:
        """Masks as run lengths, of [H, W] each."""
        runs = [_runs(mask) for mask in masks]
        none = Lists.of([[] for _ in runs])
        state = np.array([PRESENT if len(lengths) > 1 else EMPTY for lengths in runs], np.uint8)
        return Masks(state, none, Lists(none.values.astype(np.float32), none.offsets), Lists.of([r.tolist() for r in runs], np.uint32))


@dataclass(frozen=True)
class EncodedMasks:
    """K masks as the texts that COCO writes of run lengths: some hundred bytes each."""

    texts: Lists  # K lists of uint8
    sizes: NDArray[np.int32]  # [K, 2] (h, w)

    def __len__(self) -> int:
        return len(self.sizes)

    @staticmethod
    def of(masks: NDArray[np.bool_]) -> EncodedMasks:
        """[K, H, W] as texts."""
        from hotcoco import mask

        found: list[Any] = list(mask.encode(masks.transpose(1, 2, 0))) if len(masks) else []
        texts: list[bytes] = [one["counts"] for one in found]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        size = np.array(masks.shape[1:], np.int32)
        return EncodedMasks(Lists(np.frombuffer(b"".join(texts), np.uint8), offsets_of(lengths)), np.tile(size, (len(masks), 1)))

    @staticmethod
    def cat(parts: Sequence[EncodedMasks]) -> EncodedMasks:
        return EncodedMasks(Lists.cat([part.texts for part in parts]), np.concatenate([part.sizes for part in parts]))

    def take(self, rows: NDArray[np.int64]) -> EncodedMasks:
        """Those in these rows, in that order."""
        return EncodedMasks(self.texts.take(rows), self.sizes[rows])

    def as_coco(self) -> list[dict[str, Any]]:
        """Each as COCO writes it: {"size": [h, w], "counts": text}."""
        data, ends = self.texts.values.tobytes().decode("ascii"), self.texts.offsets.tolist()
        texts = (data[start:end] for start, end in pairwise(ends))
        return [{"size": size, "counts": text} for size, text in zip(self.sizes.tolist(), texts, strict=True)]

    @property
    def areas(self) -> NDArray[np.int64]:
        """[K] pixels of each."""
        from hotcoco import mask

        return np.array([mask.area(one) for one in self.as_coco()], np.int64)

    def __iter__(self) -> Iterator[NDArray[np.bool_]]:
        """[H, W] each, decoded when it is asked for."""
        from hotcoco import mask

        return (np.asarray(mask.decode(one), bool) for one in self.as_coco())


def _corners(coordinates: Lists, heights: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[C, 2] (x, y) of all corners of polygons: each is the lowest and the highest point of itself."""
    corners = coordinates.values.astype(np.float64).reshape(-1, 2)
    return corners, corners


def _ends_of_runs(runs: Lists, heights: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[R, 2] the lowest and the highest (x, y) of each run of pixels in images of these heights; endless where it is outside the mask."""
    lengths, first, many = runs.values.astype(np.int64), runs.offsets[:-1], np.diff(runs.offsets)
    ends, height = np.cumsum(lengths), np.repeat(heights, many)
    ends -= np.repeat(ends[first] - lengths[first], many)
    (x0, y0), (x1, y1) = np.divmod(ends - lengths, height), np.divmod(ends - 1, height)
    several = x1 > x0  # columns
    low = np.stack((x0, np.where(several, 0, y0)), 1).astype(float)
    high = np.stack((x1, np.where(several, height - 1, y1)), 1) + 1.0
    outside = ((np.arange(len(lengths)) - np.repeat(first, many)) % 2 == 0) | (lengths == 0)
    low[outside], high[outside] = np.inf, -np.inf
    return low, high


def _runs(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many pixels are outside, inside, outside, ... column by column."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    runs: NDArray[np.int64] = np.diff(changes, prepend=0, append=len(flat))
    return runs


def fill_polygons(polygons: Sequence[ArrayLike], height: int, width: int) -> NDArray[np.uint8]:
    """[height, width] 1 within any of the polygons, each x, y, x, y, ... in pixels."""  # D-201
    from hotcoco import mask

    filled: NDArray[np.uint8] = mask.decode(
        mask.merge(mask.frPyObjects([np.asarray(polygon, float).tolist() for polygon in polygons], height, width))
    )
    return filled


def outline_length(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., n, 2] -> [...] how long polygons' outlines are, in pixels, where a step to a diagonal neighbour is one."""
    length: NDArray[np.float64] = np.abs(corners - np.roll(corners, 1, -2)).max(-1).sum(-1)
    return length


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
