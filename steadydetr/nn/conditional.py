"""The decoder layer of Conditional DETR (Meng et al. 2021, Sec. 3.2): content and position are projected apart.

Legend: B images, N queries, L tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steadydetr.nn.attention import AttentionPlan, attend, to_all
from steadydetr.nn.layers import FeedForward


class ConditionalSelfAttention(nn.Module):
    """Multi-head attention among queries; in queries and keys, content and position have projections of their own, which are added."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_content, self.query_position = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key_content, self.key_position = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, content: Tensor, position: Tensor, plan: AttentionPlan) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        query = self.query_content(content) + self.query_position(position)
        key = self.key_content(content) + self.key_position(position)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(query, key, self.value(content), self.heads, plan, dropout))


class ConditionalCrossAttention(nn.Module):
    """Multi-head attention of queries to tokens, whose weights are of content plus of position (Eq. 3).

    So that the two products are added, content and position stand side by side in every head. In the first layer, where the queries'
    content is still empty, position is also added to content.
    """

    def __init__(self, dim: int, heads: int, first: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_content, self.query_sine = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.query_position = nn.Linear(dim, dim) if first else None
        self.key_content, self.key_position = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        content: Tensor,  # [B, N, D]
        position: Tensor,  # [B, N, D]
        sine: Tensor,  # [B, N, D] of the reference, scaled by what the content says
        tokens: Tensor,  # [B, L, D]
        token_position: Tensor,  # [B, L, D]
        padding: Tensor,  # [B, L]
    ) -> Tensor:
        query, key, place = self.query_content(content), self.key_content(tokens), self.key_position(token_position)
        if self.query_position is not None:
            query, key = query + self.query_position(position), key + place
        query, key = self._beside(query, self.query_sine(sine)), self._beside(key, place)
        dropout = self.dropout if self.training else 0.0
        return self.out_proj(attend(query, key, self.value(tokens), self.heads, to_all(padding), dropout))

    def _beside(self, content: Tensor, position: Tensor) -> Tensor:
        """[B, N, D] each -> [B, N, 2D], in which each head has its part of both."""
        return torch.cat([tensor.unflatten(-1, (self.heads, -1)) for tensor in (content, position)], -1).flatten(-2)


class ConditionalDecoderLayer(nn.Module):
    """Self-attention within groups, conditional cross-attention, feed-forward; each with post-normalisation."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.self_attention = ConditionalSelfAttention(dim, heads, dropout)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attention = ConditionalCrossAttention(dim, heads, first, dropout)
        self.cross_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, hidden, dropout)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        sine: Tensor,
        tokens: Tensor,
        token_position: Tensor,
        padding: Tensor,
        plan: AttentionPlan,
    ) -> Tensor:
        """As `ConditionalCrossAttention`."""
        content = self.self_norm(content + self.dropout(self.self_attention(content, position, plan)))
        attended = self.cross_attention(content, position, sine, tokens, token_position, padding)
        return self.ffn(self.cross_norm(content + self.dropout(attended)))
