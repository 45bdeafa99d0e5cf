"""Deformable DETR (Zhu et al. 2021): plain, with iterative box refinement, two-stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

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
from steadydetr.nn.named_tensors import NamedTensors
from steadydetr.nn.positions import box_position
from steadydetr.structures import Memory, Queries, Stages, dense_proposals


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
        return DeformableDETR(self, num_classes)

    @property
    def shares_heads(self) -> bool:
        return not self.refine

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """Queries are learned as position and content, or made of proposals by a layer; the decoder computes no position vectors."""
        queries = tensors.has("query_position_and_content", "query_reference.", "proposal_position.", "proposal_position_norm.")
        if not queries or tensors.has("decoder.norm.", "decoder.position."):
            return None
        two_stage = tensors.has("proposal_")
        # where boxes are refined, the original code names the box heads in the decoder too; in mmdet only different values tell
        named_in_decoder = any(".decoder.bbox_embed." in key for key in tensors.original_keys)
        return cls(
            transformer=infer_transformer(tensors, TransformerConfig()),
            backbone=infer_backbone(tensors),
            queries=tensors.untraced.queries if two_stage else tensors.shape("query_position_and_content")[0],
            refine=named_in_decoder or not tensors.heads_are_tied,
            two_stage=two_stage,
        )


class DeformableDETR(DeformableDetector):
    look_forward_twice = False
    class_agnostic_proposals = True
    positioned = True
    eps = 1e-5

    def __init__(self, config: DeformableDETRConfig, num_classes: int) -> None:
        width = config.transformer.width
        decoder = Decoder(config.transformer, num_classes, position=None, norm=False, share_heads=not config.refine)
        super().__init__(config.backbone, config.transformer, num_classes, decoder)
        self.config, self.refine, self.makes_references = config, config.refine, not config.two_stage
        if config.two_stage:
            self.proposal_head = ProposalHead(width, num_classes)
            self.proposal_position = nn.Linear(2 * width, 2 * width)
            self.proposal_position_norm = nn.LayerNorm(2 * width)
            nn.init.xavier_uniform_(self.proposal_position.weight)
        else:
            self.query_content = nn.Embedding(config.queries, width)
            self.query_position = nn.Embedding(config.queries, width)
            self.query_reference = nn.Linear(width, 2)
            nn.init.xavier_uniform_(self.query_reference.weight)
            nn.init.zeros_(self.query_reference.bias)
            if config.refine and config.transformer.share_decoder:
                self.start_size = START_SIZE  # as a bias of the shared head it would make the box smaller at every stage  # D-56
            else:
                decoder.start_small()

    def queries(self, memory: Memory) -> dict[str, Queries]:
        return {"main": self._from_proposals(memory) if self.config.two_stage else self._learned(memory)}

    def _learned(self, memory: Memory) -> Queries:
        images = memory.tokens.shape[0]
        position = self.query_position.weight
        content, position, reference = (t.expand(images, -1, -1) for t in (self.query_content.weight, position, self.refer(position)))
        return Queries(content, reference, sized=False, position=position)

    def refer(self, position: Tensor) -> Tensor:
        """The references, without a size, that learned position vectors mean: [..., D] -> [..., 4]. One-stage only."""
        if not self.makes_references:
            return super().refer(position)
        centre = self.query_reference(position).sigmoid()
        return torch.cat((centre, torch.zeros_like(centre)), -1)

    def _from_proposals(self, memory: Memory) -> Queries:
        """Position and content are both made of the box. Tokens are ranked by the logit of class 0, which means "object" here."""
        dense = dense_proposals(memory)
        token, reference = select_tokens(dense, dense.logits[..., 0], self.config.queries)
        sine = box_position(reference, self.transformer.width // 2).to(memory.tokens.dtype)
        position, content = self.proposal_position_norm(self.proposal_position(sine)).chunk(2, -1)
        return Queries(content, reference, position=position, token=token)

    def proposals(self, memory: Memory, queries: Queries) -> Stages | None:
        """The proposals of all tokens, which are supervised as class 0."""
        if not self.config.two_stage:
            return None
        dense = dense_proposals(memory)
        return Stages(dense.logits[None], dense.boxes_unsigmoid.sigmoid()[None])
