"""What every detector offers, and how its last stage becomes detections.

Objectives, teachers and measures know detectors by this page alone. What not every detector can do is declared by class attributes
(`embeds_labels`, `positioned`, `makes_references`, ...), so that a detector of another package can declare it too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from steadydetr.boxes import to_xyxy
from steadydetr.data.masks import EncodedMasks
from steadydetr.detectors.configs.base import DetectorConfig as DetectorConfig  # a detector of another package imports both from here
from steadydetr.detectors.instance_masks import ImageSizes, image_sizes, instance_masks
from steadydetr.files import counted
from steadydetr.kinds import nearest
from steadydetr.nn.configs import IMAGENET_MEAN, IMAGENET_STD
from steadydetr.nn.decoder import AnchorPosition
from steadydetr.nn.initialisation import initialise
from steadydetr.structures import DecodedStages, MaskPredictions, Memory, Queries, QueryGroup, Stages, take_rows


class Detector(nn.Module, ABC):
    """Images to memory, memory to queries, query groups to stages of predictions. It knows no loss and no training method."""

    num_classes: int
    width: int  # channels of its tokens and queries
    stages: int  # of its decoder
    strides: tuple[int, ...]  # of the levels of its memory, in pixels, fine to coarse
    mean: Tensor
    std: Tensor

    # capabilities
    predicts_masks: bool = False  # its stages have `masks`
    starts_from_masks: bool = False  # what its queries start from depends on masks
    mask_parameters: tuple[str, ...] = ()  # the names of those that only masks use
    undecoded_stages: int = 0  # of `stages`, the first ones, which are predicted before any layer of the decoder
    embeds_labels: bool = False  # `embed` makes queries of labels and boxes by layers of its own; others get them for denoising alone
    label_parameters: tuple[str, ...] = ()  # the names of those that `embed` alone uses
    positioned: bool = False  # every query brings a position vector; False: the decoder makes it from the reference
    makes_references: bool = False  # `refer` makes references of the position vectors of learned queries
    takes_boxes: bool = True  # a query's reference may be a box; False: it is a point for good, which has no size
    samples_points: bool = False  # its decoder samples the image at points, which `record_sampling_points` gives
    class_agnostic_proposals: bool = False  # the encoder's proposals tell objects from background only, as label 0
    # the query groups that `queries` gives besides "main", in training alone, and the names of the parameters that each alone uses
    extra_groups: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    makes_queries: bool = False  # `new_queries` and `further_queries` make further queries like its own

    frozen_parts: tuple[str, ...] = ()  # see `freeze`

    def __init__(self) -> None:
        super().__init__()
        self.normalise_for(nn.Identity())  # a backbone may say otherwise

    def normalise_for(self, backbone: nn.Module) -> None:
        """Normalise pixels by the `mean` and `std` that the backbone states; by ImageNet's where it states none."""
        mean, std = getattr(backbone, "mean", IMAGENET_MEAN), getattr(backbone, "std", IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def embedded_labels(self) -> int:
        """How many labels `embed` takes, from 0 on: those of the classes and, in some detectors, one that stands for no class."""
        return self.num_classes

    @property
    def image_channels(self) -> int:
        """Of the images that it takes: 3 unless `take_channels` has said otherwise."""
        return len(self.mean)

    def take_channels(self, channels: int) -> None:
        """Take images of so many channels: one is normalised by the average of red, green and blue, others by these three in turn."""
        for name in ("mean", "std") if channels != self.image_channels else ():
            values: Tensor = getattr(self, name)
            rows = torch.arange(channels) % len(values)
            self.register_buffer(name, values.mean(0, keepdim=True) if channels == 1 else values[rows], persistent=False)

    def normalise(self, images: Tensor, padding: Tensor) -> Tensor:
        """Images [B, C, H, W] in 0..1, or uint8, to what the backbone expects; zero in the padding. Channels last, which is faster."""
        if images.shape[1] != len(self.mean):
            raise ValueError(f"{self.architecture} takes images of {counted(len(self.mean), 'channel')}, and these have {images.shape[1]}")
        dtype = self.mean.dtype
        pixels = images.to(dtype).div_(255) if images.dtype == torch.uint8 else images.to(dtype)
        pixels = (pixels - self.mean).div_(self.std).masked_fill_(padding[:, None], 0)
        return pixels.contiguous(memory_format=torch.channels_last)

    def freeze(self, parts: Sequence[str]) -> None:
        """Train these parts no more: their parameters get no gradient, and they stay in evaluation mode, with dropout and norms fixed.

        Args:
            parts: names of modules or parameters, such as backbone, encoder, decoder.layers.0.

        Raises:
            ValueError: there is no such part; names the nearest.
        """
        modules = {name for name, _ in self.named_modules()} - {""}
        for part in parts:
            frozen = [p for name, p in self.named_parameters() if name == part or name.startswith(f"{part}.")]
            if not frozen:
                names = sorted(modules | {name for name, _ in self.named_parameters()})
                raise ValueError(f"training.freeze: {self.architecture} has no part {part!r} with parameters{nearest(part, names)}")
            for parameter in frozen:
                parameter.requires_grad_(False)
        self.frozen_parts = tuple(part for part in parts if part in modules)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"training.freeze = {', '.join(parts)} leaves nothing of {self.architecture} to train")
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.frozen_parts:
            self.get_submodule(part).eval()
        return self

    @property
    def architecture(self) -> str:
        """Its name in messages. Detectors of one architecture can be compared query by query."""
        return type(self).__name__

    @abstractmethod
    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        """Images [B, C, H, W] and padding [B, H, W] -> memory."""

    @abstractmethod
    def queries(self, memory: Memory) -> dict[str, Queries]:
        """The detector's own queries, "main" first; extra groups only in training."""

    @abstractmethod
    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, DecodedStages]:
        """One pass of all groups; the predictions of every stage by group name."""

    @abstractmethod
    def keep_classes(self, classes: Sequence[int]) -> None:
        """From here on the decoder scores these classes alone, in this order. Proposals are chosen as before."""

    def proposals(self, memory: Memory, queries: Queries) -> Stages | None:
        """The encoder's predictions that are supervised, as one stage; None for one-stage detectors."""
        return None

    def embed(self, labels: Tensor, boxes: Tensor) -> Queries:
        """Queries that say a class and a box: labels [B, N], boxes [B, N, 4]. Of detectors that `embeds_labels`."""
        raise ValueError(f"{self.architecture} has no layer for labels of its own")

    def new_position(self) -> AnchorPosition | None:
        """The layer by which `position_of` makes position vectors, with start values; None: it needs none, or has one itself."""
        if not self.positioned:
            return None
        layer = AnchorPosition(self.width, scaled=False)
        initialise(layer)
        return layer

    def position_of(self, layer: nn.Module | None, boxes: Tensor, content: Tensor) -> Tensor | None:
        """The position vectors of queries that are about boxes [B, N, 4], of the width of their content; None: the decoder makes them."""
        return None if layer is None else layer(0, content, boxes)

    def new_queries(self, count: int | None = None) -> nn.Module:
        """What further queries are made of, with start values: parameters for training alone. Of detectors that `makes_queries`.

        Args:
            count: how many; those of a two-stage detector come from the next best tokens after its own, and often need no parameters.
                None: a group like its own, which in a two-stage detector selects tokens by a proposal head of its own.
        """
        raise ValueError(f"{self.architecture} makes no further queries")

    def further_queries(self, memory: Memory, parts: nn.Module, count: int | None = None) -> tuple[Queries, Stages | None]:
        """The queries of what `new_queries` made for this count, and the predictions of their proposal head, if they have one."""
        raise ValueError(f"{self.architecture} makes no further queries")

    def refer(self, position: Tensor) -> Tensor:
        """The references, without a size, of position vectors: [..., D] -> [..., 4]. Of detectors that `makes_references`."""
        raise ValueError(f"{self.architecture} has no layer that makes references of position vectors")

    def learned_queries(self) -> Mapping[str, nn.Parameter]:
        """The parameters that its queries are made of, by their names, which begin with `query_`; none for many two-stage detectors.

        They are content, anchors or position vectors, and the layers that make references of these.
        """
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith("query_")}

    def compiled_parts(self) -> Iterable[nn.Module]:
        """What `training.compile` compiles, each module by itself, which gives small graphs without breaks; nothing by default."""
        return ()

    def record_sampling_points(self) -> AbstractContextManager[list[tuple[Tensor, Tensor]]]:
        """A context in which `decode` appends to a list, for every stage, where each query samples the image and with which weights.

        Of detectors that `samples_points`. Locations are [B, N, heads, levels, points, 2], x and y in 0..1 of the padded image;
        weights are [B, N, heads, levels, points].
        """
        raise ValueError(f"{self.architecture} has no deformable attention, so no sampling points to draw")

    def forward(self, images: Tensor, padding: Tensor) -> DecodedStages:
        """Inference: the main queries' predictions at every stage."""
        memory = self.encode(images, padding)
        return self.decode(memory, [QueryGroup("main", self.queries(memory)["main"])])["main"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside of the block; afterwards the mode from before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True)
class Prediction:
    """What is detected in one image, the highest score first."""

    boxes_xyxy: Tensor  # [K, 4] pixels
    scores: Tensor  # [K]
    labels: Tensor  # [K]
    masks: EncodedMasks | None = None  # of the size of the image; of detectors that predict them, where they are asked for

    def take(self, rows: Tensor) -> Prediction:
        """The detections in these rows, in that order."""
        masks = None if self.masks is None else self.masks.take(rows.cpu().numpy())
        return Prediction(self.boxes_xyxy[rows], self.scores[rows], self.labels[rows], masks)


def postprocess(
    stages: Stages,
    sizes: Sequence[tuple[int, int]],
    top: int = 300,
    nms: float | None = None,
    padding: Tensor | None = None,
    masks: bool = True,
) -> list[Prediction]:
    """The detections of the last stage in each image, scores descending, boxes in pixels.

    The `top` best of queries x classes by sigmoid score; of a detector that predicts masks, their scores are then multiplied by the
    quality of the masks (D-204). Then, if `nms` is an IoU, class-wise suppression. Boxes are not clipped.

    Args:
        sizes: (height, width) in pixels that the normalised boxes of each image span.
        padding: [B, H, W] of the images; needed of a detector that predicts masks.
        masks: whether masks are wanted, besides their quality.
    """
    logits = stages.logits[-1].float()
    # an overflow is no certainty; NaN sorts first, so that it is seen
    scores = logits.sigmoid().masked_fill(logits == torch.inf, torch.nan)
    classes = scores.shape[-1]
    best, index = scores.flatten(1).topk(min(top, scores.shape[1] * classes))
    labels, rows = index % classes, index // classes
    scale = torch.tensor([(w, h, w, h) for h, w in sizes], device=scores.device, dtype=torch.float32)
    boxes = take_rows(to_xyxy(stages.boxes[-1].float()), rows) * scale[:, None]
    found = [Prediction(*of_image) for of_image in zip(boxes, best, labels, strict=True)]
    if stages.masks is not None:
        if padding is None:
            raise ValueError("the masks of a detector are over padded images: postprocess needs their padding")
        every = image_sizes(padding, sizes)
        found = [_with_masks(one, stages.masks, i, rows[i], every[i], masks) for i, one in enumerate(found)]
    if nms is None:
        return found
    return [one.take(batched_nms(one.boxes_xyxy, one.scores, one.labels, nms)) for one in found]


def _with_masks(found: Prediction, masks: MaskPredictions, image: int, queries: Tensor, sizes: ImageSizes, wanted: bool) -> Prediction:
    quality, encoded = instance_masks(masks, image, queries, sizes, wanted)
    scores = found.scores * quality
    return replace(found, scores=scores, masks=encoded).take(scores.argsort(descending=True, stable=True))
