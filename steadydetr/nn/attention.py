"""Self-attention among ragged query groups, by a plan made once a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """One group's rows of the concatenated queries, the rows that they look at, and what of those they see."""

    queries: slice
    keys: tuple[slice, ...]
    visible: Tensor | None  # [1 or B, 1, rows, keys] bool, None: everything


AttentionPlan = Sequence[Rows]
# what is added to the scores of the rows of a group, [1 or B, 1 or heads, rows, keys], from their slice and those of the rows they look at
Bias = Callable[[slice, tuple[slice, ...]], Tensor]


class SelfAttention(nn.Module):
    """Multi-head attention over the rows of each group; the projections are shared and run once over all rows.

    Parameters have the names and layout of `nn.MultiheadAttention`: in_proj [3D, D] and out_proj.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, content: Tensor, position: Tensor | None, plan: AttentionPlan, bias: Bias | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]. Queries and keys carry the position, if there is one; values do not.

        Args:
            bias: of every group; it changes no visibility.
        """
        dim = content.shape[-1]
        placed = F.linear(content if position is None else content + position, self.in_proj_weight[: 2 * dim], self.in_proj_bias[: 2 * dim])
        value = F.linear(content, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :])
        query, key = placed.chunk(2, -1)
        return self.out_proj(attend(query, key, value, self.heads, plan, self.dropout if self.training else 0.0, bias))


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, plan: AttentionPlan, dropout: float, bias: Bias | None = None) -> Tensor:
    """Multi-head attention of projected queries [B, N, E] to keys [B, M, E] and values [B, M, D], group by group of the plan: [B, N, D]."""
    query, key, value = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    mixed = []
    for rows in plan:
        keys, values = (pick(t, rows.keys) for t in (key, value))
        mask = rows.visible if bias is None else _masked(bias(rows.queries, rows.keys).to(query.dtype), rows.visible)
        mixed.append(F.scaled_dot_product_attention(query[:, :, rows.queries], keys, values, attn_mask=mask, dropout_p=dropout))
    return torch.cat(mixed, dim=2).transpose(1, 2).flatten(-2)


def to_all(padding: Tensor) -> AttentionPlan:
    """Every query attends to all tokens that are no padding, [B, L] bool."""
    return (Rows(slice(None), (slice(None),), ~padding[:, None, None]),)


def pick(tensor: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """The rows of these slices side by side, [..., N, D] -> [..., n, D]."""
    parts = [tensor[..., rows, :] for rows in slices]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _masked(bias: Tensor, visible: Tensor | None) -> Tensor:
    """The bias as torch's attention takes it, -inf where nothing is visible."""
    return bias if visible is None else bias.masked_fill(~visible, -torch.inf)
