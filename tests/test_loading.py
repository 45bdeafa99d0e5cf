"""What a batch is made of, and that the processes which load images live as long as the trainer needs them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from steadydetr.data import AnnotationIndex, DataConfig, DetrTransform, EvalLoader, FixedSize, FixedSizeTransform, TrainLoader, for_training
from steadydetr.data.dataset import FolderDataset, first_images, join_data
from steadydetr.data.loading import LoadedSample, Samples, collate, pad_batch
from steadydetr.data.shapes import ShapesConfig, ShapesDataset
from steadydetr.data.transforms import Sample, TrainTransform
from steadydetr.structures import Batch, Targets
from steadydetr.training import preparation, step
from tests.test_train import tiny

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


# Page-locked memory


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is asked for in page-locked memory, which needs a GPU, from now on."""
    asked, empty = list[object](), torch.empty

    def recorded(size: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            asked.append(size)
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", recorded)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append(tensor.numel() * tensor.element_size()) or tensor)
    return asked


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("pin", [True, False])
def test_all_of_a_batch_lies_in_page_locked_memory_if_asked_for(workers: int, pin: bool, pinned: list[object]) -> None:
    loaders = [
        TrainLoader(shapes(), replace(CONFIG, workers=workers), 4, pin=pin),
        EvalLoader(shapes(), replace(CONFIG, workers=workers), pin=pin),
    ]
    batch, other = next(loaders[0].epoch(0))[0], next(iter(loaders[1]))
    for loader in loaders:
        loader.close()
    tensors = [t for b in (batch, other) for t in (b.images, b.padding, b.targets.labels, b.targets.boxes)]
    assert {t.numel() * t.element_size() for t in tensors} <= set(pinned) if pin else not pinned


@pytest.mark.parametrize(("device", "pin"), [("cuda:1", True), ("cpu", False)])
def test_batches_for_a_gpu_are_loaded_so(device: str, pin: bool) -> None:
    accelerator = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, device=torch.device(device))
    recipe = tiny()
    train_data, val_data, _ = preparation.open_for_run(recipe, accelerator, lambda _: None)  # type: ignore[arg-type]
    loaders = preparation.make_loaders(recipe, train_data, val_data, accelerator)  # type: ignore[arg-type]
    assert [loader.pin for loader in loaders] == [pin, pin]


def test_micro_batches_are_padded_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded copy on the host would not be in page-locked memory."""
    on_device = list[int]()
    monkeypatch.setattr(Batch, "to", lambda batch, device: on_device.append(id(new := replace(batch))) or new)
    monkeypatch.setattr(step, "pad_batch", lambda batch, h, w: on_device.remove(id(batch)) or pad_batch(batch, h, w))
    run: Any = SimpleNamespace(
        loader=SimpleNamespace(batch_size=2),
        accelerator=SimpleNamespace(num_processes=1, device="cpu"),
        state=SimpleNamespace(step=3),
        recipe=SimpleNamespace(training=SimpleNamespace(seed=5)),
        asked_to_stop=False,
    )
    stop, found = step.synchronise_step(run, [collate([sample(10, 12, [], 1)]), collate([sample(8, 20, [[0, 0, 4, 4]], 2)])])
    assert not stop and [tuple(batch.images.shape[-2:]) for batch in found] == [(10, 20)] * 2
    assert [(batch.step, batch.seed, batch.global_totals.images) for batch in found] == [(3, 5, 2)] * 2


# Batches of like proportions


@dataclass(frozen=True)
class Blank:
    """Images of these sizes, all zeros."""

    sizes: tuple[tuple[int, int], ...]
    name: str = "blank"

    @property
    def index(self) -> AnnotationIndex:
        count = len(self.sizes)
        return AnnotationIndex.build(
            image_ids=range(count),
            files=[f"{number}.png" for number in range(count)],
            sizes=self.sizes,
            counts=[1] * count,
            boxes_xyxy=[[0, 0, 5, 5]] * count,
            labels=[0] * count,
            classes=("nut",),
            category_ids=(1,),
        )

    def load_image(self, position: int) -> NDArray[np.uint8]:
        return np.zeros((*self.sizes[position], 3), np.uint8)


SIZES = ((30, 40), (40, 30), (10, 40), (30, 40), (33, 33)) * 9  # 45 images
GROUPED = DataConfig(transform=DetrTransform((24,), 80, crop=False), workers=0, group_by_shape=True)


def orders(epoch: int, config: DataConfig = GROUPED, start: int = 0, **options: Any) -> list[list[int]]:
    """The images of every step."""
    loader = TrainLoader(Blank(SIZES), config, 4, **options)
    return [[i for batch in step for i in batch.image_ids] for step in loader.epoch(epoch, start)]  # type: ignore[misc]


def test_batches_hold_images_of_like_proportions_and_all_that_they_held_before() -> None:
    for epoch in range(3):
        plain, found = orders(epoch, replace(GROUPED, group_by_shape=False)), orders(epoch)
        assert sorted(chain(*found)) == sorted(chain(*plain)) and [len(images) for images in found] == [4] * 11
        mixed = [images for images in found if len({SIZES[i][1] / SIZES[i][0] for i in images}) > 1]
        assert len(mixed) <= 3  # what no whole batch takes of four groups
        proportions = [SIZES[images[0]][1] / SIZES[images[0]][0] for images in found]
        assert proportions[:8] != sorted(proportions[:8])


def test_groups_are_a_function_of_seed_and_step() -> None:
    assert len({str(orders(epoch, seed=seed)) for epoch in range(2) for seed in range(2)}) == 4
    assert sorted(map(sorted, orders(0))) != sorted(map(sorted, orders(1)))  # images meet others
    assert orders(1, start=4) == orders(1)[4:] and orders(0, epoch_steps=30)[11:22] == orders(1)
    ranks = [orders(1, accumulation=2, rank=rank, world=2) for rank in (0, 1)]
    assert [[a[0], b[0], a[1], b[1]] for a, b in zip(*ranks, strict=True)] == orders(1)
    assert orders(1, replace(GROUPED, workers=1)) == orders(1)


def test_groups_save_padding() -> None:
    def padding(config: DataConfig) -> float:
        batches = [b for step in TrainLoader(Blank(SIZES), config, 4).epoch(0) for b in step]
        return sum(float(b.padding.sum()) for b in batches) / sum(b.padding.numel() for b in batches)

    assert padding(GROUPED) < padding(replace(GROUPED, group_by_shape=False)) / 2


# JPEG files at a part of their size


@dataclass(frozen=True)
class Unknown(TrainTransform):
    """It does not say by how much it enlarges an image."""

    def build(self) -> Any:
        return FixedSizeTransform(8, 8).build()


def noise(root: Path, name: str, height: int = 100, width: int = 150) -> FolderDataset:
    """One image of smooth noise with a box."""
    small = np.random.default_rng(0).integers(0, 256, (10, 15, 3), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(root / name, quality=95)
    index = replace(Blank(((height, width),)).index, boxes_xyxy=np.array([[15, 25, 75, 50]], np.float32))
    index = replace(index, file_bytes=np.frombuffer(name.encode(), np.uint8), file_offsets=np.array([0, len(name)]))
    return FolderDataset(index, root, "noise")


REDUCED = {
    1: [FixedSizeTransform(51, 40), FixedSizeTransform(40, 76), DetrTransform(), Unknown(), FixedSizeTransform(40, 50, zoom=0.7)],
    2: [
        FixedSizeTransform(50, 75),
        FixedSizeTransform(26, 20),
        DetrTransform((40,), 60, crop=False),
        FixedSizeTransform(25, 30, transpose=0.5),
    ],
    4: [FixedSizeTransform(25, 20), FixedSizeTransform(20, 16, zoom=0.8)],
    8: [FixedSizeTransform(12, 18), FixedSizeTransform(3, 3)],
}


@pytest.mark.parametrize(("reduction", "transform"), [(k, t) for k, transforms in REDUCED.items() for t in transforms], ids=str)
def test_a_jpeg_is_never_reduced_below_what_the_transform_needs(reduction: int, transform: TrainTransform, tmp_path: Path) -> None:
    data = noise(tmp_path, "a.jpg")
    sample = Samples(data, transform, reduce=True)._load(0)
    assert sample.image.shape[1:] == (-(-100 // reduction), -(-150 // reduction))
    assert (sample.boxes_xyxy * reduction).tolist() == [[15, 25, 75, 50]]
    assert Samples(data, transform)._load(0).image.shape[1:] == (100, 150)


def test_reduced_images_and_their_boxes_are_those_of_the_whole_ones_nearly(tmp_path: Path) -> None:
    """Of parts and of joined data sets, too, and what is no JPEG file is read as it is."""
    (tmp_path / "b").mkdir()
    data = join_data([noise(tmp_path, "a.png"), noise(tmp_path / "b", "b.jpg", 96, 144)])
    train = for_training(first_images(data, 2))[0]
    exact, fast = (Samples(train, FixedSizeTransform(24, 36, flip=0.0), reduce=reduce) for reduce in (False, True))
    assert [fast._load(position).image.shape[1] for position in (0, 1)] == [100, 24]
    for position in (0, 1):
        a, b = exact[position, 0], fast[position, 0]
        assert (a.sample.image.float() - b.sample.image.float()).abs().mean() < 4 and a.original_size == b.original_size
        assert torch.equal(a.sample.boxes_xyxy, b.sample.boxes_xyxy)
    assert torch.equal(exact[0, 0].sample.image, fast[0, 0].sample.image)


def test_only_training_images_are_reduced_and_only_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, asked, load = noise(tmp_path, "a.jpg"), list[int](), FolderDataset.load_image
    record: Callable[..., Any] = lambda self, position, reduction=1: asked.append(reduction) or load(self, position, reduction)  # noqa: E731
    monkeypatch.setattr(FolderDataset, "load_image", record)
    for decode in ("exact", "fast"):
        config = DataConfig(transform=FixedSizeTransform(25, 20), resize=FixedSize(25, 20), workers=0, decode=decode)  # type: ignore[arg-type]
        list(TrainLoader(data, config, 1).epoch(0)), list(EvalLoader(data, config))
    assert asked == [1, 1, 4, 1]
    with pytest.raises(ValueError, match=r"data\.decode = 'quick' must be exact or fast"):
        DataConfig(decode="quick")  # type: ignore[arg-type]
