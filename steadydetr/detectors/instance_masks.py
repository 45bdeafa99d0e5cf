"""From the mask predictions of a detector to masks of the original image, an image and a part of its masks at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from steadydetr.data.masks import EncodedMasks
from steadydetr.equations.mask_scores import mask_quality
from steadydetr.structures import MaskPredictions

PIXELS_AT_ONCE = 2**24  # of masks, which then take 64 MiB; but never less than one mask

Size = tuple[int, int]  # (h, w)


@dataclass(frozen=True)
class ImageSizes:
    """The sizes that an image has on its way."""

    padded: Size  # of its batch
    seen: Size  # as it was resized, without padding
    original: Size


def image_sizes(padding: Tensor, original: Sequence[Size]) -> list[ImageSizes]:
    """The sizes of the images of a batch, of their padding [B, H, W]."""
    inside = ~padding
    heights, widths = inside.any(2).sum(1).tolist(), inside.any(1).sum(1).tolist()
    height, width = padding.shape[1:]
    return [ImageSizes((height, width), seen, size) for seen, size in zip(zip(heights, widths, strict=True), original, strict=True)]


def to_original(logits: Tensor, sizes: ImageSizes) -> Tensor:
    """[K, h, w] masks over a padded image -> [K, H, W] over the original one: enlarged to the former, cut, and resized, as Mask2Former."""
    height, width = sizes.seen
    padded = interpolate(logits[None], sizes.padded, mode="bilinear", align_corners=False)[..., :height, :width]
    return interpolate(padded, sizes.original, mode="bilinear", align_corners=False)[0]


def instance_masks(
    masks: MaskPredictions, image: int, queries: Tensor, sizes: ImageSizes, encode: bool = True
) -> tuple[Tensor, EncodedMasks | None]:
    """The quality [K] of the masks of chosen queries at the last stage, and the masks: where the probability is above 0.5.

    Args:
        image: its position in the batch.
        queries: [K].
        encode: whether masks are wanted; else None is given for them.
    """
    of_image = replace(masks, queries=masks.queries[-1:, image : image + 1], pixels=masks.pixels[image : image + 1])
    at_once = max(1, PIXELS_AT_ONCE // max(sizes.original[0] * sizes.original[1], sizes.padded[0] * sizes.padded[1]))
    qualities, encoded = [torch.zeros(0, device=queries.device)], [EncodedMasks.of(torch.zeros(0, *sizes.original).bool().numpy())]
    for some in queries.split(at_once):
        logits = to_original(of_image.of(some[None])[0].float(), sizes)
        qualities.append(mask_quality(logits))
        if encode:
            encoded.append(EncodedMasks.of((logits > 0).cpu().numpy()))
    return torch.cat(qualities), EncodedMasks.cat(encoded) if encode else None
