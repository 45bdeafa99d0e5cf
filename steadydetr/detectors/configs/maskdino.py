"""Config of MaskDINO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

from steadydetr.detectors.configs.deformable import DeformableDetectorConfig, TransformerConfig, infer_transformer
from steadydetr.kinds import register
from steadydetr.nn.configs import BackboneConfig, TimmBackboneConfig, infer_backbone
from steadydetr.nn.named_tensors import NamedTensors

if TYPE_CHECKING:
    from torch import Tensor

    from steadydetr.detectors.maskdino import MaskDINO

BoxInit = Literal["no", "bitmask", "mask2box"]
MASKDINO_TRANSFORMER = TransformerConfig(ffn=2048, decoder_layers=9, dropout=0.0, temperature=10000.0, position_offset=0.0)
MASKDINO_BACKBONE = TimmBackboneConfig(out_indices=(1, 2, 3, 4), frozen_stages=0)
# how the official config with so many levels, with the finest map among them or not, starts its boxes; files do not say
OFFICIAL_BOX_INIT: dict[tuple[int, bool], BoxInit] = {(3, False): "bitmask", (4, False): "mask2box", (4, True): "no", (5, True): "bitmask"}
PER_LEVEL = ("sampling_offsets.weight", "sampling_offsets.bias", "attention_weights.weight", "attention_weights.bias")


@register("maskdino")
@dataclass(frozen=True)
class MaskDINOConfig(DeformableDetectorConfig):
    """Defaults: the official `maskdino_R50_bs16_50ep_3s_dowsample1_2048`. The first map of the backbone is that of masks."""

    backbone: BackboneConfig = MASKDINO_BACKBONE
    transformer: TransformerConfig = MASKDINO_TRANSFORMER
    queries: int = 300
    encoder_ffn: int | None = None  # None: as in the decoder, transformer.ffn
    fine_level: bool = False  # the backbone's first map is a level of the encoder too
    box_init: BoxInit = "mask2box"  # boxes start around the masks of their queries (bitmask, mask2box), or as proposed by the encoder (no)
    coarse_anchors_first: bool = True  # proposals of the coarsest level have the smallest boxes; False: those of the finest, as in DINO
    learned_content: bool = False  # content of queries is learned; False: it comes from the encoder

    def build(self, num_classes: int) -> MaskDINO:
        from steadydetr.detectors.maskdino import MaskDINO

        return MaskDINO(self, num_classes)

    @property
    def shares_heads(self) -> bool:
        return True

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """It embeds pixels. The order of the levels is that of the convolutions of the neck, whose maps have ever more channels."""
        if not tensors.has("pixel_embedding."):
            return None
        transformer = infer_transformer(tensors, MASKDINO_TRANSFORMER)
        ffn, encoder_ffn = tensors.shape("decoder.layers.0.ffn.linear1.weight")[0], transformer.ffn
        channels = map_channels(tensors.tensors)
        fine = len(channels) > 3
        backbone = infer_backbone(tensors)
        first = backbone.out_indices[-1] - 3
        return cls(
            backbone=replace(backbone, out_indices=tuple(range(first, first + 4)), frozen_stages=0),
            transformer=replace(transformer, ffn=ffn),
            queries=tensors.shape("query_content.weight")[0] if tensors.has("query_content.") else tensors.untraced.queries,
            encoder_ffn=None if encoder_ffn == ffn else encoder_ffn,
            fine_level=fine,
            box_init=OFFICIAL_BOX_INIT.get((transformer.levels, fine), "no"),
            coarse_anchors_first=channels == sorted(channels),
            learned_content=tensors.has("query_content."),
        )

    def rearranged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Levels from fine to coarse everywhere. Originally the decoder's order is the reverse of the encoder's (D-188)."""
        maps, found = len(map_channels(tensors)), {}
        for name, tensor in tensors.items():
            part = "decoder" if self.coarse_anchors_first else "encoder"
            if name.startswith(f"{part}.layers.") and name.endswith(PER_LEVEL):
                by_level = tensor.unflatten(0, (self.transformer.heads, self.transformer.levels, -1))
                found[name] = by_level.flip(1).flatten(0, 2)
            elif name == "level_embed" and not self.coarse_anchors_first:
                found[name] = tensor.flip(0)
            elif name.startswith("neck.") and not self.coarse_anchors_first:
                first, kind, number, rest = name.split(".", 3)
                number = str(maps - 1 - int(number)) if int(number) < maps else number
                found[f"{first}.{kind}.{number}.{rest}"] = tensor
            else:
                found[name] = tensor
        return found


def map_channels(tensors: Mapping[str, Tensor]) -> list[int]:
    """Channels of the backbone's maps in the order of the neck's convolutions, of which further levels have larger ones."""
    weights = [tensors[name] for number in range(len(tensors)) if (name := f"neck.convs.{number}.weight") in tensors]
    return [weight.shape[1] for weight in weights if weight.shape[-1] == 1]
