"""Batches: the same images in the same order whatever the number of ranks, micro-batches and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from steadydetr.boxes import to_cxcywh
from steadydetr.data.config import DataConfig
from steadydetr.data.dataset import Dataset, FolderDataset, place_of
from steadydetr.data.loading_processes import LoadingProcesses, check_script, cpu_share
from steadydetr.data.transforms import Sample, TrainTransform, Transform, apply, seeded
from steadydetr.files import listed, printable
from steadydetr.structures import Batch, Targets, seed_of

Key = tuple[int, int]  # position of an image, seed of its transform


REDUCTIONS = (1, 2, 4, 8)  # of a JPEG file's sides, at which it can be decoded
PROPORTIONS = tuple(2 ** (power / 2) for power in (-1.5, -0.5, 0.5, 1.5))  # width / height between the groups of `group_by_shape`
READ_AT_ONCE = 32  # images that a loading process looks at before it answers


@dataclass(frozen=True)
class LoadedSample:
    """A transformed image with its objects, its id in the data, and the (height, width) that it had."""

    sample: Sample
    image_id: int | str
    original_size: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the transformed image."""
        height, width = self.sample.image.shape[-2:]
        return height, width


@dataclass(frozen=True)
class Samples:
    """The transformed images of a data set, by key. Any exception while one is loaded becomes a ValueError that names its file."""

    dataset: Dataset
    transform: Transform
    reduce: bool = False  # JPEG files to train on are decoded at 1/2, 1/4 or 1/8 of their size where the transform needs no more
    masks: bool = False  # with the masks of objects

    def batch(self, keys: Sequence[Key]) -> Batch:
        """The batch of these images; loading processes call this."""
        return collate([self[key] for key in keys])

    def names(self, keys: Sequence[Key]) -> str:
        """The files that these keys stand for, as error messages list them."""
        return listed((printable(self.dataset.index.file(position)) for position, _ in keys), 4)

    def __getitem__(self, key: Key) -> LoadedSample:
        position, seed = key
        index, transform = self.dataset.index, self.transform
        try:
            with seeded(seed):
                sample = apply(transform.build(), transform.gather(self._load, position, len(index)))
            if self.masks and (sample.masks is None or len(sample.masks) != len(sample.labels)):
                raise TypeError(f"{type(transform).__name__} leaves out the masks of objects, or some of them: its `Sample` must have them")
        except Exception as error:
            file, message = index.file(position), " ".join(str(error).split())
            if isinstance(error, ValueError) and file in message:
                raise
            raise ValueError(f"{self.dataset.name}: {printable(file)} cannot be prepared: {type(error).__name__}: {message}") from error
        height, width = index.sizes[position].tolist()
        return LoadedSample(sample, index.image_ids.item(position), (height, width))

    def _load(self, position: int) -> Sample:
        """The image at `position` as it lies on disk, or, reduced, a share of its pixels, with boxes in these."""
        index, rows = self.dataset.index, self.dataset.index.rows(position)
        pixels, reduction = self._pixels(position)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        masks = self._masks(position, reduction, pixels.shape[:2]) if self.masks else None
        return Sample(image, torch.from_numpy(index.boxes_xyxy[rows]) / reduction, torch.from_numpy(index.labels[rows]).long(), masks)

    def _masks(self, position: int, reduction: int, shape: tuple[int, ...]) -> Tensor:
        """[n, *shape] uint8: the masks of an image's objects, of a reduced one the middle of what each pixel stands for."""
        masks = self.dataset.index.decode_masks(position).view(np.uint8)
        if reduction > 1:
            rows, columns = (
                np.minimum(np.arange(side) * reduction + reduction // 2, whole - 1)
                for side, whole in zip(shape, masks.shape[1:], strict=True)
            )
            masks = masks[:, rows[:, None], columns]
        return torch.from_numpy(masks)

    def _pixels(self, position: int) -> tuple[NDArray[np.uint8], int]:
        """The pixels [H, W, 3] of an image, and of how many rows and columns of the file each of them is."""
        source, place = place_of(self.dataset, position)
        reduction = self._reduction(position)
        if reduction == 1 or not isinstance(source, FolderDataset):
            return source.load_image(place), 1
        pixels = source.load_image(place, reduction)
        return pixels, 1 if pixels.shape[:2] == tuple(self.dataset.index.sizes[position]) else reduction  # 1: it is no JPEG file

    def _reduction(self, position: int) -> int:
        """The largest of 1, 2, 4 and 8 by which an image can be made smaller before the transform without its enlarging any part of it."""
        if not self.reduce or not isinstance(self.transform, TrainTransform):
            return 1
        scale = self.transform.largest_scale(self.dataset.index.sizes[[position]])
        return 1 if scale is None else max(reduction for reduction in REDUCTIONS if reduction == 1 or reduction * scale.max() <= 1)


@dataclass(frozen=True)
class Reading:
    """What loading processes do to find images that cannot be read."""

    dataset: Dataset

    def faults(self, positions: Sequence[int]) -> list[tuple[int, str]]:
        """The positions whose images cannot be loaded, with the reasons."""
        found = []
        for position in positions:
            try:
                self.dataset.load_image(position)
            except (ValueError, OSError) as error:
                found.append((position, str(error)))
        return found

    def names(self, positions: Sequence[int]) -> str:
        return listed((printable(self.dataset.index.file(position)) for position in positions), 4)


def find_unreadable(dataset: Dataset, config: DataConfig) -> dict[int, str]:
    """Why images cannot be read, by their positions. All are decoded once, by loading processes."""
    reading, count = Reading(dataset), len(dataset.index)
    tasks = [range(start, min(start + READ_AT_ONCE, count)) for start in range(0, count, READ_AT_ONCE)]
    workers = min(config.workers, len(tasks), cpu_share())
    if not workers:
        return dict(reading.faults(range(count)))
    check_script()
    with closing(LoadingProcesses(reading.faults, reading.names, workers, config.timeout)) as processes:
        return dict(chain.from_iterable(processes.map(tasks)))


def collate(samples: list[LoadedSample]) -> Batch:
    """Images padded at the bottom and right to the largest; boxes normalised by each image's own size."""
    sizes = [sample.size for sample in samples]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    images = samples[0].sample.image.new_zeros(len(samples), *samples[0].sample.image.shape[:-2], height, width)
    padding = torch.ones(len(samples), height, width, dtype=torch.bool)
    for image, mask, s, (h, w) in zip(images, padding, samples, sizes, strict=True):
        image[:, :h, :w] = s.sample.image
        mask[:h, :w] = False
    boxes = [
        to_cxcywh(s.sample.boxes_xyxy / torch.tensor((w, h, w, h), dtype=torch.float32)) for s, (h, w) in zip(samples, sizes, strict=True)
    ]
    return Batch(
        images=images,
        padding=padding,
        targets=Targets(
            torch.cat([s.sample.labels for s in samples]),
            torch.cat(boxes),
            tuple(len(b) for b in boxes),
            _padded_masks(samples, height, width),
        ),
        image_ids=tuple(s.image_id for s in samples),
        original_sizes=tuple(s.original_size for s in samples),
    )


def _padded_masks(samples: Sequence[LoadedSample], height: int, width: int) -> Tensor | None:
    """[G, height, width] the masks of all samples, padded as their images are; None where one has none."""
    masks = [s.sample.masks for s in samples if s.sample.masks is not None]
    if len(masks) < len(samples):
        return None
    padded = masks[0].new_zeros(sum(map(len, masks)), height, width)
    for part, some in zip(padded.split([len(some) for some in masks]), masks, strict=True):
        part[:, : some.shape[1], : some.shape[2]] = some
    return padded


def batches_of_one_size(sizes: Iterable[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Positions of images, in batches of one size, in the order of their first images.

    Such batches need no padding, which norms, feature maps and attention would see, so that the detections in an image would depend on
    the other images of its batch (D-98).

    Args:
        sizes: (height, width) of every image.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for position, size in enumerate(sizes):
        by_size.setdefault(size, []).append(position)
    return sorted(same[i : i + batch_size] for same in by_size.values() for i in range(0, len(same), batch_size))


def pad_batch(batch: Batch, height: int, width: int) -> Batch:
    """The batch padded further; ranks and micro-batches of a step share one size, because GroupNorm sees the padding."""
    bottom, right = height - batch.images.shape[2], width - batch.images.shape[3]
    if not bottom and not right:
        return batch
    pad, masks = (0, right, 0, bottom), batch.targets.masks
    targets = batch.targets if masks is None else replace(batch.targets, masks=F.pad(masks, pad))
    return replace(batch, images=F.pad(batch.images, pad), padding=F.pad(batch.padding, pad, value=True), targets=targets)


class Loader:
    """Loads batches, in processes that live as long as the loader does, or until it is closed; they are started when first needed."""

    def __init__(
        self, dataset: Dataset, transform: Transform, config: DataConfig, batches: int, pin: bool = False, masks: bool = False
    ) -> None:
        """
        Args:
            batches: how many are loaded in one pass.
            pin: into page-locked memory, from which a GPU copies while the host goes on.
            masks: whether the targets have masks, where the data set does.
        """
        self.dataset, self.config, self.pin = dataset, config, pin
        self.samples = Samples(dataset, transform, config.decode == "fast", masks and dataset.index.masks is not None)
        self.workers = min(config.workers, batches, cpu_share())
        self.processes: LoadingProcesses[Sequence[Key], Batch] | None = None
        if self.workers:
            check_script()

    def load(self, keys: Iterable[Sequence[Key]], stopped: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """The batches of these keys, in order.

        Args:
            stopped: called while a batch of a loading process is waited for; the batches end if it returns True.
        """
        if not self.workers:
            return (batch.pin_memory() if self.pin else batch for batch in map(self.samples.batch, keys))
        if self.processes is None or self.processes.closed:
            self.processes = LoadingProcesses(self.samples.batch, self.samples.names, self.workers, self.config.timeout, self.pin)
        return self.processes.map(keys, stopped)

    def close(self) -> None:
        """End the loading processes. The loader can be used again, and then starts others."""
        if self.processes is not None:
            self.processes.close()


class TrainLoader(Loader):
    """Shuffled training batches, a function of seed and step alone.

    Args:
        batch_size: images per optimiser step, over all ranks and micro-batches.
        accumulation: micro-batches per step on each rank.
        epoch_steps: of an epoch, which then goes over a part of the data, or over more than once; 0: one pass.
        pin: into page-locked memory.

    Raises:
        ValueError: `batch_size` is no multiple of world * accumulation, or exceeds the number of images.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        epoch_steps: int = 0,
        pin: bool = False,
    ) -> None:
        shares = world * accumulation
        if batch_size % shares:
            raise ValueError(f"training.batch_size = {batch_size} does not divide into {world} processes x {accumulation} micro-batches")
        if batch_size > len(dataset.index):
            raise ValueError(f"training.batch_size = {batch_size}, but {dataset.name} has only {len(dataset.index)} images to train on")
        self.batch_size, self.accumulation, self.rank, self.world, self.seed = batch_size, accumulation, rank, world, seed
        self.steps_per_pass = len(dataset.index) // batch_size
        self.steps_per_epoch = epoch_steps or self.steps_per_pass
        super().__init__(dataset, config.transform, config, self.steps_per_epoch * accumulation, pin, masks=True)

    def epoch(self, number: int, start_step: int = 0, stopped: Callable[[], bool] = lambda: False) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step of epoch `number` from `start_step` on; earlier ones are not loaded.

        Once `stopped` returns True, nothing is waited for any more, so that a step may come with fewer batches, or none.
        """
        loaded = self.load(self._keys(number, start_step), stopped)
        for _ in range(start_step, self.steps_per_epoch):
            yield list(islice(loaded, self.accumulation))

    def _keys(self, epoch: int, start_step: int) -> Iterator[list[Key]]:
        """The keys of every micro-batch of this rank, one after the other."""
        per, order, before = self.batch_size // (self.world * self.accumulation), list[int](), -1
        for step in range(epoch * self.steps_per_epoch + start_step, (epoch + 1) * self.steps_per_epoch):
            number, step_of_pass = divmod(step, self.steps_per_pass)
            if number != before:
                order, before = self._order(number), number
            for micro in range(self.accumulation):
                start = step_of_pass * self.batch_size + (micro * self.world + self.rank) * per
                yield [(position, self._seed(number, position + 1)) for position in order[start : start + per]]

    def _order(self, number: int) -> list[int]:
        """The positions of all images in the order of a pass."""
        generator = torch.Generator().manual_seed(self._seed(number, 0))
        order = torch.randperm(len(self.dataset.index), generator=generator)
        return (self._grouped(order, generator) if self.config.group_by_shape else order).tolist()

    def _grouped(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """The images of a pass in an order whose batches hold images of like proportions, and these batches in an order of their own.

        What no batch of a group takes is joined group by group, so that as many images are seen as without groups, and the same ones.
        """
        order = order[: self.steps_per_pass * self.batch_size]
        height, width = torch.from_numpy(self.dataset.index.sizes)[order].double().T
        groups = torch.bucketize(width / height, torch.tensor(PROPORTIONS).double())
        of_groups = [order[groups == group] for group in range(len(PROPORTIONS) + 1)]
        whole = [len(images) // self.batch_size * self.batch_size for images in of_groups]
        parts = [images[:n] for images, n in zip(of_groups, whole, strict=True)] + [
            images[n:] for images, n in zip(of_groups, whole, strict=True)
        ]
        batches = torch.cat(parts).view(-1, self.batch_size)
        return batches[torch.randperm(len(batches), generator=generator)].flatten()

    def _seed(self, number: int, item: int) -> int:
        """Of the order of a pass (item 0), or of the augmentation of an image in it."""
        return seed_of(self.seed, number, item)


class EvalLoader(Loader):
    """Every image once, dealt to the ranks in turn, in batches of images of one size; it can be gone through again."""

    def __init__(
        self,
        dataset: Dataset,
        config: DataConfig,
        batch_size: int = 8,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
        masks: bool = False,
    ) -> None:
        resized = cache(config.resize.resized)
        positions = range(rank, len(dataset.index), world)
        sizes = [resized((height, width)) for height, width in dataset.index.sizes[rank::world].tolist()]
        self.keys = [[(positions[i], 0) for i in batch] for batch in batches_of_one_size(sizes, batch_size)]
        super().__init__(dataset, config.resize, config, len(self.keys), pin, masks)

    @property
    def positions(self) -> list[int]:
        """The positions of the images in the data set, in the order in which they are loaded."""
        return [position for keys in self.keys for position, _ in keys]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Batch]:
        return self.load(self.keys)
