"""The annotations of a data set as flat arrays: loaded in seconds, shared by workers, no Python object per image or box."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from steadydetr.data.columns import Ids, Lists, Names, id_array, offsets_of, rows_of
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from steadydetr.data.masks import Masks


@dataclass(frozen=True)
class Federated:
    """LVIS: not every class was looked for in every image. A detection counts only where its class was looked for.

    Classes of an image's own objects have been looked for in it too.
    """

    absent: Lists  # labels that were looked for in an image and are not in it
    incomplete: Lists  # labels of which an image may show more objects than are annotated
    frequencies: tuple[str, ...]  # of every class, in training images: r (rare), c (common), f (frequent), or empty

    def take(self, positions: NDArray[np.int64]) -> Federated:
        """Only the images at `positions`, in that order."""
        return Federated(self.absent.take(positions), self.incomplete.take(positions), self.frequencies)


@dataclass(frozen=True)
class AnnotationIndex:
    """I images and A annotations; those of image i are rows offsets[i] : offsets[i + 1]."""

    image_ids: Ids  # [I] unique
    file_bytes: NDArray[np.uint8]  # all file names, one after the other
    file_offsets: NDArray[np.int64]  # [I + 1]
    sizes: NDArray[np.int32]  # [I, 2] (h, w) in pixels
    offsets: NDArray[np.int64]  # [I + 1]
    boxes_xyxy: NDArray[np.float32]  # [A, 4] pixels
    labels: NDArray[np.int32]  # [A] index into classes
    crowd: NDArray[np.bool_]  # [A] COCO: a region of many objects, not trained on
    difficult: NDArray[np.bool_]  # [A] VOC: trained on, not counted by its metric
    areas: NDArray[np.float32]  # [A] of the object, in pixels: see `build`
    annotation_ids: Ids  # [A]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # of the file; results are written with these
    federated: Federated | None = None  # of LVIS only; else every class was looked for in every image
    masks: Masks | None = None  # of all A, where they were asked for

    def __len__(self) -> int:
        return len(self.image_ids)

    @staticmethod
    def build(
        *,
        image_ids: Iterable[int | str] | Ids,
        files: Sequence[str] | Names,
        sizes: ArrayLike,
        counts: ArrayLike,
        boxes_xyxy: ArrayLike,
        labels: ArrayLike,
        classes: tuple[str, ...],
        category_ids: tuple[int, ...],
        crowd: ArrayLike | None = None,
        difficult: ArrayLike | None = None,
        areas: ArrayLike | None = None,
        annotation_ids: Iterable[int | str] | Ids | None = None,
        federated: Federated | None = None,
        masks: Masks | None = None,
    ) -> AnnotationIndex:
        """Annotations come sorted by image; `counts` says how many each image has.

        Args:
            areas: NaN where the data do not say it, or None: there it is that of the mask, or else of the box.
        """
        boxes = np.asarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        total = len(boxes)
        if isinstance(files, Names):
            file_bytes, lengths = files.encoded, np.diff(files.ends, prepend=0)
        else:
            file_bytes = np.frombuffer("".join(files).encode(), dtype=np.uint8)
            lengths = np.fromiter((len(name.encode()) for name in files), dtype=np.int64, count=len(files))
        return AnnotationIndex(
            image_ids=id_array(image_ids),
            file_bytes=file_bytes,
            file_offsets=offsets_of(lengths),
            sizes=np.asarray(sizes, dtype=np.int32).reshape(-1, 2),
            offsets=offsets_of(np.asarray(counts, dtype=np.int64)),
            boxes_xyxy=boxes,
            labels=np.asarray(labels, dtype=np.int32),
            crowd=np.zeros(total, bool) if crowd is None else np.asarray(crowd, dtype=bool),
            difficult=np.zeros(total, bool) if difficult is None else np.asarray(difficult, dtype=bool),
            areas=_areas(boxes, areas, masks),
            annotation_ids=np.arange(1, total + 1) if annotation_ids is None else id_array(annotation_ids),
            classes=classes,
            category_ids=category_ids,
            federated=federated,
            masks=masks,
        )

    def file(self, position: int) -> str:
        start, stop = self.file_offsets[position : position + 2]
        return self.file_bytes[start:stop].tobytes().decode()

    def rows(self, position: int) -> slice:
        return slice(int(self.offsets[position]), int(self.offsets[position + 1]))

    @property
    def counts(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def image_of_row(self) -> NDArray[np.int64]:
        """[A] position of the image of every annotation."""
        return np.repeat(np.arange(len(self)), self.counts)

    @property
    def identity(self) -> str:
        """By what the same images with the same annotations are known again, wherever they lie: their numbers, and a digest of them."""
        digest = hashlib.sha256()
        for name in ("image_ids", "file_bytes", "file_offsets", "sizes", "offsets", "boxes_xyxy", "labels", "crowd", "difficult"):
            values = getattr(self, name)
            flat = np.frombuffer(repr(values.tolist()).encode(), np.uint8) if values.dtype == object else np.ascontiguousarray(values)
            digest.update(flat.view(np.uint8).data)
        for values in () if self.masks is None else self.masks.arrays:
            digest.update(values.view(np.uint8).data)
        return f"{len(self)} images, {len(self.labels)} annotations, digest {digest.hexdigest()[:12]}"

    def usable(self) -> NDArray[np.bool_]:
        """[A] whether an annotation can be trained on: no crowd region, a finite box with an area in its image, and a mask if asked for."""
        height, width = self.sizes[self.image_of_row].T
        with np.errstate(invalid="ignore"):
            x0, y0, x1, y1 = self.boxes_xyxy.T
            inside = (np.minimum(x1, width) - np.maximum(x0, 0) > 0) & (np.minimum(y1, height) - np.maximum(y0, 0) > 0)
        return np.isfinite(self.boxes_xyxy).all(1) & inside & ~self.crowd & ~self.without_mask

    @property
    def without_mask(self) -> NDArray[np.bool_]:
        """[A] whether an annotation has no mask, where masks were asked for."""
        return np.zeros(len(self.labels), bool) if self.masks is None else ~self.masks.present

    def decode_masks(self, position: int) -> NDArray[np.bool_]:
        """[G, H, W] the masks of an image's annotations, in the order of its boxes; no pixel where an annotation has none.

        They are of the size in `sizes`: of the picture as it was annotated, in whose pixels boxes are too.

        Raises:
            ValueError: the masks were not asked for.
        """
        if self.masks is None:
            raise ValueError("the masks were not read: open the data with masks=True, or train with --data.masks")
        height, width = self.sizes[position].tolist()
        return self.masks.decode(self.rows(position), height, width)

    def keep_rows(self, keep: NDArray[np.bool_]) -> AnnotationIndex:
        """The same images with only the marked annotations."""
        counts = np.bincount(self.image_of_row[keep], minlength=len(self))
        names = ("boxes_xyxy", "labels", "crowd", "difficult", "areas", "annotation_ids")
        masks = self.masks and self.masks.take(np.flatnonzero(keep))
        return replace(self, offsets=offsets_of(counts), masks=masks, **{name: getattr(self, name)[keep] for name in names})

    def keep_images(self, positions: NDArray[np.int64]) -> AnnotationIndex:
        """Only the images at `positions`, in that order."""
        rows, offsets = rows_of(self.offsets, positions)
        return AnnotationIndex.build(
            image_ids=self.image_ids[positions],
            files=[self.file(int(i)) for i in positions],
            sizes=self.sizes[positions],
            counts=np.diff(offsets),
            boxes_xyxy=self.boxes_xyxy[rows],
            labels=self.labels[rows],
            classes=self.classes,
            category_ids=self.category_ids,
            crowd=self.crowd[rows],
            difficult=self.difficult[rows],
            areas=self.areas[rows],
            annotation_ids=self.annotation_ids[rows],
            federated=self.federated and self.federated.take(positions),
            masks=self.masks and self.masks.take(rows),
        )


def join_indices(parts: Sequence[AnnotationIndex]) -> AnnotationIndex:
    """One index of several data sets with the same classes; ids that are used twice are numbered anew."""
    first = parts[0]
    for part in parts[1:]:
        if part.classes != first.classes:
            raise ValueError(f"data sets to be joined must have the same classes: {list(first.classes)} against {list(part.classes)}")

    def cat(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(part, name) for part in parts])

    image_ids, annotation_ids = cat("image_ids"), cat("annotation_ids")
    if len(set(image_ids.tolist())) < len(image_ids):
        image_ids = np.arange(1, len(image_ids) + 1)
    if len(set(annotation_ids.tolist())) < len(annotation_ids):
        annotation_ids = np.arange(1, len(annotation_ids) + 1)
    return AnnotationIndex.build(
        image_ids=image_ids,
        files=[part.file(i) for part in parts for i in range(len(part))],
        sizes=cat("sizes"),
        counts=cat("counts"),
        boxes_xyxy=cat("boxes_xyxy"),
        labels=cat("labels"),
        classes=first.classes,
        category_ids=first.category_ids,
        crowd=cat("crowd"),
        difficult=cat("difficult"),
        areas=cat("areas"),
        annotation_ids=annotation_ids,
        federated=join_federated([part.federated for part in parts]),
        masks=_join_masks([part.masks for part in parts]),
    )


def join_federated(parts: Sequence[Federated | None]) -> Federated | None:
    """None unless all parts are federated, with the same frequencies: no metric fits a mixture."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.frequencies for part in known}) > 1:
        return None
    return Federated(Lists.cat([p.absent for p in known]), Lists.cat([p.incomplete for p in known]), known[0].frequencies)


def _join_masks(parts: Sequence[Masks | None]) -> Masks | None:
    """None unless all parts have masks."""
    known = [part for part in parts if part is not None]
    return known[0].joined(known[1:]) if len(known) == len(parts) else None


def _areas(boxes: NDArray[np.float32], annotated: ArrayLike | None, masks: Masks | None) -> NDArray[np.float32]:
    """[A] the areas of objects, where none is annotated those of masks, or else of boxes: COCO's are those of masks."""  # D-231
    areas = np.full(len(boxes), np.nan, np.float32) if annotated is None else np.asarray(annotated, dtype=np.float32)
    if not (unsaid := np.isnan(areas)).any():
        return areas
    with np.errstate(over="ignore", invalid="ignore"):
        of_boxes = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    known = of_boxes if masks is None else np.where(masks.present, masks.areas, of_boxes)
    return np.where(unsaid, known, areas).astype(np.float32)
