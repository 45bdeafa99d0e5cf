"""One decoder layer, and the position vector that anchors give their queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steadydetr.nn.attention import AttentionPlan, SelfAttention
from steadydetr.nn.deformable_attention import DeformableAttention
from steadydetr.nn.layers import MLP, FeedForward
from steadydetr.nn.positions import box_position
from steadydetr.structures import Levels


class DecoderLayer(nn.Module):
    """Self-attention within groups, deformable cross-attention, feed-forward; each with post-normalisation."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = SelfAttention(dim, heads, dropout)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = DeformableAttention(dim, heads, levels, points)
        self.cross_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, hidden, dropout)

    def forward(
        self,
        content: Tensor,  # [B, N, D]
        position: Tensor,  # [B, N, D]
        reference: Tensor,  # [B, N, levels, 4]
        sized: bool | Tensor,
        tokens: Tensor,  # [B, L, D]
        padding: Tensor,  # [B, L]
        levels: Levels,
        plan: AttentionPlan,
    ) -> Tensor:
        content = self.self_norm(content + self.dropout(self.self_attention(content, position, plan)))
        value = self.cross_attention.project(tokens, padding)
        attended = self.cross_attention(content + position, reference, sized, value, levels)
        return self.ffn(self.cross_norm(content + self.dropout(attended)))


class AnchorPosition(nn.Module):
    """Position vector of a box: MLP of the sine embedding of (y, x, w, h) (DAB-DETR Eq. 3; DINO).

    With `scaled`, every stage after the first multiplies it by an MLP of the content (DAB-DETR Eq. 4).
    """

    def __init__(self, dim: int, scaled: bool) -> None:
        super().__init__()
        self.features = dim // 2
        self.head = MLP(2 * dim, dim, dim, 2)
        self.scale = MLP(dim, dim, dim, 2) if scaled else None

    def forward(self, stage: int, content: Tensor, reference: Tensor) -> Tensor:
        """Content [B, N, D] and reference [B, N, 4] (seen from level 0) -> [B, N, D]."""
        x, y, w, h = reference.unbind(-1)
        position = self.head(box_position(torch.stack((y, x, w, h), -1), self.features).to(content.dtype))
        return position if self.scale is None or stage == 0 else position * self.scale(content)
