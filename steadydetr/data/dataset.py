"""Data sets in memory: an index of annotations, and where its images come from."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

from PIL import Image

from steadydetr.data.folder import DataFolder
from steadydetr.data.images import Decoded, decode_picture, decode_reduced, remark, to_channels
from steadydetr.data.index import AnnotationIndex, join_indices
from steadydetr.data.picture_inputs import Encoded
from steadydetr.files import printable
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NONE_IS_THERE = "give the folder that holds annotations and images, or say where the images are: --data PLACE,images-in=WHERE"


class Dataset(Protocol):
    """What loading needs of a data set."""

    @property
    def name(self) -> str: ...
    @property
    def index(self) -> AnnotationIndex: ...
    def load_image(self, position: int) -> NDArray[np.uint8]:
        """RGB [H, W, 3]."""


@dataclass(frozen=True)
class FolderDataset:
    index: AnnotationIndex
    folder: Path  # what the index's file names are relative to
    name: str
    source: DataFolder | None = None  # the data folder, in which the files must lie, and its limits; `folder` if not given
    alpha: bool = field(default=False, kw_only=True)  # whether images are RGBA

    in_files: ClassVar[bool] = True  # each image is a file

    @property
    def data_folder(self) -> DataFolder:
        return self.source or DataFolder(self.folder)

    def load_image(self, position: int, reduction: int = 1) -> NDArray[np.uint8]:
        """RGB [H, W, 3], or RGBA; an unreadable file is a ValueError that names it.

        Args:
            reduction: of a JPEG file only one of so many rows and columns is decoded: 1, 2, 4 or 8. Other files are decoded as they are.
        """
        try:
            if reduction > 1 and (pixels := self._reduced(position, reduction)) is not None:
                return pixels
            decoded = self.picture(position)
            remark(self.folder / self.index.file(position), decoded)
            return np.asarray(self.as_annotated(decoded, position))
        except ValueError as error:
            raise ValueError(f"{error}. `steadydetr check` lists all such files") from error

    def _reduced(self, position: int, reduction: int) -> NDArray[np.uint8] | None:
        height, width = self.index.sizes[position].tolist()
        return decode_reduced(self.image_file(position), self.data_folder.limits, (height, width), reduction)

    def masks(self, position: int) -> NDArray[np.bool_]:
        """[G, H, W] the masks of an image's annotations, in the pixels of `load_image`: see `AnnotationIndex.decode_masks`.

        Raises ValueError for an image of more pixels than allowed; names it.
        """
        (height, width), limit = self.index.sizes[position].tolist(), self.data_folder.limits.max_pixels
        if height * width > limit:
            name = printable(self.folder / self.index.file(position))
            raise ValueError(f"{name} is annotated with {width} x {height} pixels, more than max_pixels = {limit} allows")
        return self.index.decode_masks(position)

    def picture(self, position: int) -> Decoded:
        """An image as its file has it; a ValueError names the file."""
        return decode_picture(self.image_file(position), self.data_folder.limits, self.alpha)

    def image_file(self, position: int) -> Path | Encoded:
        """The file of an image, which lies where it may be read, or else a ValueError says so."""
        path = self.folder / self.index.file(position)
        self.data_folder.check_inside(path)
        return path

    def way_out(self, position: int) -> str:
        """How the path of an image leads out of the data folder; empty if it does not."""
        return self.data_folder.way_out(self.folder / self.index.file(position))

    def missing(self, position: int) -> bool:
        """Whether there is no such file at all."""
        return not os.path.lexists(self.folder / self.index.file(position))

    def as_annotated(self, decoded: Decoded, position: int) -> Image.Image:
        """The picture that the annotations of an image belong to: turned as EXIF says, or as it is stored where they say its size (D-102).

        Raises ValueError where they belong to neither; names the file.
        """
        size, file = tuple(self.index.sizes[position].tolist()), printable(self.folder / self.index.file(position))
        turned, stored = decoded.image, decoded.stored
        if turned.size[::-1] == size:
            return turned
        tag = f" turned as its EXIF orientation {decoded.orientation} says" if stored.size != turned.size else ""
        if stored.size[::-1] != size:
            sides = f"{turned.width} x {turned.height} pixels{tag}"
            raise ValueError(f"{file} has {sides}, its annotation says {size[1]} x {size[0]}: boxes would be misplaced")
        if self.boxes_fit_only(position, turned.size, stored.size):
            raise ValueError(
                f"{file} is annotated with the size of the stored picture, {size[1]} x {size[0]}, but its boxes fit only the picture"
                f"{tag}, {turned.width} x {turned.height}: swap width and height of its annotation"
            )
        return stored

    def boxes_fit_only(self, position: int, size: tuple[int, int], other: tuple[int, int]) -> bool:
        """Whether the boxes of an image lie within the first of two sizes (width, height), and not within the other."""
        return self._boxes_fit(position, size) and not self._boxes_fit(position, other)

    def _boxes_fit(self, position: int, size: tuple[int, int]) -> bool:
        """Whether the boxes of an image end within this width and height, but for a pixel."""
        return bool((self.index.boxes_xyxy[self.index.rows(position)][:, 2:] <= np.add(size, 1)).all())

    def take(self, positions: NDArray[np.int64], name: str) -> FolderDataset:
        """Only the images at these positions, under another name."""
        return replace(self, index=self.index.keep_images(positions), name=name)

    def check_files(self) -> None:
        """Raise ValueError where an image is not on disk, or lies where it may not be read.

        No image is opened, and each folder is listed once, which is faster than a look at every file.
        """
        files = [self.index.file(i) for i in range(len(self.index))]
        places = [os.path.split(file.rstrip("/")) for file in files]
        listings = {folder: _listing(self.folder / folder) for folder in {folder for folder, _ in places}}
        missing = [file for file, (folder, name) in zip(files, places, strict=True) if name not in listings[folder]]
        if missing:
            more = f": {NONE_IS_THERE}" if len(missing) == len(files) else ". `steadydetr check` lists all"
            first = printable(missing[0])
            raise ValueError(
                f"{printable(self.name)}: {len(missing)} images are not in {printable(self.folder)}, the first is {first}{more}"
            )
        first_of_folder = {folder: (folder, name) for folder, name in reversed(places)}
        links = [(folder, name) for folder, name in places if listings[folder][name]]
        for folder, name in (*first_of_folder.values(), *links):
            self.data_folder.check_inside(self.folder / folder / name)


def _listing(folder: Path) -> dict[str, bool]:
    """The names in a folder, and which are links; none where it cannot be listed."""
    try:
        return {entry.name: entry.is_symlink() for entry in os.scandir(folder)}
    except (OSError, ValueError):
        return {}


@dataclass(frozen=True)
class Subset:
    """Some images of a data set, or some of its annotations, under a new index."""

    index: AnnotationIndex
    source: Dataset
    positions: NDArray[np.int64]

    @property
    def name(self) -> str:
        return self.source.name

    def load_image(self, position: int) -> NDArray[np.uint8]:
        source, place = place_of(self, position)
        return source.load_image(place)


@dataclass(frozen=True)
class JoinedDataset:
    """Several data sets one after the other."""

    index: AnnotationIndex
    parts: tuple[Dataset, ...]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    def load_image(self, position: int) -> NDArray[np.uint8]:
        source, place = place_of(self, position)
        return source.load_image(place)


@dataclass(frozen=True)
class InChannels:
    """A data set whose images have another number of channels."""

    source: Dataset
    channels: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def index(self) -> AnnotationIndex:
        return self.source.index

    def load_image(self, position: int) -> NDArray[np.uint8]:
        """[H, W, channels]."""
        source, place = place_of(self.source, position)
        if isinstance(source, FolderDataset) and self.channels == 4:
            return replace(source, alpha=True).load_image(place)
        return to_channels(source.load_image(place), self.channels)


def in_channels(dataset: Dataset, channels: int) -> Dataset:
    """The data set with images of so many channels. Raises ValueError where it has none such."""
    if channels == 3:
        return dataset
    found = InChannels(dataset, channels)
    if channels not in (1, 4):
        found.load_image(0)
    return found


def place_of(dataset: Dataset, position: int) -> tuple[Dataset, int]:
    """The data set on disk, or the generated one, that an image comes from, and its position there."""
    if isinstance(dataset, Subset):
        return place_of(dataset.source, int(dataset.positions[position]))
    if isinstance(dataset, JoinedDataset):
        for part in dataset.parts:
            if position < len(part.index):
                return place_of(part, position)
            position -= len(part.index)
        raise IndexError(position)
    return dataset, position


def take_images(dataset: Dataset, positions: NDArray[np.int64], name: str) -> Dataset:
    """Only the images at these positions, in ascending order, under another name where the data set can have one."""
    if isinstance(dataset, FolderDataset):
        return dataset.take(positions, name)
    index = dataset.index.keep_images(positions)
    if isinstance(dataset, JoinedDataset):
        ends = np.cumsum([0, *(len(part.index) for part in dataset.parts)])
        bounds = np.searchsorted(positions, ends)
        parts = (
            take_images(part, positions[low:high] - start, name)
            for part, start, low, high in zip(dataset.parts, ends, bounds, bounds[1:], strict=False)
        )
        return JoinedDataset(index, tuple(parts))
    return Subset(index, dataset, positions)


def parts_of(dataset: Dataset) -> tuple[Dataset, ...]:
    """The data sets on disk, or generated ones, that a data set takes its images from."""
    if isinstance(dataset, Subset | InChannels):
        return parts_of(dataset.source)
    return tuple(p for part in dataset.parts for p in parts_of(part)) if isinstance(dataset, JoinedDataset) else (dataset,)


def join_data(parts: list[Dataset]) -> JoinedDataset:
    return JoinedDataset(join_indices([part.index for part in parts]), tuple(parts))


def for_training(dataset: Dataset, filter_empty: bool = False, limit: int | None = None) -> tuple[Dataset, int]:
    """The data set without crowd regions and boxes that cannot be trained on, and how many of the latter were dropped.

    Where masks were read, annotations without one are left out too; they are not counted.

    Args:
        filter_empty: leave out images that have no object left.
        limit: only the first images.
    """
    usable = dataset.index.usable()
    dropped = int((~usable & ~dataset.index.crowd & ~dataset.index.without_mask).sum())
    index = dataset.index.keep_rows(usable)
    positions = np.flatnonzero(index.counts > 0) if filter_empty else np.arange(len(index))
    positions = positions[:limit]
    if not len(positions):
        raise ValueError(f"{dataset.name} has no image to train on")
    return Subset(index.keep_images(positions), dataset, positions), dropped


def with_classes(dataset: Dataset, classes: tuple[str, ...], category_ids: tuple[int, ...]) -> Dataset:
    """The data set with further classes after its own."""
    index = replace(dataset.index, classes=classes, category_ids=category_ids)
    return Subset(index, dataset, np.arange(len(index)))


def without_images(dataset: Dataset, positions: Collection[int]) -> Dataset:
    """The data set without the images at these positions."""
    if not positions:
        return dataset
    kept = np.setdiff1d(np.arange(len(dataset.index)), list(positions))
    return Subset(dataset.index.keep_images(kept), dataset, kept)


def first_images(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None or limit >= len(dataset.index):
        return dataset
    positions = np.arange(limit)
    return Subset(dataset.index.keep_images(positions), dataset, positions)
