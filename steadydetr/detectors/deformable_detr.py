"""Deformable DETR (Zhu et al. 2021): plain, with iterative box refinement, two-stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steadydetr.detectors.configs.deformable import DeformableDETRConfig
from steadydetr.detectors.deformable import START_SIZE, Decoder, DeformableDetector, ProposalHead, select_tokens
from steadydetr.nn.positions import box_position
from steadydetr.structures import Memory, Queries, Stages, dense_proposals


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
