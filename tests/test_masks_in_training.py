"""Masks on their way to a training step: they go with pixels and boxes through every transform, into batches and between processes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from steadydetr.data import DataConfig, EvalLoader, TrainLoader, open_data
from steadydetr.data.check import check_data
from steadydetr.data.dataset import for_training
from steadydetr.data.loading import Samples, collate, pad_batch
from steadydetr.data.masks import EncodedMasks, Masks, fill_polygons
from steadydetr.data.transforms import (
    DetrTransform,
    FixedSize,
    FixedSizeTransform,
    LargeScaleJitter,
    Sample,
    ShortestSide,
    TrainTransform,
    Transform,
    _usable_objects,
    apply,
    seeded,
)
from steadydetr.structures import Targets
from tests.data_folders import picture
from tests.test_layouts_b import labelme_with, shape
from tests.test_trainable import said

TRANSFORMS: list[Transform] = [
    DetrTransform((70, 100), 160, crop=False),
    DetrTransform((70, 100), 160),
    DetrTransform((100,), 160, zoom_out=3.0, zoom=0.3),
    FixedSizeTransform(80, 60),
    FixedSizeTransform(80, 60, transpose=0.5, zoom=0.4),
    LargeScaleJitter(96),
    LargeScaleJitter(96, 1.5, 2.0),
    FixedSize(40, 90),
    ShortestSide(50, 70),
]
HEIGHT, WIDTH = 87, 120


def blobs(seed: int, count: int = 3) -> Tensor:
    """[count, HEIGHT, WIDTH] turned rectangles and ellipses, by pycocotools from polygons."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        turned = rng.uniform(0, 7) + np.arange(4) * np.pi / 2
        angles = turned if rng.random() < 0.5 else np.sort(rng.uniform(0, 2 * np.pi, rng.integers(8, 16)))
        radii, centre = rng.uniform(12, 35, 2), rng.uniform((15, 15), (WIDTH - 15, HEIGHT - 15))
        polygon = np.stack((np.cos(angles) * radii[0] + centre[0], np.sin(angles) * radii[1] + centre[1]), 1).flatten()
        found.append(reference.decode(reference.frPyObjects([polygon.tolist()], HEIGHT, WIDTH))[:, :, 0])
    return torch.from_numpy(np.stack(found))


def tight(masks: Tensor) -> Tensor:
    """[n, 4] where masks begin and end."""
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1
    return boxes


def sample_of(masks: Tensor) -> Sample:
    """The image shows each mask as a channel."""
    return Sample(masks[:3] * 255, tight(masks), torch.arange(len(masks)), masks)


def near_edge(mask: Tensor, pixels: int = 2) -> Tensor:
    """[H, W] within so many pixels of the edge of a mask."""
    kernel, shown = 2 * pixels + 1, mask[None, None].float()
    grown, shrunk = (sign * torch.nn.functional.max_pool2d(sign * shown, kernel, 1, pixels)[0, 0] for sign in (1, -1))
    return grown != shrunk


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{type(t).__name__}-{TRANSFORMS.index(t)}")
def test_masks_go_where_their_pixels_and_boxes_go(transform: Transform) -> None:
    """But for pixels at an edge that resizing makes grey. Boxes stay as tight as they were, and random numbers are those without masks."""
    dropped = wrong = 0
    for seed in range(10):
        before = sample_of(blobs(seed))
        with seeded(seed):
            after = apply(transform.build(), before)
        with seeded(seed):
            plain = apply(transform.build(), replace(before, masks=None))
        assert torch.equal(after.image, plain.image) and after.masks is not None and plain.masks is None
        assert after.masks.dtype == torch.uint8 and after.masks.shape == (len(after.labels), *after.image.shape[1:])
        dropped += len(plain.labels) - len(after.labels)
        for label, mask in zip(after.labels.tolist(), after.masks, strict=True):
            wrong += int((((after.image[label] >= 128) != mask.bool()) & ~near_edge(mask)).sum())
        filled = after.masks.flatten(1).any(1).bool()
        off = (tight(after.masks[filled]) - after.boxes_xyxy[filled]).abs().max() if filled.any() else torch.zeros(())
        assert off < 4, (seed, off)
    assert wrong == 0 and dropped <= 1


@pytest.mark.parametrize("size", [(29, 40), (30, 41), (44, 61)])
def test_resized_masks_are_not_moved(size: tuple[int, int]) -> None:
    """torchvision's own take the first pixel of those that become one, which is half of one further to the right and below."""
    masks = torch.cat([blobs(seed) for seed in range(10)])
    after = apply(FixedSize(*size).build(), sample_of(masks)).masks
    assert after is not None
    moved = []
    for mask, other in zip(masks, after, strict=True):
        before, now = ((one.nonzero().float() + 0.5).mean(0) / torch.tensor(one.shape) for one in (mask, other))
        moved.append((now - before) * torch.tensor(size))
    assert torch.stack(moved).mean(0).abs().max() < 0.05  # pixels


@given(st.integers(0, 10**6), st.sampled_from(TRANSFORMS))
@settings(max_examples=12, deadline=None)
def test_each_mask_is_transformed_as_if_it_were_alone(seed: int, transform: Transform) -> None:
    """Whatever the others are: random ones of single pixels and none at all among them."""
    generator = torch.Generator().manual_seed(seed)
    single, none = (torch.rand(1, HEIGHT, WIDTH, generator=generator) < share for share in (0.3, 0.0))
    masks = torch.cat((blobs(seed, 2), single.byte(), none.byte()))
    boxes = torch.tensor([0.0, 0, WIDTH, HEIGHT]).expand(4, 4)
    with seeded(seed):
        together = apply(transform.build(), Sample(masks[:3], boxes, torch.arange(4), masks))
    assert together.masks is not None
    for k, mask in enumerate(masks):
        with seeded(seed):
            alone = apply(transform.build(), Sample(masks[:3], boxes, torch.arange(4), mask.expand(4, -1, -1)))
        found = together.masks[together.labels == k]
        assert alone.masks is not None and len(found) <= 1
        assert torch.equal(found, alone.masks[alone.labels == k]) and (len(alone.masks) or not len(found))
    if isinstance(transform, TrainTransform):
        assert 3 not in together.labels.tolist()  # no pixel is left of it


class Window(v2.Transform):
    """44 rows from the 17th on, of the left half."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, 16, 0, 44, 60)


def test_an_object_without_a_pixel_left_is_dropped_and_a_cut_one_gets_the_box_of_its_rest() -> None:
    """A frame with a disc at its right: of a window of the left half the disc's box, but no pixel, is in it."""
    masks = torch.zeros(2, 60, 120, dtype=torch.uint8)
    masks[0, 10:20, 100:110] = 1
    masks[1, 5:15, 20:110] = masks[1, 5:50, 20:30] = 1  # an angle, whose lower part is left of the cut
    boxes = torch.tensor([[10.0, 10, 110, 20], [20, 5, 110, 50]])  # the first one far too wide
    sample = Sample(torch.zeros(3, 60, 120, dtype=torch.uint8), boxes, torch.tensor([7, 8]), masks)
    after = apply(v2.Compose([Window(), *_usable_objects(cut=True)]), sample)
    assert after.labels.tolist() == [8] and after.boxes_xyxy.tolist() == [[20, 0, 30, 34]]
    plain = apply(v2.Compose([Window(), *_usable_objects(cut=True)]), replace(sample, masks=None))
    assert plain.labels.tolist() == [7, 8] and plain.boxes_xyxy.tolist() == [[10, 0, 60, 4], [20, 0, 60, 34]]


def test_large_scale_jitter_cuts_masks_too() -> None:
    """At twice the size that fits a window holds a quarter, and boxes end where masks do."""
    masks = torch.zeros(1, 50, 50, dtype=torch.uint8)
    masks[0, 10:40, 10:14] = masks[0, 36:40, 10:40] = 1  # an angle
    before, seen = Sample(torch.zeros(3, 50, 50, dtype=torch.uint8), tight(masks), torch.tensor([0]), masks), 0
    for seed in range(30):
        with seeded(seed):
            after = apply(LargeScaleJitter(50, 2.0, 2.0).build(), before)
        assert after.masks is not None and after.image.shape[1:] == (50, 50) == after.masks.shape[1:]
        assert torch.equal(tight(after.masks), after.boxes_xyxy)
        seen += len(after.masks)
    assert 5 < seen < 31


def test_batches_have_masks_of_the_padded_size() -> None:
    data = open_data("shapes:size=64,images=6", masks=True)
    samples = Samples(data, FixedSize(48, 40), masks=True)
    wide = Samples(data, FixedSize(32, 64), masks=True)
    one, two = samples[0, 0], wide[1, 0]
    batch = collate([one, two])
    targets = batch.targets
    assert targets.masks is not None and targets.masks.shape == (sum(targets.counts), 48, 64) and targets.masks.dtype == torch.uint8
    assert not targets.masks[targets.image == 0][:, :, 40:].any() and not targets.masks[targets.image == 1][:, 32:].any()
    assert torch.equal(targets.masks[: targets.counts[0], :48, :40], one.sample.masks)
    padded = pad_batch(batch, 50, 70)
    assert padded.targets.masks is not None and padded.targets.masks.shape[1:] == (50, 70) == padded.images.shape[2:]
    assert torch.equal(padded.targets.masks[:, :48, :64], targets.masks) and not padded.targets.masks[:, 48:].any()
    first, second = batch.split()
    assert first.targets.masks is not None and len(first.targets.masks) == targets.counts[0]
    joined = Targets.cat([first.targets, second.targets])
    assert joined.masks is not None and torch.equal(joined.masks, targets.masks)
    assert collate([samples[0, 0], Samples(data, FixedSize(48, 40))[1, 0]]).targets.masks is None


def test_loading_processes_send_masks() -> None:
    """The same as without processes, where data.masks asks for them, and only to train on unless they are asked for."""
    plain, data = (open_data("shapes:size=64,images=8", masks=masks) for masks in (False, True))
    config = DataConfig(transform=FixedSizeTransform(48, 48, transpose=0.5, zoom=0.5), resize=FixedSize(48, 48), workers=0)
    here = [batch for (batch,) in TrainLoader(data, config, 4).epoch(0)]
    loader = TrainLoader(data, replace(config, workers=1), 4)
    there = [batch for (batch,) in loader.epoch(0)]
    loader.close()
    for one, other in zip(here, there, strict=True):
        assert one.targets.masks is not None and other.targets.masks is not None
        assert torch.equal(one.targets.masks, other.targets.masks) and one.targets.masks.flatten(1).any(1).all()
    assert all(batch.targets.masks is None for (batch,) in TrainLoader(plain, config, 4).epoch(0))
    assert all(batch.targets.masks is None for batch in EvalLoader(data, config))
    assert all(batch.targets.masks is not None for batch in EvalLoader(data, config, masks=True))
    for (batch,), masked in zip(TrainLoader(plain, config, 4).epoch(0), here, strict=True):
        assert torch.equal(batch.images, masked.images)


def test_masks_of_shapes_are_their_visible_pixels() -> None:
    index = open_data("shapes:size=96,images=12", masks=True).index
    for position in range(len(index)):
        masks, rows = torch.from_numpy(index.decode_masks(position)), index.rows(position)
        assert (masks.sum(0) <= 1).all() and masks.sum((1, 2)).tolist() == index.areas[rows].tolist()
        assert torch.equal(tight(masks), torch.from_numpy(index.boxes_xyxy[rows]))
    assert open_data("shapes:size=96,images=12").index.masks is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1)), max_size=4), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_runs_and_texts_of_masks(sizes: list[tuple[int, int, float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random((h, w)) < share for h, w, share in sizes]
    runs = Masks.of_pixels(masks)
    for row, mask in enumerate(masks):
        found = runs.decode(slice(row, row + 1), *mask.shape)[0]
        assert (found == mask).all() and runs.present[row] == mask.any()
    encoded = EncodedMasks.cat([EncodedMasks.of(np.zeros((0, 2, 2), bool)), *(EncodedMasks.of(mask[None]) for mask in masks)])
    for mask, other, coco, area in zip(masks, encoded, encoded.as_coco(), encoded.areas.tolist(), strict=True):
        text = reference.encode(np.asfortranarray(mask, np.uint8))
        assert (other == mask).all() and coco == {"size": [*mask.shape], "counts": text["counts"].decode()} and area == mask.sum()
    order = np.arange(len(masks))[::-1]
    assert encoded.take(order).as_coco() == encoded.as_coco()[::-1]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_polygons_are_filled_as_by_pycocotools(height: int, width: int, seed: int) -> None:
    """Crossing themselves, on the grid, of one point, far outside, several in one mask."""
    rng = np.random.default_rng(seed)
    polygons = [
        rng.random(2 * rng.integers(3, 9)) * rng.choice([1, 60, 3000]) - rng.choice([0, 30, 1500]) for _ in range(rng.integers(1, 4))
    ]
    for shaped in (polygons, [p.round() for p in polygons], [(5 * p).round() / 5 for p in polygons], [np.tile(p[:2], 3) for p in polygons]):
        plain = [p.astype(np.float32).astype(float).tolist() for p in shaped]
        expected = reference.decode(reference.merge(reference.frPyObjects(plain, height, width)))
        assert (fill_polygons(plain, height, width) == expected).all()


@dataclass(frozen=True)
class Forgetful(TrainTransform):
    """Puts together a sample of its own, as a mosaic does."""

    def gather(self, load, position, images):  # type: ignore[no-untyped-def]
        return replace(load(position), masks=None)

    def build(self) -> v2.Transform:
        return v2.Identity()


def test_a_transform_that_leaves_masks_out_is_named() -> None:
    data = open_data("shapes:size=64,images=4", masks=True)
    with pytest.raises(ValueError, match="shapes/train/000000 cannot be prepared: TypeError: Forgetful leaves out the masks of objects"):
        Samples(data, Forgetful(), masks=True)[0, 0]


def test_of_a_reduced_image_masks_are_reduced_too(tmp_path: Path) -> None:
    """To the pixels in the middle of those that become one."""
    labels = "0 0.2 0.1 0.7 0.2 0.6 0.9 0.1 0.6\n"
    data = yolo_folder(tmp_path, labels, (90, 61), "a.jpg")
    exact, fast = (Samples(data, FixedSizeTransform(20, 15, flip=0.0), reduce, True)._load(0) for reduce in (False, True))
    assert exact.masks is not None and fast.masks is not None and fast.image.shape[1:] == (23, 16) == fast.masks.shape[1:]
    rows, columns = ((torch.arange(-(-side // 4)) * 4 + 2).clamp(max=side - 1) for side in (90, 61))
    assert torch.equal(fast.masks[0], exact.masks[0][rows][:, columns])


# YOLO


def yolo_folder(root: Path, labels: str, size: tuple[int, int] = (60, 80), name: str = "a.png", keypoints: str = ""):  # type: ignore[no-untyped-def]
    """One image of `size` (h, w) with its labels, opened with masks."""
    picture(root / "images" / "train" / name, size[::-1])
    (root / "labels" / "train").mkdir(parents=True, exist_ok=True)
    (root / "labels" / "train" / "a.txt").write_text(labels)
    (root / "data.yaml").write_text(f"train: images/train\nnames: [nut, bolt]\n{keypoints}")
    return open_data(root, "train", masks=True)


POLYGONS = {
    "a triangle": "0.1 0.2 0.8 0.3 0.4 0.9",
    "five corners": "0.1 0.2 0.8 0.3 0.9 0.5 0.4 0.9 0.2 0.7",
    "four": "0.1 0.2 0.7 0.3 0.7 0.8 0.2 0.9",
    "reaching out": "-0.3 0.2 1.2 0.3 0.4 1.4",
}


def test_polygons_of_yolo_are_masks(tmp_path: Path) -> None:
    """Filled as pycocotools does. Boxes are what they are without masks; a line that is a box has none, and is not trained on."""
    lines = ["0 .5 .5 .25 .5", *(f"1 {polygon}" for polygon in POLYGONS.values()), "0 0.1 0.2 0.8 0.3 0.4 0.9 0.75", "1 .5 .5 .25 .5 .9"]
    data = yolo_folder(tmp_path, "\n".join(lines))
    plain = open_data(tmp_path, "train")
    assert (data.index.boxes_xyxy == plain.index.boxes_xyxy).all() and (data.index.labels == plain.index.labels).all()
    masks = data.masks(0)
    assert data.index.masks.present.tolist() == [False, *[True] * 5, False] and not masks[[0, 6]].any()
    for mask, polygon in zip(masks[1:6], [*POLYGONS.values(), POLYGONS["a triangle"]], strict=True):
        pixels = (np.array(polygon.split(), float).reshape(-1, 2) * (80, 60)).flatten().tolist()
        assert (mask == reference.decode(reference.frPyObjects([pixels], 60, 80))[:, :, 0]).all() and mask.any()
    assert len(for_training(data)[0].index.labels) == 5
    found = check_data(tmp_path, ("train",), masks=True).findings
    assert [str(f).partition("annotation ")[2] for f in found if f.kind == "annotation without a mask"] == [
        "1: it is a box, not a polygon (h x w: 60 x 80); it is not trained on",
        "7: it is a box, not a polygon (h x w: 60 x 80); it is not trained on",
    ]
    assert not [f for f in found if "polygons are taken as" in f.message]


def test_lines_that_are_left_out_take_their_polygons_along(tmp_path: Path) -> None:
    """Repeated ones, and, for `check`, those that are wrong."""
    triangle, other = POLYGONS["a triangle"], POLYGONS["five corners"]
    data = yolo_folder(tmp_path, f"0 {triangle}\n0 {triangle}\n1 {other}\n0 .5 .5 .25 .5\n1 .1 .1 .2 .2 .3 .1\n")
    areas = data.masks(0).sum((1, 2)).tolist()
    alone = [yolo_folder(tmp_path / str(k), f"0 {p}").masks(0).sum() for k, p in enumerate((triangle, other, ".1 .1 .2 .2 .3 .1"))]
    assert areas == [alone[0], alone[1], 0, alone[2]]


def test_keypoints_of_yolo_are_no_polygon(tmp_path: Path) -> None:
    data = yolo_folder(tmp_path, "0 .5 .5 .25 .5 .1 .1 .2 .2 .3 .3\n", keypoints="kpt_shape: [3, 2]\n")
    assert data.index.masks.present.tolist() == [False]


def test_a_polygon_that_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    """Corners far apart in a very wide image; a triangle there is none."""
    many = " ".join(f"{k % 2} 0.{k % 9}" for k in range(300))
    with pytest.raises(ValueError, match=r"a\.txt: line 2: it is a polygon of more than 1048576 pixels"):
        yolo_folder(tmp_path / "many", f"0 0.1 0.1 0.9 0.1 0.5 1\n0 {many}\n", (10, 6000))
    assert yolo_folder(tmp_path / "one", "0 0.1 0.1 0.9 0.1 0.5 1\n", (10, 6000)).masks(0).any()


def test_data_of_boxes_alone_cannot_be_trained_on_with_masks(tmp_path: Path) -> None:
    yolo_folder(tmp_path, "0 .5 .5 .25 .5\n")
    with pytest.raises(ValueError, match=r"of its 1 annotations 1 are without a mask. To train on boxes alone: --data\.no-masks,"):
        said(tmp_path, masks=True, val_split="train", same_images="allow")


# labelme


def test_polygons_of_labelme_are_masks(tmp_path: Path) -> None:
    """Turned rectangles too; rectangles and circles have none. Boxes are what they are without masks."""
    triangle, turned = [(10, 20), (30, 10), (20, 50.5)], [(10, 0), (20, 10), (10, 20), (0, 10)]
    shapes = [shape("nut", "rectangle", (30, 40), (10, 20)), shape("nut", "polygon", *triangle), shape("nut", "circle", (50, 50), (53, 54))]
    labelme_with(tmp_path, *shapes, shape("nut", "oriented_rectangle", *turned))
    data, plain = (open_data(tmp_path, "all", masks=masks) for masks in (True, False))
    assert (data.index.boxes_xyxy == plain.index.boxes_xyxy).all() and plain.index.masks is None
    height, width = data.index.sizes[0].tolist()
    masks = data.index.decode_masks(0)
    for row, corners in ((1, triangle), (3, turned)):
        polygon = [[float(value) for corner in corners for value in corner]]
        assert (masks[row] == reference.decode(reference.frPyObjects(polygon, height, width))[:, :, 0]).all() and masks[row].any()
    assert data.index.masks is not None and data.index.masks.present.tolist() == [False, True, False, True]
    labelme_with(tmp_path, shape("nut", "polygon", (0, 0), (2.0**21, 0), (5, 5)))
    with pytest.raises(ValueError, match=r"photo\.json: shapes\[0\] \(nut\) is too large for a mask"):
        open_data(tmp_path, "all", masks=True)
    assert len(open_data(tmp_path, "all").index.labels) == 1


def test_polygons_of_a_group_of_labelme_are_one_object(tmp_path: Path) -> None:
    """With masks and without; those of another label or group are others, and so are shapes of other kinds, which tools group for more."""
    left, right = [(10, 20), (20, 20), (15, 30)], [(40, 10), (50, 10), (45, 15)]
    parts = [shape("nut", "polygon", *left, group_id=1), shape("nut", "polygon", *right, group_id=1)]
    others = [
        shape("nut", "polygon", *left, group_id="1"),
        shape("bolt", "polygon", *left, group_id=1),
        shape("nut", "polygon", *right),
        shape("nut", "polygon", *left),
        *(shape("nut", "rectangle", *left[:2], right[2], group_id=1) for _ in range(2)),
    ]
    labelme_with(tmp_path, parts[0], *others, parts[1])
    data, plain = (open_data(tmp_path, "all", masks=masks) for masks in (True, False))
    assert (data.index.boxes_xyxy == plain.index.boxes_xyxy).all() and len(data.index.labels) == 7
    assert data.index.boxes_xyxy[0].tolist() == [10, 10, 50, 30]
    both, *one_each = data.index.decode_masks(0)
    assert both.sum() == one_each[0].sum() + one_each[2].sum() and (both == one_each[0] | one_each[2]).all()
    found = [str(f) for f in check_data(tmp_path, ("all",)).findings if f.kind == "polygons of a group"]
    assert len(found) == 1 and "1 polygons of the label and group of another are parts of its object; the first: " in found[0]
