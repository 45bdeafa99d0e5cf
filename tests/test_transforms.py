"""Augmentation, step by step: what is resized and cropped to which sizes, how often, and that boxes go with the pixels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torchvision.transforms import v2

from steadydetr.data.transform_steps import RandomSizeCrop
from steadydetr.data.transforms import DetrTransform, FixedSize, FixedSizeTransform, Sample, ShortestSide, apply, seeded

Step = tuple[str, int, int]  # which transform, and the size of the image after it


def apply_seeded(transform: v2.Transform, sample: Sample, seed: int) -> Sample:
    with seeded(seed):
        return apply(transform, sample)


def picture(height: int, width: int, box: tuple[int, int, int, int] | None = None) -> Sample:
    """Black, with a white box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    left, top, right, bottom = box or (width // 4, height // 4, width // 2, height // 2)
    image[:, top:bottom, left:right] = 255
    return Sample(image, torch.tensor([[left, top, right, bottom]], dtype=torch.float32), torch.tensor([3]))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The resizes and crops that images go through from here on."""
    taken: list[Step] = []
    for kind in (v2.RandomShortestSize, RandomSizeCrop):

        def transform(self: v2.Transform, value: Any, params: dict[str, Any], kind: Any = kind, original: Any = kind.transform) -> Any:
            out = original(self, value, params)
            if value.ndim == 3:
                taken.append((kind.__name__, *out.shape[-2:]))
            return out

        monkeypatch.setattr(kind, "transform", transform)
    return taken


def test_the_branch_with_the_crop_resizes_before_and_after(steps: list[Step]) -> None:
    """F-44: to 400, 500 or 600 without a limit, a window of 384 to 600, then as without the crop: 480 to 800, at most 1333."""
    paths: list[list[Step]] = []
    for seed in range(60):
        steps.clear()
        out = apply_seeded(DetrTransform().build(), picture(150, 200), seed)
        paths.append(list(steps))
        assert tuple(out.image.shape[-2:]) == paths[-1][-1][1:]
    kinds = Counter(tuple(kind for kind, *_ in path) for path in paths)
    resize, crop = "RandomShortestSize", "RandomSizeCrop"
    assert kinds.keys() == {(resize,), (resize, crop, resize)} and 20 <= kinds[(resize,)] <= 40
    last = {min(path[-1][1:]) for path in paths}
    assert last == set(range(480, 801, 32))
    cropped = [path for path in paths if len(path) == 3]
    assert {path[0][1:] for path in cropped} == {(400, 533), (500, 666), (600, 800)}
    for path in cropped:
        (_, first_height, first_width), (_, height, width), _ = path
        assert 384 <= height <= min(600, first_height) and 384 <= width <= min(600, first_width)


def test_the_longest_side_is_limited_at_the_end_alone(steps: list[Step]) -> None:
    for seed in range(12):
        steps.clear()
        out = apply_seeded(DetrTransform().build(), picture(40, 400), seed)
        assert max(out.image.shape[-2:]) <= 1333
        if len(steps) == 3:
            assert max(steps[0][1:]) >= 4000
    steps.clear()
    apply_seeded(DetrTransform(crop=False).build(), picture(40, 400), 0)
    assert steps == [("RandomShortestSize", 133, 1333)]


def test_without_the_crop_there_is_one_resize(steps: list[Step]) -> None:
    for seed in range(12):
        apply_seeded(DetrTransform((32, 48), 60, crop=False).build(), picture(150, 200), seed)
    assert {step[1:] for step in steps} == {(32, 42), (45, 60)} and len(steps) == 12


def test_a_window_takes_every_size_and_place_that_fits() -> None:
    window = RandomSizeCrop(3, 5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [window.make_params([torch.zeros(3, 4, 6)]) for _ in range(400)]
    assert {(each["height"], each["width"]) for each in drawn} == {(h, w) for h in (3, 4) for w in (3, 4, 5)}
    assert {(each["height"], each["top"]) for each in drawn} == {(3, 0), (3, 1), (4, 0)}
    assert {(each["width"], each["left"]) for each in drawn} == {(w, left) for w in (3, 4, 5) for left in range(7 - w)}
    assert {(each["height"], each["width"]) for each in (window.make_params([torch.zeros(3, 2, 2)]) for _ in range(5))} == {(2, 2)}


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (FixedSizeTransform(40, 60, flip=0.0), (10, 5, 30, 15)),
        (FixedSizeTransform(40, 60, flip=1.0), (30, 5, 50, 15)),
        (FixedSizeTransform(40, 60, flip=0.0, transpose=1.0), (7.5, 20 / 3, 22.5, 20)),
        (DetrTransform((20,), 60, flip=0.0, crop=False), (5, 2.5, 15, 7.5)),
        (DetrTransform((20,), 60, flip=1.0, crop=False), (15, 2.5, 25, 7.5)),
        (ShortestSide(20, 60), (5, 2.5, 15, 7.5)),
        (ShortestSide(40, 45), (7.5, 3.75, 22.5, 11.25)),
        (ShortestSide(45, 45), (7.5, 3.75, 22.5, 11.25)),
        (ShortestSide(60, 45), (7.5, 3.75, 22.5, 11.25)),
        (FixedSize(20, 90), (15, 2.5, 45, 7.5)),
    ],
)
def test_boxes_go_with_the_pixels(transform: Any, expected: tuple[float, ...]) -> None:
    """On an image of 80 x 120 with a box from (20, 10) to (60, 30)."""
    out = apply_seeded(transform.build(), picture(80, 120, (20, 10, 60, 30)), 0)
    assert out.boxes_xyxy.tolist() == [pytest.approx(expected)] and out.labels.tolist() == [3]
    lit = (out.image[0] > 127).nonzero()
    (top, left), (bottom, right) = lit.amin(0).tolist(), (lit.amax(0) + 1).tolist()
    assert (left, top, right, bottom) == pytest.approx(expected, abs=0.6)


def test_flips_and_swaps_come_as_often_as_asked() -> None:
    """And zoom cuts off at most what it says."""
    flipped = swapped = 0
    for seed in range(40):
        left = apply_seeded(FixedSizeTransform(40, 60).build(), picture(40, 60, (0, 0, 10, 5)), seed).boxes_xyxy[0, 0]
        flipped += int(left > 0)
        height = apply_seeded(
            FixedSizeTransform(40, 40, flip=0.0, transpose=0.5).build(), picture(40, 40, (0, 0, 10, 20)), seed
        ).boxes_xyxy[0, 3]
        swapped += int(height == 10)
        (box,) = apply_seeded(
            FixedSizeTransform(100, 100, flip=0.0, zoom=0.7).build(), picture(100, 100, (45, 45, 55, 55)), seed
        ).boxes_xyxy.tolist()
        assert 9.9 <= box[2] - box[0] <= 100 * 10 / 69
    assert 10 <= flipped <= 30 and 10 <= swapped <= 30
    assert apply_seeded(FixedSizeTransform(40, 60, flip=0.0).build(), picture(40, 60, (0, 0, 10, 5)), 0).boxes_xyxy.tolist() == [
        [0, 0, 10, 5]
    ]


@pytest.mark.parametrize("transform", [FixedSizeTransform(50, 50, flip=0.0), DetrTransform((50,), 60, flip=0.0, crop=False)])
def test_boxes_below_a_pixel_are_dropped_and_the_others_end_at_the_edge(transform: Any) -> None:
    boxes = torch.tensor([[0.0, 0, 2.4, 40], [0, 0, 1.6, 40], [80, 80, 130, 120]])
    out = apply_seeded(transform.build(), Sample(torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, torch.tensor([1, 2, 3])), 0)
    assert out.labels.tolist() == [1, 3] and out.boxes_xyxy[1].tolist() == [40, 40, 50, 50]


def test_draws_are_those_of_the_seed_and_leave_the_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    transform = DetrTransform().build()
    first, again, other = (apply_seeded(transform, picture(90, 120), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.image, again.image) and torch.equal(first.boxes_xyxy, again.boxes_xyxy)
    assert first.image.shape != other.image.shape


def test_defaults() -> None:
    """F-44 and the size of the quickstart."""
    assert DetrTransform() == DetrTransform(tuple(range(480, 801, 32)), 1333, flip=0.5, crop=True)
    assert ShortestSide() == ShortestSide(800, 1333) and FixedSize() == FixedSize(128, 128)
    assert FixedSizeTransform() == FixedSizeTransform(128, 128, flip=0.5, transpose=0.0, zoom=1.0)


def test_what_is_not_asked_for_is_not_among_the_steps() -> None:
    kinds = {zoom: [type(step).__name__ for step in FixedSizeTransform(zoom=zoom).build().transforms] for zoom in (1.0, 0.5)}
    assert kinds[1.0] == ["RandomHorizontalFlip", "Resize", "ClampBoundingBoxes", "SanitizeBoundingBoxes", "ObjectsWithPixels"]
    tail = ["Resize", "ClampBoundingBoxes", "BoxesOfCutMasks", "SanitizeBoundingBoxes", "ObjectsWithPixels"]
    assert kinds[0.5] == ["RandomHorizontalFlip", "RandomIoUCrop", *tail]
    zoom = FixedSizeTransform(zoom=0.5).build().transforms[1]
    assert (zoom.min_scale, zoom.options) == (0.5, [0.5, 0.9, 1.0])  # windows keep at least half of some object


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 5000), (1, 1333)), ((5000, 1), (1333, 1)), ((3, 5000), (1, 1333)), ((1, 1), (800, 800))]
)
def test_of_a_line_at_least_a_pixel_stays(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    assert ShortestSide().build()(image).shape[-2:] == expected
    sample = Sample(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert apply(DetrTransform((800,), crop=False).build(), sample).image.shape[-2:] == expected


def test_only_images_too_thin_for_a_crop_stay_whole() -> None:
    """A crop of at least three tenths of a side; of 3 pixels that is none."""
    torch.manual_seed(0)
    crop = FixedSizeTransform(zoom=0.3).build().transforms[1]
    thin, large = (Sample(picture(side, 40).image, torch.tensor([[0.0, 0, 40, side]]), torch.tensor([0])) for side in (3, 30))
    assert {apply(crop, thin).image.shape[1:] for _ in range(40)} == {(3, 40)}
    assert len({apply(crop, large).image.shape[1:] for _ in range(40)}) > 5


@pytest.mark.parametrize("side", [0, 2**14 + 1])
def test_sides_that_are_a_mistake(side: int) -> None:
    for make in (
        lambda: FixedSize(height=side),
        lambda: FixedSize(width=side),
        lambda: ShortestSide(shortest=side),
        lambda: ShortestSide(longest=side),
        lambda: DetrTransform(shortest=(480, side)),
        lambda: DetrTransform(longest=side),
        lambda: FixedSizeTransform(height=side),
        lambda: FixedSizeTransform(width=side),
    ):
        with pytest.raises(ValueError, match=str(side)):
            make()
    DetrTransform(shortest=(1, 2**14))


def spread(**options: Any) -> list[tuple[Sample, Sample]]:
    """Images of 80 x 120 with a box of 40 x 20, before and after, with a resize to at most 60 x 90."""
    transform = DetrTransform((60,), 90, flip=0.0, crop=False, **options)
    before = picture(80, 120, (40, 30, 80, 50))
    return [(before, apply_seeded(transform.build(), before, seed)) for seed in range(40)]


def shape_of(box: torch.Tensor) -> float:
    left, top, right, bottom = box.tolist()
    return (right - left) / (bottom - top)


def test_zoomed_out_objects_are_smaller_with_the_same_proportions() -> None:
    """Half of the images, around which is the mean colour of ImageNet; nothing is lost."""
    smaller = 0
    for _, after in spread(zoom_out=2.0):
        assert after.image.shape[1] in (59, 60) and after.image.shape[2] in (89, 90) and len(after.labels) == 1
        (left, _, right, _), shape = after.boxes_xyxy[0].tolist(), shape_of(after.boxes_xyxy[0])
        assert shape == pytest.approx(2, rel=0.05) and 14.5 <= right - left <= 30
        if right - left < 29:
            smaller += 1
            corners = after.image[:, [0, 0, -1, -1], [0, -1, 0, -1]].T.tolist()
            assert any(corner == pytest.approx((124, 116, 104), abs=1) for corner in corners)
    assert 10 <= smaller <= 30


def test_crops_keep_an_object_and_its_proportions() -> None:
    """Boxes are clipped to the crop; objects in it become larger, up to 1 / zoom times."""
    larger = 0
    for _, after in spread(zoom=0.4):
        assert len(after.labels) == 1
        height, width = after.image.shape[1:]
        left, top, right, bottom = after.boxes_xyxy[0].tolist()
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        whole = left > 0 and top > 0 and right < width and bottom < height
        assert not whole or shape_of(after.boxes_xyxy[0]) == pytest.approx(2, rel=0.1)
        larger += bottom - top > 16
        lit = (after.image[0] > 127).nonzero()
        assert lit.amin(0).tolist() == pytest.approx((top, left), abs=1.1) and (lit.amax(0) + 1).tolist() == pytest.approx(
            (bottom, right), abs=1.1
        )
    assert larger >= 10


def test_photometric_changes_leave_boxes_alone() -> None:
    changed = [
        not torch.equal(after.image, apply_seeded(DetrTransform((60,), 90, 0.0, False).build(), before, 0).image)
        for before, after in spread(photometric=0.5)
    ]
    assert sum(changed) >= 20
    assert all(after.boxes_xyxy.tolist() == [[30, 22.5, 60, 37.5]] for _, after in spread(photometric=0.5))


def test_without_options_nothing_is_added() -> None:
    """What DETR's augmentation was before there were any: its steps draw the same numbers. Those of masks draw none."""
    assert [type(step).__name__ for step in DetrTransform().build().transforms] == [
        "RandomHorizontalFlip", "RandomChoice", "ClampBoundingBoxes", "BoxesOfCutMasks", "SanitizeBoundingBoxes", "ObjectsWithPixels"
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("photometric", 1.5), ("zoom_out", 0.5), ("zoom", -0.1)])
def test_augmentations_out_of_their_bounds_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.transform\.{name} = {value} must lie in"):
        DetrTransform(**{name: value})
