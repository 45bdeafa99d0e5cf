"""The steps of the transforms that torchvision has not, or not for every image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class ObjectMasks(tv_tensors.Mask):
    """[n, H, W] masks that are resized to the nearest pixel by its centre, as images are, not by its corner as torchvision's."""


@F.register_kernel(F.resize, ObjectMasks)
def resize_masks(masks: Tensor, size: list[int], max_size: int | None = None, **of_images: object) -> Tensor:
    """[n, H, W] -> [n, h, w]; sizes mean what they do for images."""
    blank = masks.as_subclass(Tensor).new_zeros(1).expand(1, *masks.shape[-2:])
    height, width = F.resize(tv_tensors.Mask(blank), size, max_size=max_size).shape[-2:]
    found = masks.as_subclass(Tensor)
    resized = interpolate(found[None], (height, width), mode="nearest-exact")[0] if len(found) else found.new_zeros(0, height, width)
    return tv_tensors.wrap(resized, like=masks)


class AtLeastAPixel(v2.Transform):
    """A size that is drawn has a pixel at least, where torchvision leaves nothing of the shorter side of a line scan."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(1, side) for side in params["size"])}


class RandomShortestSize(AtLeastAPixel, v2.RandomShortestSize):
    """The one of torchvision, of at least a pixel."""


class ScaleJitter(AtLeastAPixel, v2.ScaleJitter):
    """The one of torchvision, of at least a pixel."""


class ResizeShortest(v2.Resize):
    """To one size of the shorter side, which keeps at least a pixel."""

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


class BoxesOfCutMasks(v2.Transform):
    """After crops: the box of an object at the border ends where its mask does. Without masks it stays as the border has cut it."""

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        if "masks" not in sample:
            return sample
        masks, boxes = sample["masks"].as_subclass(Tensor), sample["boxes"].as_subclass(Tensor)
        height, width = masks.shape[-2:]
        cut = (boxes[:, :2] <= 0).any(1) | (boxes[:, 2:] >= boxes.new_tensor((width, height))).any(1)
        cut &= (boxes[:, 2:] > boxes[:, :2]).all(1)  # RandomIoUCrop gives those that it drops a box without area
        rows = cut.nonzero()[:, 0]
        rows = rows[masks[rows].flatten(1).amax(1) > 0] if len(rows) else rows
        if len(rows):
            tight = masks_to_boxes(masks[rows])
            tight[:, 2:] += 1  # it gives the last pixel, not where that ends
            boxes = boxes.clone()
            boxes[rows] = torch.cat((torch.maximum(boxes[rows, :2], tight[:, :2]), torch.minimum(boxes[rows, 2:], tight[:, 2:])), 1)
        return sample | {"boxes": tv_tensors.wrap(boxes, like=sample["boxes"])}


class ObjectsWithPixels(v2.Transform):
    """Objects of whose mask no pixel is left are dropped. Without masks all stay."""

    def forward(self, sample: dict[str, Any]) -> dict[str, Any]:
        if "masks" not in sample:
            return sample
        kept = sample["masks"].as_subclass(Tensor).flatten(1).any(1).bool()
        boxes, masks = (tv_tensors.wrap(sample[name].as_subclass(Tensor)[kept], like=sample[name]) for name in ("boxes", "masks"))
        return sample | {"boxes": boxes, "masks": masks, "labels": sample["labels"][kept]}


class Transpose(v2.Transform):
    """Swap x and y."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            return tv_tensors.BoundingBoxes(inpt[:, [1, 0, 3, 2]], format=inpt.format, canvas_size=(width, height))  # type: ignore[call-overload]
        if not isinstance(inpt, tv_tensors.Image | tv_tensors.Mask):
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
