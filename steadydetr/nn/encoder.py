"""Encoders over the tokens of all levels, deformable and plain, with the memory fusions of Stable-DINO (Sec. 3, Fig. 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steadydetr.nn.attention import SelfAttention, to_all
from steadydetr.nn.configs import FusionKind
from steadydetr.nn.deformable_attention import DeformableAttention
from steadydetr.nn.layers import FeedForward
from steadydetr.structures import Levels


class EncoderLayer(nn.Module):
    """Deformable self-attention of the tokens, then feed-forward; each with post-normalisation."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, hidden, dropout)

    def forward(self, tokens: Tensor, position: Tensor, reference: Tensor, padding: Tensor, levels: Levels) -> Tensor:
        value = self.attention.project(tokens, padding)
        attended = self.attention(tokens + position, reference, False, value, levels)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class PlainEncoderLayer(nn.Module):
    """Self-attention of all tokens that are no padding, then feed-forward; each with post-normalisation (DETR)."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = SelfAttention(dim, heads, dropout)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, hidden, dropout)

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        attended = self.self_attention(tokens, position, to_all(padding))
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class Fusion(nn.Module):
    """Several versions of the tokens, side by side along the channels, back to one."""

    def __init__(self, dim: int, count: int, norm: bool) -> None:
        super().__init__()
        self.project = nn.Linear(count * dim, dim)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, versions: Sequence[Tensor]) -> Tensor:
        """[B, L, D] each -> [B, L, D]."""
        return self.norm(self.project(torch.cat(tuple(versions), -1)))


def fusions(kind: FusionKind, depth: int, dim: int, norm: bool) -> nn.ModuleList:
    """What an encoder of `depth` layers fuses with.

    simple: its last output with its input. u_like: output n - k with output k as input of layer n - k + 1, down to k = 0, the input, at the
    end. dense: input and all outputs at once; dense_simple: that, with the input once more (an option of the released code).
    """
    counts = {"none": [], "simple": [2], "u_like": [2] * ((depth + 1) // 2), "dense": [depth + 1], "dense_simple": [depth + 1, 2]}
    return nn.ModuleList(Fusion(dim, count, norm) for count in counts[kind])


class FusedLayers(nn.Module):
    """Layers one after the other; with a fusion, outputs of several layers are brought together."""

    def __init__(
        self,
        layer: Callable[[], nn.Module],
        depth: int,
        dim: int,
        fusion: FusionKind = "none",
        fusion_norm: bool = True,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.kind, self.fusions = fusion, fusions(fusion, depth, dim, fusion_norm)
        self.checkpointing = checkpointing

    def run(self, tokens: Tensor, *others: Any) -> Tensor:
        """[B, L, D] -> [B, L, D]; every layer gets the others too. Padded tokens are fused like any other."""
        outputs = [tokens]
        for layer in self.layers:
            if self.checkpointing and self.training:
                tokens = checkpoint(layer, tokens, *others, use_reentrant=False)
            else:
                tokens = layer(tokens, *others)
            outputs.append(tokens)
            partner = len(self.layers) - len(outputs) + 1
            if self.kind == "u_like" and partner < len(outputs) - 1:
                tokens = self.fusions[partner]((tokens, outputs[partner]))
        if self.kind in ("dense", "dense_simple"):
            tokens = self.fusions[0](outputs)
        if self.kind in ("simple", "dense_simple"):
            tokens = self.fusions[-1]((tokens, outputs[0]))
        return tokens


class Encoder(FusedLayers):
    """Of deformable layers."""

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor, valid_ratios: Tensor, levels: Levels) -> Tensor:
        """Tokens [B, L, D], their position [B, L, D], padding [B, L] -> [B, L, D]."""
        return self.run(tokens, position, token_centres(levels, valid_ratios), padding, levels)


class PlainEncoder(FusedLayers):
    """Of plain layers."""

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor) -> Tensor:
        """Tokens [B, L, D], their position [B, L, D], padding [B, L] -> [B, L, D]."""
        return self.run(tokens, position, padding)


def token_centres(levels: Levels, valid_ratios: Tensor) -> Tensor:
    """The centre of every token, seen from every level: [B, L, levels, 4] with width and height 0 (F-06)."""
    centres = []
    for level, (height, width) in enumerate(levels):
        y, x = torch.meshgrid(
            torch.arange(height, device=valid_ratios.device, dtype=valid_ratios.dtype) + 0.5,
            torch.arange(width, device=valid_ratios.device, dtype=valid_ratios.dtype) + 0.5,
            indexing="ij",
        )
        size = torch.tensor((width, height), device=valid_ratios.device, dtype=valid_ratios.dtype)
        centres.append(torch.stack((x, y), -1).flatten(0, 1) / (valid_ratios[:, level, None] * size))
    placed = torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]
    return torch.cat((placed, torch.zeros_like(placed)), -1)
