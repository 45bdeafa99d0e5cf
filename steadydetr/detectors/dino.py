"""DINO (Zhang et al. 2023): mixed query selection, look forward twice, contrastive denoising (objectives/denoising.py)."""

from __future__ import annotations

from torch import Tensor, nn

from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors.configs.deformable import DINOConfig
from steadydetr.detectors.deformable import Decoder, DeformableDetector, ProposalHead, select_tokens
from steadydetr.nn.decoder import AnchorPosition
from steadydetr.structures import Memory, Queries, dense_proposals, take_rows


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
