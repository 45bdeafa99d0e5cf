"""`segmentation` of COCO files: polygons, run lengths as numbers, and run lengths as text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec

from steadydetr.data.columns import Lists
from steadydetr.data.masks import EMPTY, FARTHEST, LINES, MISSING, OTHER_SIZE, PRESENT, Masks, as_float32, outline_length
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CORNERS = 3  # of a polygon, at least; parts of fewer are points and lines, which hold no pixel
DIGITS = 7  # that a number has in a text of run lengths, at most, of 5 bits each

Run = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class Rle(msgspec.Struct, gc=False):
    """Run lengths of pixels outside, inside, outside, ..., column by column. Raises ValueError where they do not fill the size."""

    size: tuple[int, int]  # (h, w)
    counts: list[Run] | str  # numbers once it is read

    @property
    def runs(self) -> list[int]:
        return runs_of_text(self.counts) if isinstance(self.counts, str) else self.counts

    def __post_init__(self) -> None:
        self.counts = self.runs
        (height, width), total = self.size, sum(self.counts)
        if total != height * width or min(self.size) < 1:
            raise ValueError(f"`counts` add up to {total}, not to the {height} x {width} pixels of `size`")


Polygons: TypeAlias = list[list[float]]
Segmentation: TypeAlias = list[list[float] | float] | Rle | None  # numbers without a list around them are one polygon
AS_WRITTEN = 'a mask is polygons, [[x1, y1, x2, y2, ...], ...], or run lengths, {"size": [height, width], "counts": ...}'


def runs_of_text(text: str) -> list[int]:
    """The run lengths of a text that COCO's tools write: numbers of 5-bit digits, from the third on as differences to the second last.

    Raises ValueError for a text that is none.
    """
    digits = np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64) - ord("0")
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] > 31:  # 32: another digit follows
        mend = ": what Python prints of bytes; write counts.decode()" if text.startswith("b'") else ""
        raise ValueError(f"`counts` is a text, but not one of run lengths{mend}")
    starts = np.flatnonzero(np.concatenate(([True], digits[:-1] < 32)))
    lengths = np.diff(starts, append=len(digits))
    if lengths.max() > DIGITS:
        raise ValueError("`counts` is a text of run lengths that are too large")
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & 31) << 5 * places, starts)
    values -= (digits[starts + lengths - 1] >> 4 & 1) << 5 * lengths  # its highest bit is the sign
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    if values.min() < 0 or values.max() >= 2**32:
        raise ValueError("`counts` is a text of run lengths below 0 or too large")
    runs: list[int] = values.tolist()
    return runs


def polygons_of(written: list[list[float] | float]) -> Polygons:
    """The polygons of a `segmentation`, points and lines among them too.

    Raises ValueError for what is no polygon, or one that could not be filled in little memory.
    """
    polygons = [part for part in written if isinstance(part, list)]
    numbers = [part for part in written if not isinstance(part, list)]
    if polygons and numbers:
        raise ValueError(f"`segmentation` has numbers beside lists: {AS_WRITTEN}")
    if len(polygons) >= CORNERS and all(len(polygon) == 2 for polygon in polygons):
        raise ValueError("`segmentation` has a list for each corner: those of a polygon must be one list, [[x1, y1, x2, y2, ...]]")
    if numbers:
        polygons = [numbers]
    for number, polygon in enumerate(polygons):
        _check_polygon(polygon, f"`segmentation[{number}]`")
    return polygons


def _check_polygon(polygon: list[float], name: str) -> None:
    count = len(polygon)
    if count % 2:
        raise ValueError(f"{name} has {count} numbers: a polygon has x and y of every corner")
    low, high = min(polygon, default=0), max(polygon, default=0)
    within = -FARTHEST < low <= high < FARTHEST
    if not within or (count * (high - low) > FARTHEST and outline_length(np.array(polygon).reshape(-1, 2)) > FARTHEST):
        raise ValueError(f"{name} is too large: coordinates and outline must be below {FARTHEST} pixels")


class MaskColumn:
    """The masks of annotations in the order of a file, to which some are added at a time."""

    def __init__(self) -> None:
        self.parts: list[Masks] = []
        self.sizes: list[NDArray[np.int64]] = []  # (h, w) of run lengths, else (0, 0)

    def extend(self, batch: Sequence[Segmentation]) -> None:
        polygons = [_with_corners(value) for value in batch]
        lengths = Lists.of([list(map(len, value)) for value in polygons])
        ends = np.cumsum([0, *lengths.values.tolist()])
        coordinates = np.fromiter(chain.from_iterable(chain.from_iterable(polygons)), np.float64, ends[-1])
        masks = Masks(
            np.array([_state(value) for value in batch], np.uint8),
            lengths,
            Lists(as_float32(coordinates), ends[lengths.offsets]),
            Lists.of([value.runs if isinstance(value, Rle) else [] for value in batch], np.uint32),
        )
        self.parts.append(masks)
        self.sizes.append(np.array([value.size if isinstance(value, Rle) else (0, 0) for value in batch], np.int64).reshape(-1, 2))

    def take(self, order: NDArray[np.int64], image_sizes: NDArray[np.int32]) -> Masks:
        """The masks of these rows, in that order; none where it is of another size than its image.

        Args:
            image_sizes: [len(order), 2] (h, w) of the image of each.
        """
        self.extend([])  # so that there is a part
        (first, *others), self.parts = self.parts, []
        masks = first.joined(others)
        del first, others  # memory may be short
        masks, sizes = masks.take(order), np.concatenate(self.sizes)[order]
        masks.state[(sizes > 0).any(1) & (sizes != image_sizes).any(1)] = OTHER_SIZE
        return masks


def _state(value: Segmentation) -> int:
    if value is None:
        return MISSING
    if isinstance(value, Rle):
        return PRESENT if sum(value.runs[1::2]) else EMPTY
    return PRESENT if _with_corners(value) else LINES if value else EMPTY


def _with_corners(value: Segmentation) -> Polygons:
    """The polygons of what `polygons_of` made, but for points and lines; none of what are no polygons."""
    parts = value if isinstance(value, list) else []
    return [part for part in parts if isinstance(part, list) and len(part) >= 2 * CORNERS]
