"""DAB-Deformable-DETR (Liu et al. 2022): learned 4-d anchors as queries, one- and two-stage."""

from __future__ import annotations

import torch
from torch import nn

from steadydetr.detectors.configs.deformable import DABDeformableDETRConfig
from steadydetr.detectors.deformable import START_SIZE, Decoder, DeformableDetector, ProposalHead, select_tokens
from steadydetr.nn.decoder import AnchorPosition
from steadydetr.structures import Memory, Queries, dense_proposals, take_rows


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
