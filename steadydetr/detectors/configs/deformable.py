"""Configs of the deformable detectors: Deformable DETR, DAB-Deformable-DETR, DINO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, cast

from steadydetr.config import check_within
from steadydetr.detectors.configs.base import TransformerDetectorConfig
from steadydetr.detectors.configs.base import with_transformer as with_transformer
from steadydetr.kinds import changeable, register
from steadydetr.nn.configs import BackboneConfig, FusionKind, TimmBackboneConfig, infer_backbone
from steadydetr.nn.named_tensors import NamedTensors

if TYPE_CHECKING:
    from steadydetr.detectors.dab_deformable_detr import DABDeformableDETR
    from steadydetr.detectors.deformable_detr import DeformableDETR
    from steadydetr.detectors.dino import DINO


@register("transformer")
@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the deformable encoder and decoder; defaults: Deformable DETR's."""

    width: int = 256
    heads: int = 8
    ffn: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    levels: int = 4  # feature levels; more than the backbone's maps adds strided convolutions
    encoder_points: int = 4
    decoder_points: int = 4
    dropout: float = 0.1
    temperature: float = 10000.0  # of the sine position of feature maps; 20 in DINO
    position_offset: float = -0.5  # 0 in DINO
    norm_groups: int = 32  # of the neck's GroupNorm; divides width
    neck_bias: bool = True  # of the convolutions before GroupNorm; False in mmdet
    fusion: FusionKind = "none"  # of the memory with what went into the encoder (Stable-DINO Sec. 3)
    fusion_norm: bool = True  # LayerNorm after each fusion
    share_decoder: bool = False  # one set of parameters, heads included, for all decoder stages
    checkpointing: bool = changeable(False)  # recompute layers in the backward pass: less memory, same gradients

    def __post_init__(self) -> None:
        numbers = dict.fromkeys(("heads", "decoder_layers", "encoder_points", "decoder_points"), (1, 1000))
        sizes = {"width": (4, 2**16), "norm_groups": (1, 2**16), "ffn": (1, 2**20), "levels": (1, 32), "encoder_layers": (0, 1000)}
        check_within("transformer", self, **numbers, **sizes, dropout=(0, 1), temperature=(1e-3, 1e9), position_offset=(-1e6, 1e6))
        for name, divisor in (("heads", self.heads), ("norm_groups", self.norm_groups)):
            if self.width % divisor:
                raise ValueError(f"transformer.width = {self.width} is no multiple of transformer.{name} = {divisor}")
        if self.width % 4:
            raise ValueError(f"transformer.width = {self.width} is no multiple of 4, which sine positions need")
        if self.fusion != "none" and not self.encoder_layers:
            raise ValueError(f"transformer.fusion = {self.fusion} needs an encoder, but transformer.encoder_layers is 0")


def infer_transformer(tensors: NamedTensors, base: TransformerConfig) -> TransformerConfig:
    """`base` with what the names and shapes in another project's file tell, and with the options for what they do not tell.

    Raises:
        ValueError: a tensor is missing whose shape tells a size; names it.
    """
    levels, width = tensors.shape("level_embed")
    untraced, fusion = tensors.untraced, infer_fusion(tensors)
    per_point = untraced.heads * levels
    return replace(
        base,
        width=width,
        heads=untraced.heads,
        ffn=tensors.shape("encoder.layers.0.ffn.linear1.weight")[0],
        encoder_layers=tensors.count("encoder.layers"),
        decoder_layers=tensors.count("decoder.layers"),
        levels=levels,
        encoder_points=tensors.shape("encoder.layers.0.attention.attention_weights.bias")[0] // per_point,
        decoder_points=tensors.shape("decoder.layers.0.cross_attention.attention_weights.bias")[0] // per_point,
        temperature=base.temperature if untraced.temperature is None else untraced.temperature,
        position_offset=base.position_offset if untraced.position_offset is None else untraced.position_offset,
        fusion=fusion,
        fusion_norm=fusion == "none" or tensors.has("encoder.fusions.0.norm.weight"),
        neck_bias=bool(tensors.matching(r"neck\.convs\.\d+\.bias")),
    )


def infer_fusion(tensors: NamedTensors) -> FusionKind:
    """Stable-DINO's memory fusion. Our names only number the fusions, so the keys of the released code are looked at."""
    kinds = {"dense": "transformer.encoder.fusion_layer.", "simple": "transformer.fusion_run."}
    found = [kind for kind, prefix in kinds.items() if any(key.startswith(prefix) for key in tensors.original_keys)]
    return cast(FusionKind, "_".join(found) or "none")


class DeformableDetectorConfig(TransformerDetectorConfig):
    """The config of a detector of this family: a frozen dataclass with these fields and others."""

    transformer: TransformerConfig

    @property
    def levels(self) -> int:  # type: ignore[override]  # nothing writes it: configs are frozen
        return self.transformer.levels

    def with_levels(self, levels: int) -> Self:
        return self.changed(transformer=replace(self.transformer, levels=levels))


@register("deformable-detr")
@dataclass(frozen=True)
class DeformableDETRConfig(DeformableDetectorConfig):
    """Defaults: the paper's plain detector. Two-stage needs `refine`."""

    backbone: BackboneConfig = TimmBackboneConfig()
    transformer: TransformerConfig = TransformerConfig()
    queries: int = 300
    refine: bool = False  # iterative box refinement
    two_stage: bool = False  # queries from the encoder's best proposals

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_stage and not self.refine:
            raise ValueError("detector.two_stage needs detector.refine: proposals are boxes that the decoder refines")

    def build(self, num_classes: int) -> DeformableDETR:
        from steadydetr.detectors.deformable_detr import DeformableDETR

        return DeformableDETR(self, num_classes)

    @property
    def shares_heads(self) -> bool:
        return not self.refine

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """Queries are learned as position and content, or made of proposals by a layer; the decoder computes no position vectors."""
        queries = tensors.has("query_position_and_content", "query_reference.", "proposal_position.", "proposal_position_norm.")
        two_stage = tensors.has("proposal_")
        mixed = two_stage and tensors.has("query_position_and_content")  # H-Deformable-DETR
        if not queries or mixed or tensors.has("decoder.norm.", "decoder.position."):
            return None
        # where boxes are refined, the original code names the box heads in the decoder too; in mmdet only different values tell
        named_in_decoder = any(".decoder.bbox_embed." in key for key in tensors.original_keys)
        return cls(
            transformer=infer_transformer(tensors, TransformerConfig()),
            backbone=infer_backbone(tensors),
            queries=tensors.untraced.queries if two_stage else tensors.shape("query_position_and_content")[0],
            refine=named_in_decoder or not tensors.heads_are_tied,
            two_stage=two_stage,
        )


DAB_TRANSFORMER = TransformerConfig(ffn=2048, dropout=0.0)


@register("dab-deformable-detr")
@dataclass(frozen=True)
class DABDeformableDETRConfig(DeformableDetectorConfig):
    """Defaults: the one-stage detector of detrex with R50."""

    backbone: BackboneConfig = TimmBackboneConfig()
    transformer: TransformerConfig = DAB_TRANSFORMER
    queries: int = 300
    two_stage: bool = False  # anchors and content from the encoder's best proposals
    embeds_labels = False  # that of DN-DAB-Deformable-DETR does; no field

    def build(self, num_classes: int) -> DABDeformableDETR:
        from steadydetr.detectors.dab_deformable_detr import DABDeformableDETR

        return DABDeformableDETR(self, num_classes)

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """The decoder scales its position vectors, and has no norm after its layers, which DINO's has."""
        if not tensors.has("decoder.position.scale.") or tensors.has("decoder.norm.", "label_content."):
            return None
        two_stage = tensors.has("proposal_")
        return cls(
            transformer=infer_transformer(tensors, DAB_TRANSFORMER),
            backbone=infer_backbone(tensors),
            queries=tensors.untraced.queries if two_stage else tensors.shape("query_content.weight")[0],
            two_stage=two_stage,
        )


@register("dn-dab-deformable-detr")
@dataclass(frozen=True)
class DNDABDeformableDETRConfig(DeformableDetectorConfig):
    """The one-stage DAB-Deformable-DETR whose queries can be made of labels, for denoising. Defaults: detrex's with R50."""

    backbone: BackboneConfig = TimmBackboneConfig()
    transformer: TransformerConfig = DAB_TRANSFORMER
    queries: int = 300
    two_stage = False  # neither is a field
    embeds_labels = True

    def build(self, num_classes: int) -> DABDeformableDETR:
        from steadydetr.detectors.dab_deformable_detr import DABDeformableDETR

        return DABDeformableDETR(self, num_classes)

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """DAB-Deformable-DETR with an embedding of labels."""
        if not tensors.has("decoder.position.scale.") or not tensors.has("label_content."):
            return None
        transformer, queries = infer_transformer(tensors, DAB_TRANSFORMER), tensors.shape("query_content.weight")[0]
        return cls(transformer=transformer, backbone=infer_backbone(tensors), queries=queries)


DINO_TRANSFORMER = TransformerConfig(ffn=2048, dropout=0.0, temperature=20.0, position_offset=0.0)


@register("dino")
@dataclass(frozen=True)
class DINOConfig(DeformableDetectorConfig):
    """Defaults: DINO 4-scale with R50. 5-scale: a backbone map more (stride 4) and `transformer.levels` 5."""

    backbone: BackboneConfig = TimmBackboneConfig()
    transformer: TransformerConfig = DINO_TRANSFORMER
    queries: int = 900
    mixed_selection: bool = True  # boxes from the encoder, content learned; False: content from the encoder too
    look_forward_twice: bool = True
    share_heads: bool = True  # one class and one box head for all decoder stages; False in detrex
    spare_label: bool = True  # a row of the label embedding that stands for no class and is never drawn; False in detrex

    def build(self, num_classes: int) -> DINO:
        from steadydetr.detectors.dino import DINO

        return DINO(self, num_classes)

    @property
    def shares_heads(self) -> bool:
        return self.share_heads

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """A norm after the decoder's layers, and a layer that makes position vectors. detrex has the sine position of Deformable DETR."""
        if not tensors.has("decoder.norm.") or tensors.has("decoder.sine_scale.", "pixel_embedding."):
            return None
        base = replace(DINO_TRANSFORMER, temperature=10000.0, position_offset=-0.5) if tensors.layout == "detrex" else DINO_TRANSFORMER
        return cls(
            transformer=infer_transformer(tensors, base),
            backbone=infer_backbone(tensors),
            queries=tensors.shape("query_content.weight")[0],
            share_heads=tensors.heads_are_tied,
            spare_label=tensors.shape("label_content.weight")[0] > tensors.shape("class_heads.0.bias")[0],
        )
