"""An augmentation of several images: four of them, each at half its size, in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from steadydetr import register
from steadydetr.data.transforms import Sample, TrainTransform


@register("mosaic")
@dataclass(frozen=True)
class Mosaic(TrainTransform):
    """Three further images are drawn for every image; the result is `size` x `size` pixels."""

    size: int = 64
    flip: float = 0.5

    def gather(self, load: Callable[[int], Sample], position: int, images: int) -> Sample:
        others = torch.randint(images, (3,)).tolist()
        half = self.size // 2
        canvas = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        boxes, labels = [], []
        for corner, sample in enumerate(map(load, (position, *others))):
            top, left = corner // 2 * half, corner % 2 * half
            height, width = sample.image.shape[1:]
            canvas[:, top : top + half, left : left + half] = interpolate(sample.image[None].float(), (half, half))[0].byte()
            scale, shift = torch.tensor((half / width, half / height)).repeat(2), torch.tensor((left, top)).repeat(2)
            boxes.append(sample.boxes_xyxy * scale + shift)
            labels.append(sample.labels)
        return Sample(canvas, torch.cat(boxes), torch.cat(labels))

    def build(self) -> v2.Transform:
        return v2.Compose([v2.RandomHorizontalFlip(self.flip), v2.SanitizeBoundingBoxes(min_size=1)])
