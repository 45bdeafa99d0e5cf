"""DINO (Zhang et al. 2023): mixed query selection, look forward twice, contrastive denoising (objectives/denoising.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors.configs.deformable import DINOConfig
from steadydetr.detectors.deformable import Decoder, DeformableDetector, ProposalHead, select_tokens
from steadydetr.nn.decoder import AnchorPosition
from steadydetr.structures import Memory, Queries, dense_proposals, take_rows


class DINO(DeformableDetector):
    config: DINOConfig
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
        self.add_query_parts()
        self.label_content = nn.Embedding(num_classes + config.spare_label, width)

    def query_parts(self, count: int) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"proposal_head": ProposalHead(self.width, self.num_classes)}
        if self.config.mixed_selection:
            content = nn.Embedding(count, self.width)
            nn.init.xavier_uniform_(content.weight)
            parts["query_content"] = content
        return parts

    @property
    def embedded_labels(self) -> int:
        return self.label_content.num_embeddings

    def queries_of(self, memory: Memory, parts: Mapping[str, Any], ranks: slice) -> Queries:
        """Of tokens by their largest class logit; learned content goes with them by rank, the best of these first."""
        dense = dense_proposals(memory)
        token, reference = select_tokens(dense, dense.logits.amax(-1), ranks)
        if "query_content" in parts:
            content = parts["query_content"].weight[: token.shape[1]].expand(len(token), -1, -1)
        else:
            content = take_rows(dense.content, token).detach()
        return Queries(content, reference, token=token)

    def embed(self, labels: Tensor, boxes: Tensor) -> Queries:
        reference = inverse_sigmoid(boxes, self.eps).sigmoid()  # never quite 0 or 1
        return Queries(self.label_content(labels), reference)
