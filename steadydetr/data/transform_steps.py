"""The steps of the transforms that torchvision has not, or not for every image."""

from __future__ import annotations

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class RandomShortestSize(v2.RandomShortestSize):
    """The one of torchvision, which leaves nothing of the shorter side of a line scan: at least a pixel stays."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(1, side) for side in params["size"])}


class ScaleJitter(v2.ScaleJitter):
    """The same for the one of torchvision."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(1, side) for side in params["size"])}


class ResizeShortest(v2.Resize):
    """The same for one size of the shorter side."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        height, width = F.get_size(inpt)
        if min(height, width) * self.max_size >= max(height, width):
            return super().transform(inpt, params)
        size = [1, self.max_size] if height < width else [self.max_size, 1]
        return self._call_kernel(F.resize, inpt, size, interpolation=self.interpolation, antialias=self.antialias)


class RandomIoUCrop(v2.RandomIoUCrop):
    """The one of torchvision, which divides by zero where it draws a crop of no pixels: images so thin stay as they are."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2._utils.query_size(flat_inputs)
        return super().make_params(flat_inputs) if int(min(height, width) * self.min_scale) else {}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _dense(super().transform(inpt, params))


class RandomSizeCrop(v2.Transform):
    """Crop a random window, whose sides are drawn between `low` and `high` but are at most those of the image."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2._utils.query_size(flat_inputs)
        h, w = (_draw(min(self.low, side), min(self.high, side)) for side in (height, width))
        return {"top": _draw(0, height - h), "left": _draw(0, width - w), "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return _dense(self._call_kernel(F.crop, inpt, **params))


class Transpose(v2.Transform):
    """Swap x and y."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            return tv_tensors.BoundingBoxes(inpt[:, [1, 0, 3, 2]], format=inpt.format, canvas_size=(width, height))  # type: ignore[call-overload]
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        swapped = inpt.transpose(-1, -2)
        if 1 in swapped.shape:  # torch crashes where it resizes a long image of one column that lies in memory like a row
            swapped = swapped.clone(memory_format=torch.contiguous_format)
        return tv_tensors.wrap(swapped, like=inpt)


def _dense(cropped: Any) -> Any:
    """An image without the rest of the one that it was cut from, channels last in memory, which is resized twice as fast."""
    if not isinstance(cropped, tv_tensors.Image):
        return cropped
    return tv_tensors.wrap(cropped.permute(1, 2, 0).contiguous().permute(2, 0, 1), like=cropped)


def _draw(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))
