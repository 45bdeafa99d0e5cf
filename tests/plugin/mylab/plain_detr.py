"""A detector: ordinary attention over the last map of a backbone; every decoder stage refines the boxes of the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from steadydetr import register
from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors.base import Detector, DetectorConfig
from steadydetr.detectors.deformable import resize_padding, valid_ratio
from steadydetr.detectors.query_groups import join_groups
from steadydetr.nn.attention import AttentionPlan, SelfAttention
from steadydetr.nn.backbone import BackboneConfig, SmallBackboneConfig
from steadydetr.nn.layers import FeedForward, box_head, class_head
from steadydetr.nn.positions import box_position, feature_position
from steadydetr.structures import DecodedStages, Memory, Queries, QueryGroup


@register("plain-detr")
@dataclass(frozen=True)
class PlainDETRConfig(DetectorConfig):
    """What is saved beside the weights."""

    backbone: BackboneConfig = SmallBackboneConfig()
    width: int = 64
    heads: int = 4
    layers: int = 2
    queries: int = 20

    def build(self, num_classes: int) -> PlainDETR:
        return PlainDETR(self, num_classes)

    def without_pretrained(self) -> PlainDETRConfig:
        return replace(self, backbone=self.backbone.without_pretrained())


class PlainDETR(Detector):
    """Learned anchors with their content as queries."""

    def __init__(self, config: PlainDETRConfig, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.width, self.stages = num_classes, config.width, config.layers
        self.backbone = config.backbone.build()
        self.normalise_for(self.backbone)  # as it was trained; without this line as ImageNet's pixels
        self.strides = tuple(self.backbone.strides[-1:])
        self.project = nn.Conv2d(self.backbone.channels[-1], config.width, 1)
        self.query_content = nn.Embedding(config.queries, config.width)
        self.query_anchor = nn.Embedding(config.queries, 4)  # before the sigmoid
        self.layers = nn.ModuleList(PlainLayer(config.width, config.heads) for _ in range(config.layers))
        self.class_head, self.box_head = class_head(config.width, num_classes), box_head(config.width)

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        features = self.project(self.backbone(self.normalise(images, padding))[-1])
        height, width = features.shape[-2:]
        mask = resize_padding(padding, (height, width))
        tokens = (features + feature_position(mask, self.width, dtype=features.dtype).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return Memory(tokens, mask.flatten(1), ((height, width),), valid_ratio(mask)[:, None], tokens)

    def queries(self, memory: Memory) -> dict[str, Queries]:
        content, anchor = (e.weight.expand(len(memory.tokens), -1, -1) for e in (self.query_content, self.query_anchor))
        return {"main": Queries(content, anchor.sigmoid())}

    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, DecodedStages]:
        joined = join_groups(groups)
        content, reference = joined.content, joined.reference
        contents, boxes, references = [], [], []
        for layer in self.layers:
            content = layer(content, box_position(reference, self.width // 4).to(content.dtype), memory, joined.plan)
            contents.append(content)
            references.append(reference)
            boxes.append((self.box_head(content) + inverse_sigmoid(reference)).sigmoid())
            reference = boxes[-1].detach()
        stages = torch.stack(contents)
        decoded = DecodedStages(self.class_head(stages), torch.stack(boxes), content=stages, reference=torch.stack(references))
        return joined.split(decoded)

    def keep_classes(self, classes: Sequence[int]) -> None:
        rows, head = list(classes), self.class_head
        head.weight, head.bias = nn.Parameter(head.weight[rows].detach()), nn.Parameter(head.bias[rows].detach())
        self.num_classes = len(rows)


class PlainLayer(nn.Module):
    """Self-attention within each query group, attention to the image, feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attention, self.self_norm = SelfAttention(width, heads), nn.LayerNorm(width)
        self.cross_attention, self.cross_norm = nn.MultiheadAttention(width, heads, batch_first=True), nn.LayerNorm(width)
        self.ffn = FeedForward(width, 2 * width)

    def forward(self, content: Tensor, position: Tensor, memory: Memory, plan: AttentionPlan) -> Tensor:
        content = self.self_norm(content + self.self_attention(content, position, plan))
        tokens = memory.tokens
        attended, _ = self.cross_attention(content + position, tokens, tokens, key_padding_mask=memory.padding, need_weights=False)
        return self.ffn(self.cross_norm(content + attended))
