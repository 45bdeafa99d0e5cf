"""Deformable DETR (Zhu et al. 2021): plain, with iterative box refinement, two-stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steadydetr.detectors.configs.deformable import DeformableDETRConfig
from steadydetr.detectors.deformable import START_SIZE, Decoder, DeformableDetector, ProposalHead, select_tokens
from steadydetr.nn.decoder import AnchorPosition
from steadydetr.nn.positions import box_position
from steadydetr.structures import Memory, Queries, Stages, dense_proposals


class DeformableDETR(DeformableDetector):
    config: DeformableDETRConfig
    look_forward_twice = False
    class_agnostic_proposals = True
    positioned = True
    eps = 1e-5

    def __init__(self, config: DeformableDETRConfig, num_classes: int) -> None:
        width = config.transformer.width
        decoder = Decoder(config.transformer, num_classes, position=None, norm=False, share_heads=not config.refine)
        super().__init__(config.backbone, config.transformer, num_classes, decoder)
        self.config, self.refine, self.makes_references = config, config.refine, not config.two_stage
        self.add_query_parts()
        if config.two_stage:
            self.proposal_position = nn.Linear(2 * width, 2 * width)
            self.proposal_position_norm = nn.LayerNorm(2 * width)
            nn.init.xavier_uniform_(self.proposal_position.weight)
        else:
            self.query_reference = nn.Linear(width, 2)
            nn.init.xavier_uniform_(self.query_reference.weight)
            nn.init.zeros_(self.query_reference.bias)
            if config.refine and config.transformer.share_decoder:
                self.start_size = START_SIZE  # as a bias of the shared head it would make the box smaller at every stage  # D-56
            else:
                decoder.start_small()

    def query_parts(self, count: int) -> dict[str, nn.Module]:
        if self.config.two_stage:
            return {"proposal_head": ProposalHead(self.width, self.num_classes)}
        return {name: nn.Embedding(count, self.width) for name in ("query_content", "query_position")}

    def queries_of(self, memory: Memory, parts: Mapping[str, Any], ranks: slice) -> Queries:
        if self.config.two_stage:
            return self.proposed(memory, ranks)
        return self.learned(len(memory.tokens), parts["query_content"].weight, parts["query_position"].weight)

    def learned(self, images: int, content: Tensor, position: Tensor) -> Queries:
        """The queries of learned content and position vectors, [N, D] each, for so many images."""
        content, position, reference = (t.expand(images, -1, -1) for t in (content, position, self.refer(position)))
        return Queries(content, reference, sized=False, position=position)

    def refer(self, position: Tensor) -> Tensor:
        """The references, without a size, that learned position vectors mean: [..., D] -> [..., 4]. One-stage only."""
        if not self.makes_references:
            return super().refer(position)
        centre = self.query_reference(position).sigmoid()
        return torch.cat((centre, torch.zeros_like(centre)), -1)

    def proposed(self, memory: Memory, ranks: slice) -> Queries:
        """The queries of the tokens of these ranks. Position and content are both made of the box.

        Tokens are ranked by the logit of class 0, which means "object" here.
        """
        dense = dense_proposals(memory)
        token, reference = select_tokens(dense, dense.logits[..., 0], ranks)
        position, content = self._placed(reference, memory.tokens.dtype)
        return Queries(content, reference, position=position, token=token)

    def _placed(self, boxes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Position and content of the queries of boxes, [..., 4] -> [..., D] each. Two-stage only."""
        sine = box_position(boxes, self.transformer.width // 2).to(dtype)
        position, content = self.proposal_position_norm(self.proposal_position(sine)).chunk(2, -1)
        return position, content

    def new_position(self) -> AnchorPosition | None:
        """The two-stage detector has such a layer."""
        return None if self.config.two_stage else super().new_position()

    def position_of(self, layer: nn.Module | None, boxes: Tensor, content: Tensor) -> Tensor | None:
        return self._placed(boxes, content.dtype)[0] if self.config.two_stage else super().position_of(layer, boxes, content)

    def proposals(self, memory: Memory, queries: Queries) -> Stages | None:
        """The proposals of all tokens, which are supervised as class 0."""
        if not self.config.two_stage:
            return None
        dense = dense_proposals(memory)
        return Stages(dense.logits[None], dense.boxes_unsigmoid.sigmoid()[None])
