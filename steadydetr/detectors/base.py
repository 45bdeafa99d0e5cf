"""What every detector offers, and how its last stage becomes detections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from steadydetr.boxes import to_xyxy
from steadydetr.structures import Memory, Queries, QueryGroup, Stages

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Detector(nn.Module, ABC):
    """Images to memory, memory to queries, query groups to stages of predictions. It knows no loss and no training method."""

    num_classes: int
    width: int  # of its tokens and queries
    stages: int  # of its decoder
    strides: tuple[int, ...]  # of the levels of its memory, in pixels, fine to coarse
    mean: Tensor
    std: Tensor
    class_agnostic_proposals = False  # the encoder's proposals tell objects from background only, as label 0 (Deformable DETR)
    positioned = False  # queries bring a position vector, every group of them (Deformable DETR); False: the decoder makes it from the box

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def normalise(self, images: Tensor, padding: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1, or uint8, to what the backbone expects; zero in the padding. Channels last, which is faster."""
        dtype = self.mean.dtype
        pixels = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        pixels = ((pixels - self.mean) / self.std).masked_fill(padding[:, None], 0)
        return pixels.contiguous(memory_format=torch.channels_last)

    @property
    def architecture(self) -> str:
        return type(self).__name__

    @abstractmethod
    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """Images [B, 3, H, W] and padding [B, H, W] -> memory."""

    @abstractmethod
    def queries(self, memory: Memory) -> dict[str, Queries]:
        """The detector's own queries, "main" first; extra groups only in training."""

    @abstractmethod
    def proposals(self, memory: Memory, queries: Queries) -> Stages | None:
        """The encoder's predictions that are supervised, as one stage; None for one-stage detectors."""

    @abstractmethod
    def embed(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Queries that say a class and a box, for denoising: labels [B, N], boxes [B, N, 4]."""

    @abstractmethod
    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, Stages]:
        """One pass of all groups; the predictions of every stage by group name."""

    @abstractmethod
    def keep_classes(self, classes: Sequence[int]) -> None:
        """From here on the decoder scores these classes alone, in this order. Proposals are chosen as before."""

    def forward(self, images: Tensor, padding: Tensor) -> Stages:
        """Inference: the main queries' predictions at every stage."""
        memory = self.encode(images, padding)
        return self.decode(memory, [QueryGroup("main", self.queries(memory)["main"])])["main"]


def postprocess(
    stages: Stages, sizes: Sequence[tuple[int, int]], top: int = 300, nms: float | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The last stage as (boxes_xyxy in pixels [K, 4], scores [K], labels [K]) of each image, scores descending.

    The `top` best of queries x classes by sigmoid score, then, if `nms` is an IoU, class-wise suppression. Boxes are not clipped.

    Args:
        sizes: (height, width) in pixels that the normalised boxes of each image span.
    """
    scores = stages.logits[-1].float().sigmoid()
    classes = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(top, scores.shape[1] * classes))
    labels, rows = index % classes, index // classes
    scale = torch.tensor([(w, h, w, h) for h, w in sizes], device=scores.device, dtype=torch.float32)
    boxes = to_xyxy(stages.boxes[-1].float()).gather(1, rows[..., None].expand(-1, -1, 4)) * scale[:, None]
    results = []
    for image_boxes, image_scores, image_labels in zip(boxes, best, labels, strict=True):
        keep = slice(None) if nms is None else batched_nms(image_boxes, image_scores, image_labels, nms)
        results.append((image_boxes[keep], image_scores[keep], image_labels[keep]))
    return results
