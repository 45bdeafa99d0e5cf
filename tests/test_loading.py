"""What a batch is made of, and that the processes which load images live as long as the trainer needs them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from steadydetr.data import DataConfig, EvalLoader, FixedSize, FixedSizeTransform, TrainLoader, for_training
from steadydetr.data.loading import LoadedSample, Samples, collate, pad_batch
from steadydetr.data.shapes import ShapesConfig, ShapesDataset
from steadydetr.data.transforms import Sample
from steadydetr.structures import Targets

CONFIG = DataConfig(transform=FixedSizeTransform(64, 64, flip=0.0), resize=FixedSize(32, 64), workers=0)


def shapes(images: int = 12) -> ShapesDataset:
    return for_training(ShapesDataset(ShapesConfig(size=64, images=images), "train"))[0]  # type: ignore[return-value]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_loaders_leave_signals_to_the_trainer(number: signal.Signals) -> None:
    """Schedulers and Ctrl-C signal the whole group: the trainer still gets the batches of the step that it wants to finish."""
    before = set(multiprocessing.active_children())
    batches = TrainLoader(shapes(), replace(CONFIG, workers=2), 2).epoch(0)
    next(batches), next(batches)  # one of each process, so that both have begun
    loaders = set(multiprocessing.active_children()) - before
    assert loaders
    for loader in loaders:
        os.kill(loader.pid, number)  # type: ignore[arg-type]
    for loader in loaders:
        loader.join(0.3)
        assert loader.is_alive()
    assert len(list(batches)) == 4


def sample(height: int, width: int, boxes: list[list[float]], image_id: int) -> LoadedSample:
    image = torch.full((3, height, width), image_id, dtype=torch.uint8)
    return LoadedSample(
        Sample(image, torch.tensor(boxes).view(-1, 4), torch.arange(len(boxes)) + image_id), image_id, (2 * height, 2 * width)
    )


def test_images_are_padded_below_and_right_and_boxes_are_shares_of_their_own_image() -> None:
    batch = collate([sample(10, 40, [[4, 1, 12, 5], [0, 0, 40, 10]], 7), sample(20, 30, [], 8), sample(20, 40, [[10, 5, 30, 15]], 9)])
    assert batch.images.shape == (3, 3, 20, 40) and batch.padding.shape == (3, 20, 40)
    for image, (height, width) in enumerate([(10, 40), (20, 30), (20, 40)]):
        assert (batch.images[image, :, :height, :width] == 7 + image).all() and not batch.padding[image, :height, :width].any()
        assert batch.padding[image].sum() == 800 - height * width and batch.images[image].sum() == 3 * (7 + image) * height * width
    expected = [[8 / 40, 3 / 10, 8 / 40, 4 / 10], [0.5, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5]]
    torch.testing.assert_close(batch.targets.boxes, torch.tensor(expected))
    assert batch.targets.counts == (2, 0, 1) and batch.targets.labels.tolist() == [7, 8, 9]
    assert batch.image_ids == (7, 8, 9) and batch.original_sizes == ((20, 80), (40, 60), (40, 80))


def test_further_padding_is_marked_and_none_changes_nothing() -> None:
    batch = collate([sample(10, 12, [[0, 0, 6, 5]], 1)])
    assert pad_batch(batch, 10, 12) is batch
    for height, width in ((16, 12), (10, 20), (16, 20)):
        larger = pad_batch(batch, height, width)
        assert larger.images.shape[-2:] == larger.padding.shape[-2:] == (height, width)
        assert torch.equal(larger.images[..., :10, :12], batch.images) and larger.images.sum() == batch.images.sum()
        assert not larger.padding[:, :10, :12].any() and larger.padding.sum() == height * width - 120
        assert larger.targets is batch.targets


def test_a_sample_is_the_image_of_the_data_set_with_its_objects() -> None:
    data = shapes()
    loaded = Samples(data, FixedSize(64, 64))[5, 0]
    assert np.array_equal(loaded.sample.image.permute(1, 2, 0).numpy(), data.load_image(5))
    rows = data.index.rows(5)
    assert np.array_equal(loaded.sample.boxes_xyxy.numpy(), data.index.boxes_xyxy[rows])
    assert loaded.sample.labels.tolist() == data.index.labels[rows].tolist() and loaded.sample.labels.dtype == torch.int64
    assert loaded.image_id == data.index.image_ids[5]
    assert Samples(data, FixedSize(32, 48))[5, 0].original_size == (64, 64)


def test_an_epoch_holds_every_image_once_and_another_epoch_or_seed_another_order() -> None:
    def order(epoch: int, **options: int) -> list[int]:
        return [i for step in TrainLoader(shapes(13), CONFIG, 4, **options).epoch(epoch) for batch in step for i in batch.image_ids]

    first = order(0)
    assert len(first) == len(set(first)) == 12  # the last step is not begun without its images
    assert len({tuple(order(epoch, seed=seed)) for epoch in range(2) for seed in range(2)}) == 4
    assert order(0, accumulation=2) == first


def test_an_image_is_augmented_anew_in_every_epoch() -> None:
    config = replace(CONFIG, transform=FixedSizeTransform(64, 64, flip=0.5))

    def boxes(epoch: int, seed: int) -> dict[int, torch.Tensor]:
        batches = (batch for step in TrainLoader(shapes(), config, 4, seed=seed).epoch(epoch) for batch in step)
        return {i: part.boxes for batch in batches for i, part in zip(batch.image_ids, batch.targets.split(), strict=True)}

    first = boxes(0, 0)
    for epoch, seed in ((1, 0), (0, 1)):
        other = boxes(epoch, seed)
        alike = [torch.equal(first[i], other[i]) for i in first]
        assert 0 < sum(alike) < len(alike)
    turned = [torch.allclose(part.boxes[:, 0], first[i][:, 0]) for i, part in zip(first, _as_they_are(list(first)), strict=True)]
    assert 0 < sum(turned) < len(turned)  # images of an epoch have draws of their own


def _as_they_are(image_ids: list[int]) -> list[Targets]:
    found: dict[int, Targets] = {}
    for batch in EvalLoader(shapes(), replace(CONFIG, resize=FixedSize(64, 64))):
        found |= dict(zip(batch.image_ids, batch.targets.split(), strict=True))
    return [found[i] for i in image_ids]


def test_draws_are_those_of_earlier_versions() -> None:
    """A run that is resumed under another version sees the images that it would have seen: their order, and which are flipped."""
    config = replace(CONFIG, transform=FixedSizeTransform(64, 64, flip=0.5))
    batches = [batch for step in TrainLoader(shapes(), config, 4, seed=3).epoch(1) for batch in step]
    order = [i for batch in batches for i in batch.image_ids]
    drawn = [part.boxes for batch in batches for part in batch.targets.split()]
    flipped = [i for i, boxes, plain in zip(order, drawn, _as_they_are(order), strict=True) if not torch.allclose(boxes, plain.boxes)]
    assert order == [8, 7, 3, 6, 2, 1, 4, 5, 11, 10, 12, 9] and flipped == [8, 7, 6, 1, 5, 11, 10, 12]


@pytest.mark.parametrize(("size", "shares"), [(4, 1), (4, 2), (12, 1)])
def test_batch_sizes_that_divide_are_accepted(size: int, shares: int) -> None:
    assert TrainLoader(shapes(), CONFIG, size, shares).steps_per_epoch == 12 // size


def test_batch_sizes_that_do_not_divide_or_exceed_the_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size = 4 does not divide into 2 processes x 4 micro-batches"):
        TrainLoader(shapes(), CONFIG, 4, accumulation=4, world=2)
    with pytest.raises(ValueError, match=r"batch_size = 13, but .* has only 12 images"):
        TrainLoader(shapes(), CONFIG, 13)


def test_evaluation_deals_every_image_once_in_order_to_the_ranks() -> None:
    whole = EvalLoader(shapes(7), CONFIG, 3)
    assert len(whole) == 3 and [batch.image_ids for batch in whole] == [(1, 2, 3), (4, 5, 6), (7,)]
    assert next(iter(whole)).images.shape[-2:] == (32, 64)
    assert [batch.image_ids for batch in EvalLoader(shapes(7), CONFIG, 2, rank=1, world=2)] == [(2, 4), (6,)]
    assert [len(EvalLoader(shapes(images), CONFIG)) for images in (16, 17)] == [2, 3]  # 8 images at a time
