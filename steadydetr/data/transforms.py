"""Augmentation and resizing, torchvision v2. Every draw is seeded by (seed, epoch, image): workers and resuming change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


@dataclass(frozen=True)
class Sample:
    image: Tensor  # [3, H, W] uint8
    boxes_xyxy: Tensor  # [n, 4] pixels
    labels: Tensor  # [n]


@dataclass(frozen=True)
class DetrTransform:
    """The recipe of DETR: flip, then either resize, or resize, crop and resize again."""

    shortest: tuple[int, ...] = tuple(range(480, 801, 32))
    longest: int = 1333
    flip: float = 0.5
    crop: bool = True  # half of the images take the branch with the crop

    def build(self) -> v2.Transform:
        resize = v2.RandomShortestSize(list(self.shortest), self.longest)
        cropped = v2.Compose([v2.RandomShortestSize([400, 500, 600]), RandomSizeCrop(384, 600), resize])
        scaled = v2.RandomChoice([resize, cropped]) if self.crop else resize
        return v2.Compose([v2.RandomHorizontalFlip(self.flip), scaled, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])


@dataclass(frozen=True)
class FixedSizeTransform:
    """Every image to one size, for small detectors; `zoom` < 1 crops that share of the sides at the least, at random."""

    height: int = 128
    width: int = 128
    flip: float = 0.5
    transpose: float = 0.0  # probability of swapping x and y; not where up and down mean something
    zoom: float = 1.0

    def build(self) -> v2.Transform:
        steps: list[v2.Transform] = [v2.RandomHorizontalFlip(self.flip)]
        if self.transpose:
            steps.append(v2.RandomApply([Transpose()], self.transpose))
        if self.zoom < 1:
            steps.append(v2.RandomIoUCrop(min_scale=self.zoom, sampler_options=[0.5, 0.9, 1.0]))
        steps += [v2.Resize((self.height, self.width)), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)]
        return v2.Compose(steps)


@dataclass(frozen=True)
class ShortestSide:
    """Evaluation resize that keeps proportions."""

    shortest: int = 800
    longest: int = 1333

    def build(self) -> v2.Transform:
        return v2.Resize(self.shortest, max_size=self.longest)


@dataclass(frozen=True)
class FixedSize:
    """Evaluation resize to one size."""

    height: int = 128
    width: int = 128

    def build(self) -> v2.Transform:
        return v2.Resize((self.height, self.width))


TrainTransform = DetrTransform | FixedSizeTransform
EvalTransform = ShortestSide | FixedSize


class RandomSizeCrop(v2.Transform):
    """A window whose sides are drawn from [low, high], as far as the image goes."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2._utils.query_size(flat_inputs)
        h, w = (_draw(min(self.low, side), min(self.high, side)) for side in (height, width))
        return {"top": _draw(0, height - h), "left": _draw(0, width - w), "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class Transpose(v2.Transform):
    """Swap x and y."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            return tv_tensors.BoundingBoxes(inpt[:, [1, 0, 3, 2]], format=inpt.format, canvas_size=(width, height))  # type: ignore[call-overload]
        return tv_tensors.wrap(inpt.transpose(-1, -2), like=inpt) if isinstance(inpt, tv_tensors.Image) else inpt


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def apply(transform: v2.Transform, sample: Sample, seed: int) -> Sample:
    """The sample under `transform`, with the random numbers of `seed`."""
    height, width = sample.image.shape[-2:]
    boxes = tv_tensors.BoundingBoxes(sample.boxes_xyxy, format="XYXY", canvas_size=(height, width))  # type: ignore[call-overload]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = transform({"image": tv_tensors.Image(sample.image), "boxes": boxes, "labels": sample.labels})
    return Sample(out["image"].as_subclass(Tensor), out["boxes"].as_subclass(Tensor), out["labels"])
