"""DAB-Deformable-DETR (Liu et al. 2022): learned 4-d anchors as queries, one- and two-stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from steadydetr.detectors.deformable import (
    START_SIZE,
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

DAB_TRANSFORMER = TransformerConfig(ffn=2048, dropout=0.0)


@register("dab-deformable-detr")
@dataclass(frozen=True)
class DABDeformableDETRConfig(DeformableDetectorConfig):
    """Defaults: the one-stage detector of detrex with R50."""

    backbone: BackboneConfig = TimmBackboneConfig()
    transformer: TransformerConfig = DAB_TRANSFORMER
    queries: int = 300
    two_stage: bool = False  # anchors and content from the encoder's best proposals

    def build(self, num_classes: int) -> DABDeformableDETR:
        return DABDeformableDETR(self, num_classes)

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """The decoder scales its position vectors, and has no norm after its layers, which DINO's has."""
        if not tensors.has("decoder.position.scale.") or tensors.has("decoder.norm."):
            return None
        two_stage = tensors.has("proposal_")
        return cls(
            transformer=infer_transformer(tensors, DAB_TRANSFORMER),
            backbone=infer_backbone(tensors),
            queries=tensors.untraced.queries if two_stage else tensors.shape("query_content.weight")[0],
            two_stage=two_stage,
        )


class DABDeformableDETR(DeformableDetector):
    refine = True
    look_forward_twice = False
    eps = 1e-3

    def __init__(self, config: DABDeformableDETRConfig, num_classes: int) -> None:
        width = config.transformer.width
        decoder = Decoder(config.transformer, num_classes, AnchorPosition(width, scaled=True), norm=False, share_heads=False)
        super().__init__(config.backbone, config.transformer, num_classes, decoder)
        self.config = config
        if config.two_stage:
            self.proposal_head = ProposalHead(width, num_classes)
        else:
            self.query_content = nn.Embedding(config.queries, width)
            self.query_anchor = nn.Embedding(config.queries, 4)  # before the sigmoid
            if config.transformer.share_decoder:
                with torch.no_grad():  # as a bias of the shared head it would make the box smaller at every stage  # D-56
                    self.query_anchor.weight[:, 2:] += START_SIZE
            else:
                decoder.start_small()

    def queries(self, memory: Memory) -> dict[str, Queries]:
        if not self.config.two_stage:
            images = memory.tokens.shape[0]
            content, anchor = (e.weight.expand(images, -1, -1) for e in (self.query_content, self.query_anchor))
            return {"main": Queries(content, anchor.sigmoid())}
        dense = dense_proposals(memory)
        token, reference = select_tokens(dense, dense.logits.amax(-1), self.config.queries)
        return {"main": Queries(take_rows(dense.content, token).detach(), reference, token=token)}
