"""The masks of objects and of detections as flat arrays, and their decoding: exactly as pycocotools does it, to the last pixel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from steadydetr.data.columns import Lists, offsets_of
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

    def boxes(self, heights: NDArray[np.int32]) -> NDArray[np.float64]:
        """[A, 4] xyxy in pixels: the boxes around polygons, wherever these lie, and around runs; NaN where there is no mask.

        Args:
            heights: [A] of the images, which runs are columns of.
        """
        found = np.full((len(self), 4), np.nan)
        points = self.coordinates.values.reshape(-1, 2)
        _around(found, np.diff(self.coordinates.offsets) // 2, points, points)
        owner, starts, lengths = self._runs_inside()
        height = heights[owner]
        (left, top), (right, bottom) = np.divmod(starts, height), np.divmod(starts + lengths - 1, height)
        top, bottom = np.where(left == right, top, 0), np.where(left == right, bottom, height - 1)
        counts = np.bincount(owner, minlength=len(self))
        _around(found, counts, np.column_stack((left, top)), np.column_stack((right + 1, bottom + 1)))
        found[~self.present] = np.nan
        return found

    @property
    def areas(self) -> NDArray[np.float64]:
        """[A] pixels of runs, and what polygons enclose, where they overlap several times; 0 where there is no mask."""
        corners = self.polygons.values.astype(np.int64) // 2
        starts = offsets_of(corners)
        following = np.arange(1, starts[-1] + 1)
        following[starts[1:] - 1] = starts[:-1]
        x, y = self.coordinates.values.reshape(-1, 2).astype(np.float64).T
        enclosed = np.add.reduceat(x * y[following] - x[following] * y, starts[:-1]) if len(corners) else np.zeros(0)
        polygons = np.bincount(np.repeat(np.arange(len(self)), np.diff(self.polygons.offsets)), np.abs(enclosed) / 2, len(self))
        owner, _, lengths = self._runs_inside()
        return ((polygons + np.bincount(owner, lengths, len(self))) * self.present).astype(np.float64)

    def _runs_inside(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Annotation, first pixel and length of every run of pixels inside."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.runs.offsets))
        lengths, first = self.runs.values.astype(np.int64), self.runs.offsets[owner]
        before = np.cumsum(lengths) - lengths
        inside = ((np.arange(len(owner)) - first) % 2 == 1) & (lengths > 0)
        return owner[inside], (before - before[first])[inside], lengths[inside]

    def as_coco(self, row: int, height: int, width: int) -> list[list[float]] | dict[str, Any]:
        """The mask of an annotation of an image of that size as COCO writes it: polygons, or run lengths; no pixel if it has none."""
        if self.state[row] != PRESENT:
            return {"size": [height, width], "counts": [height * width]}
        if len(runs := self.runs.of_image(row)):
            return {"size": [height, width], "counts": runs.tolist()}
        ends = np.cumsum(self.polygons.of_image(row))[:-1]
        return [polygon.tolist() for polygon in np.split(self.coordinates.of_image(row), ends)]

    @staticmethod
    def of_polygons(polygons: Lists, parts: Lists | None = None) -> Masks:
        """The polygons of each annotation, as x, y, x, y, ... in pixels with 64 bits; an empty list where it has none.

        Args:
            parts: how many numbers each of an annotation's polygons has; None: all are of one.
        """
        lengths = np.diff(polygons.offsets)
        if parts is None:
            parts = Lists(lengths[lengths > 0].astype(np.int32), offsets_of((lengths > 0).astype(np.int64)))
        state = np.where(lengths > 0, PRESENT, BOX).astype(np.uint8)
        coordinates = Lists(as_float32(polygons.values), polygons.offsets)
        return Masks(state, parts, coordinates, Lists(np.zeros(0, np.uint32), np.zeros(len(lengths) + 1, np.int64)))

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


def _around(boxes: NDArray[np.float64], counts: NDArray[np.int64], low: NDArray[Any], high: NDArray[Any]) -> None:
    """Set each of the boxes [A, 4] that has points, `counts` [A] many of [n, 2], to the least of `low` and the most of `high`."""
    filled = counts > 0
    if filled.any():
        starts = offsets_of(counts)[:-1][filled]
        boxes[filled] = np.concatenate((np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)), 1)


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
