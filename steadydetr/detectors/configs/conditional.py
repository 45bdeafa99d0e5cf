"""Config of Conditional DETR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from steadydetr.config import check_within
from steadydetr.detectors.configs.base import TransformerDetectorConfig
from steadydetr.kinds import changeable, register
from steadydetr.nn.configs import BackboneConfig, FusionKind, TimmBackboneConfig, infer_backbone
from steadydetr.nn.named_tensors import NamedTensors

if TYPE_CHECKING:
    from steadydetr.detectors.conditional_detr import ConditionalDETR


@register("plain-transformer")
@dataclass(frozen=True)
class PlainTransformerConfig:
    """Sizes of an encoder and a decoder whose attention looks at all tokens of one level; defaults: Conditional DETR's."""

    width: int = 256
    heads: int = 8
    ffn: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    temperature: float = 10000.0  # of the sine position of feature maps
    position_offset: float = 0.0
    fusion: FusionKind = "none"  # of the memory with what went into the encoder (Stable-DINO Sec. 3)
    fusion_norm: bool = True  # LayerNorm after each fusion
    checkpointing: bool = changeable(False)  # recompute layers in the backward pass: less memory, same gradients

    def __post_init__(self) -> None:
        sizes = {"width": (4, 2**16), "heads": (1, 1000), "ffn": (1, 2**20), "encoder_layers": (0, 1000), "decoder_layers": (1, 1000)}
        check_within("transformer", self, **sizes, dropout=(0, 1), temperature=(1e-3, 1e9), position_offset=(-1e6, 1e6))
        if self.width % self.heads:
            raise ValueError(f"transformer.width = {self.width} is no multiple of transformer.heads = {self.heads}")
        if self.width % 4:
            raise ValueError(f"transformer.width = {self.width} is no multiple of 4, which sine positions need")
        if self.fusion != "none" and not self.encoder_layers:
            raise ValueError(f"transformer.fusion = {self.fusion} needs an encoder, but transformer.encoder_layers is 0")


C5 = TimmBackboneConfig(out_indices=(4,))


@register("conditional-detr")
@dataclass(frozen=True)
class ConditionalDETRConfig(TransformerDetectorConfig):
    """Defaults: the paper's with R50, on C5. DC5: `backbone.output_stride` 16. Of several maps of a backbone it takes the last."""

    backbone: BackboneConfig = C5
    transformer: PlainTransformerConfig = PlainTransformerConfig()
    queries: int = 300

    takes_boxes = False

    def build(self, num_classes: int) -> ConditionalDETR:
        from steadydetr.detectors.conditional_detr import ConditionalDETR

        return ConditionalDETR(self, num_classes)

    @property
    def shares_heads(self) -> bool:
        return True

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """What scales the sine of the reference is in no other detector."""
        if not tensors.has("decoder.sine_scale."):
            return None
        base, untraced = PlainTransformerConfig(), tensors.untraced
        queries, width = tensors.shape("query_position.weight")
        transformer = PlainTransformerConfig(
            width=width,
            heads=untraced.heads,
            ffn=tensors.shape("decoder.layers.0.ffn.linear1.weight")[0],
            encoder_layers=tensors.count("encoder.layers"),
            decoder_layers=tensors.count("decoder.layers"),
            temperature=base.temperature if untraced.temperature is None else untraced.temperature,
            position_offset=base.position_offset if untraced.position_offset is None else untraced.position_offset,
        )
        return cls(infer_backbone(tensors, last=True), transformer, queries)
