"""What every detector's config tells: its sizes, and whether a file of another project is one of it.

A config is made, read and shown without the detector itself: `build` imports the file that has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from steadydetr.config import check_within
from steadydetr.nn.configs import BackboneConfig
from steadydetr.nn.named_tensors import NamedTensors

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.base import Detector


class DetectorConfig(ABC):
    """What a detector is built from: a frozen dataclass, which is saved beside its weights.

    It declares by these names, as fields or properties, the sizes that it has. None: it has no such size, or does not tell it.
    """

    queries: int | None = None
    levels: int | None = None  # of features
    heads: int | None = None  # of attention
    encoder_layers: int | None = None
    image_channels: int = 3  # of the images that it takes; see `Detector.take_channels`
    takes_boxes: bool = True  # see `Detector.takes_boxes`
    lacks: ClassVar[Mapping[str, str]] = {}  # fields that other detectors have, each with the reason why this one has it not

    @abstractmethod
    def build(self, num_classes: int) -> Detector:
        """The detector with its start weights, which are fetched where its backbone is a pretrained one."""

    def without_pretrained(self) -> DetectorConfig:
        """The same detector with random weights: nothing is fetched, because other weights are about to be loaded."""
        return self

    def settled(self) -> Self:
        """The same detector, with values for what it would look up elsewhere: what is saved of it then means the same for good."""
        return self

    @property
    def shares_heads(self) -> bool:
        """Whether all decoder stages share one class and one box head. Files of other projects hold copies of them for every stage."""
        return False

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """The config of the detector in another project's file, or None if the file is not one of this detector.

        `steadydetr convert` asks every registered config that defines this method itself; one that inherits it is not asked. Exactly
        one may recognise a file, so look for names that no other detector has.

        Raises:
            ValueError: it is this detector, but what a size is read from is missing; names it.
        """
        return None

    def split_queries(self, joint: Tensor) -> dict[str, Tensor]:
        """The tensors of learned queries, by name, of the one in which other projects keep them [N, 2D]: position, then content."""
        position, content = joint.chunk(2, 1)
        return {"query_position.weight": position, "query_content.weight": content}

    def rearranged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of another project's file, by our names, where values stand in another order or under another number in it."""
        return dict(tensors)

    def changed(self, **values: Any) -> Self:
        """The same config with other values of some fields."""
        return replace(self, **values)  # type: ignore[type-var]  # what derives from it is a dataclass

    def with_levels(self, levels: int) -> Self:
        """The same config with another number of feature levels, of one that declares it."""
        return self.changed(levels=levels)

    def with_image_channels(self, channels: int) -> Self:
        """The same config for images of another number of channels."""
        return self.changed(image_channels=channels)


class BackboneDetectorConfig(DetectorConfig):
    """The config of a detector of a backbone and queries: a frozen dataclass with these fields and others."""

    backbone: BackboneConfig
    queries: int

    def __post_init__(self) -> None:
        check_within("detector", self, queries=(1, 10**6))

    @property
    def image_channels(self) -> int:  # type: ignore[override]  # nothing writes it: configs are frozen
        return getattr(self.backbone, "image_channels", 3)  # a config of another package may not know it

    def with_image_channels(self, channels: int) -> Self:
        return self.changed(backbone=replace(self.backbone, image_channels=channels))  # type: ignore[type-var]

    def without_pretrained(self) -> Self:
        return self.changed(backbone=self.backbone.without_pretrained())

    def settled(self) -> Self:
        return self.changed(backbone=self.backbone.settled())


class TransformerDetectorConfig(BackboneDetectorConfig):
    """The config of a detector with an encoder and a decoder, whose sizes are apart."""

    transformer: Any  # a frozen dataclass with `heads` and `encoder_layers`

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.transformer.heads

    @property
    def encoder_layers(self) -> int:  # type: ignore[override]
        return self.transformer.encoder_layers


def with_transformer(config: DetectorConfig, **values: Any) -> TransformerDetectorConfig:
    """The same detector with other values in `config.transformer`; a ValueError where it has no such thing."""
    if not isinstance(config, TransformerDetectorConfig) or not all(hasattr(config.transformer, name) for name in values):
        reason = config.lacks.get("transformer", f"a {type(config).__name__} has no transformer that could have it")
        raise ValueError(f"{', '.join(values)}: {reason}")
    return config.changed(transformer=replace(config.transformer, **values))
