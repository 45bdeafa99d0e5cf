"""Batches: the same images in the same order whatever the number of ranks, micro-batches and workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from steadydetr.boxes import to_cxcywh
from steadydetr.config import changeable
from steadydetr.data.dataset import Dataset
from steadydetr.data.transforms import DetrTransform, EvalTransform, Sample, ShortestSide, TrainTransform, Transform, apply, seeded
from steadydetr.files import Limits
from steadydetr.kinds import register
from steadydetr.structures import Batch, Targets, seed_of


@register("data")
@dataclass(frozen=True)
class DataConfig(Limits):
    """What is trained and evaluated on, what may be read of it, and how it is prepared."""

    source: str = changeable("shapes")  # folder, `shapes`, or several joined by +
    val_source: str = changeable("")  # where validation images come from, if from another place
    train_split: str = "train"
    val_split: str = "val"
    transform: TrainTransform = DetrTransform()
    resize: EvalTransform = ShortestSide()
    filter_empty: bool = False  # leave out training images without objects
    limit: int | None = None  # only the first images of each split, for a trial
    workers: int = changeable(4)  # processes that load images, per rank; 0: none


@dataclass(frozen=True)
class LoadedSample:
    sample: Sample
    image_id: int
    original_size: tuple[int, int]


@dataclass(frozen=True)
class Samples:
    """Map-style source of prepared samples; its keys are (position, seed of the transform)."""

    dataset: Dataset
    transform: Transform

    def __getitem__(self, key: tuple[int, int]) -> LoadedSample:
        position, seed = key
        index, transform = self.dataset.index, self.transform
        with seeded(seed):
            sample = apply(transform.build(), transform.gather(self._load, position, len(index)))
        height, width = index.sizes[position].tolist()
        return LoadedSample(sample, int(index.image_ids[position]), (height, width))

    def _load(self, position: int) -> Sample:
        """The image at `position` as it lies on disk."""
        index = self.dataset.index
        image = torch.from_numpy(self.dataset.load_image(position).copy()).permute(2, 0, 1)
        rows = index.rows(position)
        return Sample(image, torch.from_numpy(index.boxes_xyxy[rows]), torch.from_numpy(index.labels[rows]).long())


def collate(samples: list[LoadedSample]) -> Batch:
    """Images padded at the bottom and right to the largest; boxes normalised by each image's own size."""
    sizes = [(s.sample.image.shape[1], s.sample.image.shape[2]) for s in samples]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    boxes = [
        to_cxcywh(s.sample.boxes_xyxy / torch.tensor((w, h, w, h), dtype=torch.float32)) for s, (h, w) in zip(samples, sizes, strict=True)
    ]
    return Batch(
        images=torch.stack([F.pad(s.sample.image, (0, width - w, 0, height - h)) for s, (h, w) in zip(samples, sizes, strict=True)]),
        padding=torch.stack([_padding(h, w, height, width) for h, w in sizes]),
        targets=Targets(torch.cat([s.sample.labels for s in samples]), torch.cat(boxes), tuple(len(b) for b in boxes)),
        image_ids=tuple(s.image_id for s in samples),
        original_sizes=tuple(s.original_size for s in samples),
    )


def _padding(h: int, w: int, height: int, width: int) -> Tensor:
    padding = torch.ones(height, width, dtype=torch.bool)
    padding[:h, :w] = False
    return padding


def pad_batch(batch: Batch, height: int, width: int) -> Batch:
    """The batch padded further; ranks and micro-batches of a step share one size, because GroupNorm sees the padding."""
    bottom, right = height - batch.images.shape[2], width - batch.images.shape[3]
    if not bottom and not right:
        return batch
    pad = (0, right, 0, bottom)
    return replace(batch, images=F.pad(batch.images, pad), padding=F.pad(batch.padding, pad, value=True))


class TrainLoader:
    """Shuffled training batches, a function of (seed, epoch, step) alone.

    Args:
        batch_size: images per optimiser step, over all ranks and micro-batches.
        accumulation: micro-batches per step on each rank.

    Raises:
        ValueError: `batch_size` is no multiple of world * accumulation, or exceeds the number of images.
    """

    def __init__(
        self, dataset: Dataset, config: DataConfig, batch_size: int, accumulation: int = 1, rank: int = 0, world: int = 1, seed: int = 0
    ) -> None:
        shares = world * accumulation
        if batch_size % shares:
            raise ValueError(f"training.batch_size = {batch_size} does not divide into {world} processes x {accumulation} micro-batches")
        if batch_size > len(dataset.index):
            raise ValueError(f"training.batch_size = {batch_size}, but {dataset.name} has only {len(dataset.index)} images to train on")
        self.dataset, self.config, self.seed = dataset, config, seed
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.steps_per_epoch = len(dataset.index) // batch_size

    def epoch(self, number: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of every step of epoch `number` from `start_step` on; earlier ones are not loaded."""
        order = torch.randperm(len(self.dataset.index), generator=torch.Generator().manual_seed(self._seed(number, 0))).tolist()
        per = self.batch_size // (self.world * self.accumulation)
        keys = []
        for step in range(start_step, self.steps_per_epoch):
            for micro in range(self.accumulation):
                start = step * self.batch_size + (micro * self.world + self.rank) * per
                keys.append([(position, self._seed(number, position + 1)) for position in order[start : start + per]])
        loader = iter(_loader(Samples(self.dataset, self.config.transform), keys, self.config.workers))
        for _ in range(start_step, self.steps_per_epoch):
            yield [next(loader) for _ in range(self.accumulation)]

    def _seed(self, epoch: int, item: int) -> int:
        return seed_of(self.seed, epoch, item)


class EvalLoader:
    """Every image once, in order, dealt to the ranks in turn."""

    def __init__(self, dataset: Dataset, config: DataConfig, batch_size: int = 8, rank: int = 0, world: int = 1) -> None:
        self.dataset, self.config = dataset, config
        positions = range(rank, len(dataset.index), world)
        self.keys = [[(p, 0) for p in positions[i : i + batch_size]] for i in range(0, len(positions), batch_size)]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Batch]:
        return iter(_loader(Samples(self.dataset, self.config.resize), self.keys, self.config.workers))


def _loader(samples: Samples, keys: list[list[tuple[int, int]]], workers: int) -> DataLoader[Batch]:
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=keys,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=min(workers, len(keys), os.cpu_count() or 1),
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore SIGTERM and SIGINT in a loading process.

    Schedulers and Ctrl-C signal the whole process group; if loading processes ended, the trainer could not end its step and save.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
