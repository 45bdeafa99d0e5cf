"""DINO (Zhang et al. 2023): mixed query selection, look forward twice, contrastive denoising (objectives/denoising.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor, nn

from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors.deformable import (
    Decoder,
    DeformableDetector,
    DeformableDetectorConfig,
    ProposalHead,
    TransformerConfig,
    infer_transformer,
    select_tokens,
)
from steadydetr.kinds import register
from steadydetr.nn.backbone import BackboneConfig, TimmBackboneConfig, infer_backbone
from steadydetr.nn.decoder import AnchorPosition
from steadydetr.nn.named_tensors import NamedTensors
from steadydetr.structures import Memory, Queries, dense_proposals, take_rows

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
        return DINO(self, num_classes)

    @property
    def shares_heads(self) -> bool:
        return self.share_heads

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """A norm after the decoder's layers is what DINO alone has. detrex trains it with the sine position of Deformable DETR."""
        if not tensors.has("decoder.norm."):
            return None
        base = replace(DINO_TRANSFORMER, temperature=10000.0, position_offset=-0.5) if tensors.layout == "detrex" else DINO_TRANSFORMER
        return cls(
            transformer=infer_transformer(tensors, base),
            backbone=infer_backbone(tensors),
            queries=tensors.shape("query_content.weight")[0],
            share_heads=tensors.heads_are_tied,
            spare_label=tensors.shape("label_content.weight")[0] > tensors.shape("class_heads.0.bias")[0],
        )


class DINO(DeformableDetector):
    refine = True
    embeds_labels = True
    label_parameters = ("label_content.weight",)
    eps = 1e-3

    def __init__(self, config: DINOConfig, num_classes: int) -> None:
        width = config.transformer.width
        position = AnchorPosition(width, scaled=False)
        decoder = Decoder(config.transformer, num_classes, position, norm=True, share_heads=config.share_heads)
        super().__init__(config.backbone, config.transformer, num_classes, decoder)
        self.config, self.look_forward_twice = config, config.look_forward_twice
        self.proposal_head = ProposalHead(width, num_classes)
        self.query_content = nn.Embedding(config.queries, width) if config.mixed_selection else None
        if self.query_content is not None:
            nn.init.xavier_uniform_(self.query_content.weight)
        self.label_content = nn.Embedding(num_classes + config.spare_label, width)

    def queries(self, memory: Memory) -> dict[str, Queries]:
        """The best tokens by their largest class logit; learned content goes with them by rank."""
        dense = dense_proposals(memory)
        token, reference = select_tokens(dense, dense.logits.amax(-1), self.config.queries)
        if self.query_content is None:
            content = take_rows(dense.content, token).detach()
        else:
            content = self.query_content.weight[: token.shape[1]].expand(len(token), -1, -1)
        return {"main": Queries(content, reference, token=token)}

    def embed(self, labels: Tensor, boxes: Tensor) -> Queries:
        reference = inverse_sigmoid(boxes, self.eps).sigmoid()  # never quite 0 or 1
        return Queries(self.label_content(labels), reference)
