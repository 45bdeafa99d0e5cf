"""Augmentation and resizing, torchvision v2. Every draw is seeded by (seed, epoch, image): workers and resuming change nothing."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.config import check_within
from steadydetr.kinds import register
from steadydetr.lazy import np, torch, tv_tensors, v2

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LONGEST = 2**14  # pixels of a side of an image between two steps, which line scans would exceed by far
FIRST_SIDES, CROP = (400, 500, 600), (384, 600)  # of DETR: shorter sides before the crop, and least and most sides of the crop
CANVAS = (124, 116, 104)  # the mean colour of ImageNet, around images that are zoomed out
SIDE = (1, 2**14)  # of what images are resized to, in pixels: more is a mistake, and would take all memory


@dataclass(frozen=True)
class Sample:
    image: Tensor  # [3, H, W] uint8
    boxes_xyxy: Tensor  # [n, 4] pixels
    labels: Tensor  # [n]
    masks: Tensor | None = None  # [n, H, W] uint8, 1 inside of the object; None: not read


class Transform(ABC):
    """How an image with its boxes becomes a sample: a frozen dataclass.

    Random numbers are torch's, numpy's or Python's, which are seeded for every image and epoch.
    """

    def gather(self, load: Callable[[int], Sample], position: int, images: int) -> Sample:
        """What `build` is applied to: the image at `position`. A mosaic loads others of the 0 .. `images` - 1 besides."""
        return load(position)

    @abstractmethod
    def build(self) -> v2.Transform:
        """What is applied to the gathered image, its boxes and labels."""


class TrainTransform(Transform):
    """One that augments training images."""

    def largest_scale(self, sizes: NDArray[np.int32]) -> NDArray[np.float64] | None:
        """[I, 2] by what height and width of images of these sizes [I, 2] are multiplied at most, crops included; None: not known."""
        return None


class EvalTransform(Transform):
    """One that only resizes, for evaluation and use."""

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """What images of this size become, both as (height, width); no image is touched."""
        boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        height, width = self.build()(boxes).canvas_size
        return height, width


@register("detr-transform", "detr")
@dataclass(frozen=True)
class DetrTransform(TrainTransform):
    """The augmentation of DETR: flip, then either resize, or resize, crop and resize again; before it, if asked for, that of SSD."""

    shortest: tuple[int, ...] = tuple(range(480, 801, 32))
    longest: int = 1333
    flip: float = 0.5
    crop: bool = True  # half of the images take the branch with the crop
    photometric: float = 0.0  # probability of each change of brightness, contrast, saturation, hue and order of the channels
    zoom_out: float = 1.0  # half of the images lie on a canvas whose sides are up to so many times theirs; 1: none do
    zoom: float = 1.0  # images are cropped around objects, to sides of at least so many times theirs; 1: none are

    def __post_init__(self) -> None:
        check_within("data.transform", self, longest=SIDE, flip=(0, 1), photometric=(0, 1), zoom_out=(1, 100), zoom=(0, 1))
        if not self.shortest or not all(SIDE[0] <= side <= SIDE[1] for side in self.shortest):
            raise ValueError(f"data.transform.shortest = {self.shortest[:20]} must be sides in {SIDE[0]} .. {SIDE[1]}")

    def largest_scale(self, sizes: NDArray[np.int32]) -> NDArray[np.float64]:
        short, long, largest = sizes.min(1), sizes.max(1), max(self.shortest)
        scale = np.minimum(largest / short, self.longest / long)
        if self.crop:
            scale = np.maximum(scale, FIRST_SIDES[-1] / short * largest / CROP[0])
        if self.zoom < 1:
            scale = np.maximum(scale, largest / short) / max(self.zoom, 1e-6)
        return np.stack((scale, scale), 1)

    def build(self) -> v2.Transform:
        from steadydetr.data.transform_steps import RandomIoUCrop, RandomShortestSize, RandomSizeCrop

        resize = RandomShortestSize(list(self.shortest), self.longest)
        cropped = v2.Compose([RandomShortestSize(list(FIRST_SIDES), LONGEST), RandomSizeCrop(*CROP), resize])
        scaled = v2.RandomChoice([resize, cropped]) if self.crop else resize
        steps: list[v2.Transform] = []
        if self.zoom_out > 1:
            steps.append(v2.RandomZoomOut(dict.fromkeys((tv_tensors.Image,), CANVAS), (1.0, self.zoom_out)))
        if self.zoom < 1:
            steps += [RandomIoUCrop(min_scale=self.zoom, sampler_options=[0.0, 0.3, 1.0]), v2.SanitizeBoundingBoxes()]
        steps += [v2.RandomHorizontalFlip(self.flip), scaled, *_usable_objects(self.crop or self.zoom < 1)]
        if self.photometric:
            steps.append(v2.RandomPhotometricDistort(p=self.photometric))  # last, where images are smallest
        return v2.Compose(steps)


@register("large-scale-jitter", "large-scale-jitter", "lsj")
@dataclass(frozen=True)
class LargeScaleJitter(TrainTransform):
    """Flip, resize by a random factor, and crop what is larger than a square (Ghiasi et al. 2021)."""

    side: int = 1024  # of the square; an image that just fits into it has scale 1
    least: float = 0.1  # scales
    most: float = 2.0
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_within("data.transform", self, side=SIDE, least=(1e-2, 10), most=(self.least, 10), flip=(0, 1))

    def largest_scale(self, sizes: NDArray[np.int32]) -> NDArray[np.float64]:
        scale = self.most * self.side / sizes.max(1)
        return np.stack((scale, scale), 1)

    def build(self) -> v2.Transform:
        from steadydetr.data.transform_steps import RandomSizeCrop, ScaleJitter

        jitter = ScaleJitter((self.side, self.side), (self.least, self.most))
        steps = [v2.RandomHorizontalFlip(self.flip), jitter, RandomSizeCrop(self.side, self.side)]
        return v2.Compose([*steps, *_usable_objects(cut=True)])


@register("fixed-size-transform", "fixed-size")
@dataclass(frozen=True)
class FixedSizeTransform(TrainTransform):
    """Every image is resized to one size, for small detectors.

    With `zoom` below 1 it is cropped at random first, as in SSD: a side of the crop is at least `zoom` times that of the image.
    """

    height: int = 128
    width: int = 128
    flip: float = 0.5
    transpose: float = 0.0  # probability of swapping x and y; 0 where classes depend on what is up
    zoom: float = 1.0

    def __post_init__(self) -> None:
        check_within("data.transform", self, height=SIDE, width=SIDE, flip=(0, 1), transpose=(0, 1), zoom=(0, 1))

    def largest_scale(self, sizes: NDArray[np.int32]) -> NDArray[np.float64]:
        sides = np.array([self.height, self.width]) / max(self.zoom, 1e-6)
        return np.maximum(sides, sides[::-1] if self.transpose else 0) / sizes

    def build(self) -> v2.Transform:
        from steadydetr.data.transform_steps import RandomIoUCrop, Transpose

        steps: list[v2.Transform] = [v2.RandomHorizontalFlip(self.flip)]
        if self.transpose:
            steps.append(v2.RandomApply([Transpose()], self.transpose))
        if self.zoom < 1:
            steps.append(RandomIoUCrop(min_scale=self.zoom, sampler_options=[0.5, 0.9, 1.0]))
        steps += [v2.Resize((self.height, self.width)), *_usable_objects(self.zoom < 1)]
        return v2.Compose(steps)


@register("shortest-side")
@dataclass(frozen=True)
class ShortestSide(EvalTransform):
    """Evaluation resize that keeps proportions. Where `longest` is not above `shortest`, it alone decides."""

    shortest: int = 800
    longest: int = 1333

    def __post_init__(self) -> None:
        check_within("data.resize", self, shortest=SIDE, longest=SIDE)

    def build(self) -> v2.Transform:
        from steadydetr.data.transform_steps import ResizeShortest

        return ResizeShortest(self.shortest if self.shortest < self.longest else None, max_size=self.longest)


@register("fixed-size")
@dataclass(frozen=True)
class FixedSize(EvalTransform):
    """Evaluation resize to one size."""

    height: int = 128
    width: int = 128

    def __post_init__(self) -> None:
        check_within("data.resize", self, height=SIDE, width=SIDE)

    def build(self) -> v2.Transform:
        return v2.Resize((self.height, self.width))


def _usable_objects(cut: bool) -> list[v2.Transform]:
    """The last steps of a training transform: boxes end where images do, and objects of which less than a pixel is left are dropped.

    Args:
        cut: whether images may have been cropped, so that of objects at the border a part may be missing.
    """
    from steadydetr.data.transform_steps import BoxesOfCutMasks, ObjectsWithPixels

    tighten = [BoxesOfCutMasks()] if cut else []
    return [v2.ClampBoundingBoxes(), *tighten, v2.SanitizeBoundingBoxes(min_size=1), ObjectsWithPixels()]  # D-200


def apply(transform: v2.Transform, sample: Sample) -> Sample:
    """The transformed sample. Random numbers come from torch's generator, and are the same with masks and without."""
    height, width = sample.image.shape[-2:]
    boxes = tv_tensors.BoundingBoxes(sample.boxes_xyxy, format="XYXY", canvas_size=(height, width))  # type: ignore[call-overload]
    given = {"image": tv_tensors.Image(sample.image), "boxes": boxes, "labels": sample.labels}
    if sample.masks is None:
        out = transform(given)
        return Sample(out["image"].as_subclass(torch.Tensor), out["boxes"].as_subclass(torch.Tensor), out["labels"])
    from steadydetr.data.transform_steps import ObjectMasks

    out = transform(given | {"masks": ObjectMasks(sample.masks)})
    image, corners, masks = (out[name].as_subclass(torch.Tensor) for name in ("image", "boxes", "masks"))
    return Sample(image, corners, out["labels"], masks)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The generators of torch, numpy and Python start from `seed` within the block, and are as they were after it."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also prepares devices that are not there
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
