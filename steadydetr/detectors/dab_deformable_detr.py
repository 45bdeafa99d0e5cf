"""DAB-Deformable-DETR (Liu et al. 2022): learned 4-d anchors as queries, one- and two-stage.

In DN-DAB-Deformable-DETR (Li et al. 2022) queries can be made of labels too; the last channel of the content tells them from others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors.configs.deformable import DABDeformableDETRConfig, DNDABDeformableDETRConfig
from steadydetr.detectors.deformable import START_SIZE, Decoder, DeformableDetector, ProposalHead, select_tokens
from steadydetr.nn.decoder import AnchorPosition
from steadydetr.structures import Memory, Queries, dense_proposals, take_rows


class DABDeformableDETR(DeformableDetector):
    config: DABDeformableDETRConfig | DNDABDeformableDETRConfig
    refine = True
    look_forward_twice = False
    eps = 1e-3

    def __init__(self, config: DABDeformableDETRConfig | DNDABDeformableDETRConfig, num_classes: int) -> None:
        width = config.transformer.width
        decoder = Decoder(config.transformer, num_classes, AnchorPosition(width, scaled=True), norm=False, share_heads=False)
        super().__init__(config.backbone, config.transformer, num_classes, decoder)
        self.config, self.embeds_labels = config, config.embeds_labels
        self.add_query_parts()
        if not config.two_stage and not config.transformer.share_decoder:
            decoder.start_small()
        if config.embeds_labels:
            self.label_content = nn.Embedding(num_classes + 1, width - 1)  # the last row stands for no class
            self.label_parameters = ("label_content.weight",)

    def query_parts(self, count: int) -> dict[str, nn.Module]:
        if self.config.two_stage:
            return {"proposal_head": ProposalHead(self.width, self.num_classes)}
        content = nn.Embedding(count, self.width - self.config.embeds_labels)
        anchor = nn.Embedding(count, 4)  # before the sigmoid
        if self.config.transformer.share_decoder:
            with torch.no_grad():  # as a bias of the shared head it would make the box smaller at every stage  # D-56
                anchor.weight[:, 2:] += START_SIZE
        return {"query_content": content, "query_anchor": anchor}

    def queries_of(self, memory: Memory, parts: Mapping[str, Any], ranks: slice) -> Queries:
        if not self.config.two_stage:
            images = memory.tokens.shape[0]
            content, anchor = (parts[name].weight.expand(images, -1, -1) for name in ("query_content", "query_anchor"))
            return Queries(pad(content, (0, 1)) if self.embeds_labels else content, anchor.sigmoid())
        dense = dense_proposals(memory)
        token, reference = select_tokens(dense, dense.logits.amax(-1), ranks)
        return Queries(take_rows(dense.content, token).detach(), reference, token=token)

    @property
    def embedded_labels(self) -> int:
        return self.label_content.num_embeddings if self.embeds_labels else self.num_classes

    def embed(self, labels: Tensor, boxes: Tensor) -> Queries:
        if not self.embeds_labels:
            return super().embed(labels, boxes)
        reference = inverse_sigmoid(boxes, self.eps).sigmoid()  # never quite 0 or 1
        return Queries(pad(self.label_content(labels), (0, 1), value=1.0), reference)
