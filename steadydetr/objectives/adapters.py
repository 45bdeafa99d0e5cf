"""What objectives train besides the student: layers between its feature maps and the teacher's.

Legend: B images, L tokens of a level, d channels of the teacher, n cells of a pooled map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadydetr.objectives.feature_levels import Level


def align(student: int, teacher: int) -> nn.Module:
    """A linear layer from the student's channels to the teacher's; nothing where their numbers are the same."""
    return nn.Linear(student, teacher) if student != teacher else nn.Identity()


class ContextBlock(nn.Module):
    """The global context block (Cao et al. 2019) of FGD: one context of the whole map is added to every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.where = nn.Linear(width, 1)
        self.what = nn.Sequential(nn.Linear(width, width // 2), nn.LayerNorm(width // 2), nn.ReLU(), nn.Linear(width // 2, width))
        nn.init.kaiming_normal_(self.where.weight, mode="fan_in")
        for parameter in (self.where.bias, *self.what[3].parameters()):
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, padding: Tensor) -> Tensor:
        """[B, L, d], [B, L] -> [B, L, d]."""
        weights = self.where(features)[..., 0].masked_fill(padding, -torch.inf).softmax(-1)
        return features + self.what(weights[:, None] @ features)


class NonLocalBlock(nn.Module):
    """Every cell of the pooled map attends to every other one (Wang et al. 2018, embedded Gaussian); the result is added to the cell."""

    def __init__(self, width: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.query, self.key, self.value = (nn.Linear(width, width // 2) for _ in range(3))
        self.output = nn.Linear(width // 2, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """[B, L, d] -> cells [B, n, d], and whether a cell has no valid token [B, n, 1]."""
        valid = (~level.padding).to(features.dtype)[..., None]
        pooled, share = (self._pool(level.as_map(x)) for x in (features * valid, valid))
        empty = share == 0
        cells = pooled / share.masked_fill(empty, 1)
        affinity = self.query(cells) @ self.key(cells).transpose(1, 2)
        weights = affinity.masked_fill(empty.transpose(1, 2), -torch.inf).softmax(-1)
        return cells + self.output(weights @ self.value(cells)), empty

    def _pool(self, maps: Tensor) -> Tensor:
        return F.avg_pool2d(maps, self.pool, ceil_mode=True).flatten(2).transpose(1, 2)


class Generator(nn.Module):
    """Two convolutions that fill in what is left out of a map."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.align = align(student, teacher)
        self.first, self.second = (nn.Conv2d(teacher, teacher, 3, padding=1) for _ in range(2))

    def forward(self, level: Level, kept: Tensor) -> Tensor:
        """`kept`: [B, L], 0 where the student's token is left out -> [B, L, d]."""
        padding = level.padding.unflatten(1, level.size)[:, None]
        seen = level.as_map(self.align(level.student) * kept[..., None]).masked_fill(padding, 0)
        return self.second(self.first(seen).relu().masked_fill(padding, 0)).flatten(2).transpose(1, 2)
