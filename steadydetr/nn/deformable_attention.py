"""Multi-scale deformable attention in pure PyTorch (Zhu et al. 2021, Eq. 3)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steadydetr.structures import Levels


def sample_values(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinearly sampled values; what lies outside of a map counts as zero. A faster kernel goes here.

    Half precision is computed in float32 and rounded once, at the end. Sums run in a fixed order, so gradients repeat to the bit.

    Args:
        value: [B, L, heads, d], levels fine to coarse, each row by row.
        levels: (h, w) of every level.
        locations: [B, N, heads, levels, points, 2] (x, y) in 0..1, where 0 and 1 are the outer borders of a map.
        weights: [B, N, heads, levels, points].

    Returns:
        [B, N, heads * d], of the type of `value`.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    return _Sampling.apply(value.to(dtype), locations.to(dtype), weights.to(dtype), levels).to(value.dtype)


class _Sampling(torch.autograd.Function):
    """Sampling as sums of rows of a table: for every query and head levels * points * 4 rows, the four corners of each point.

    A row is d contiguous numbers, which `embedding_bag` reads far faster than `grid_sample` reads single ones. The gradient of the
    table is the transposed sum: points are sorted by the cell that they fall into, then every cell sums its points. Autograd alone
    would sort all four corners of each and keep every intermediate of the indices.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
        images, _, heads, _ = value.shape
        row, share, inside = _top_left(locations, levels)
        ctx.save_for_backward(value, weights, row, share, inside)
        ctx.levels = levels
        bags = _corner_rows(row, levels).flatten(0, 2).flatten(1)
        per_row = torch.stack(_corner_weights(share, weights), dim=3).view_as(bags)
        sampled = F.embedding_bag(bags, _table(value, levels), per_sample_weights=per_row, mode="sum")
        return sampled.view(images, -1, heads * value.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        value, weights, row, share, inside = ctx.saved_tensors
        bags = grad.reshape(-1, value.shape[-1])
        table, rows = _table(value, ctx.levels), _corner_rows(row, ctx.levels)
        upper_left, upper_right, lower_left, lower_right = _row_products(bags, table, rows).unbind(3)
        x, y = share.unbind(-1)
        upper, lower = torch.lerp(upper_left, upper_right, x), torch.lerp(lower_left, lower_right, x)
        along_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, y)
        slope = torch.stack((along_x * weights, (lower - upper) * weights), -1)
        grad_value = _scatter(bags, row, _corner_weights(share, weights), value.shape, ctx.levels)
        return grad_value, slope * _sizes(ctx.levels, share) * inside, torch.lerp(upper, lower, y), None


def _table(value: Tensor, levels: Levels) -> Tensor:
    """[B, L, heads, d] as rows [B * cells * heads, d]; every map gets a border of zero cells, so that no corner is outside."""
    maps = [part.unflatten(1, size) for part, size in zip(value.split([h * w for h, w in levels], dim=1), levels, strict=True)]
    return torch.cat([F.pad(m, (0, 0, 0, 0, 1, 1, 1, 1)).flatten(1, 2) for m in maps], dim=1).flatten(0, 2)


def _cells(levels: Levels) -> list[int]:
    """How many cells every map has, its border included."""
    return [(h + 2) * (w + 2) for h, w in levels]


def _sizes(levels: Levels, like: Tensor) -> Tensor:
    """(w, h) of every level, [levels, points, 2], repeated for each point of `like` [..., points, 2].

    Broadcasting over runs of 2 numbers would be slow.
    """
    sizes = torch.tensor([(w, h) for h, w in levels], dtype=like.dtype, device=like.device)
    return sizes[:, None].repeat(1, like.shape[-2], 1)


def _top_left(locations: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """The upper left of the four cells around each point.

    Returns:
        Its row of the table, int32 [B, N, heads, levels, points]; how far right and below of its centre the point is, 0..1, [..., 2];
        and whether the point is near enough to the map for a gradient, bool [..., 2].
    """
    images, _, heads, _, points, _ = locations.shape
    sizes = _sizes(levels, locations)
    place = locations * sizes - 0.5
    inside = (place > -1) & (place < sizes)
    place = place.clamp(min=-1).minimum(sizes)  # farther out is border as well
    low = place.floor().minimum(sizes - 1)

    def integers(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=locations.device)[:, None].repeat(1, points)

    counts, widths = _cells(levels), [w + 2 for _, w in levels]
    first = integers([sum(counts[:level]) + width + 1 for level, width in enumerate(widths)])
    column, line = low.to(torch.int32).unbind(-1)
    cell = (line * integers(widths) + column + first).clamp(0, sum(counts) - 1)  # acts on NaN alone, and the output is NaN all the same
    image = torch.arange(images, dtype=torch.int32, device=cell.device)[:, None] * (sum(counts) * heads)
    head = torch.arange(heads, dtype=torch.int32, device=cell.device)
    return cell * heads + (image + head)[:, None, :, None, None], place - low, inside


def _corner_rows(row: Tensor, levels: Levels) -> Tensor:
    """Rows of the table, [B, N, heads, 4, levels, points], of the corners upper left, upper right, lower left, lower right."""
    heads, points = row.shape[2], row.shape[4]
    below = row + torch.tensor([(w + 2) * heads for _, w in levels], dtype=row.dtype, device=row.device)[:, None].repeat(1, points)
    return torch.stack((row, row + heads, below, below + heads), dim=3)


def _corner_weights(share: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each corner counts, attention included, in the order of `_corner_rows`; each [B, N, heads, levels, points]."""
    x, y = share.unbind(-1)
    lower = weights * y
    upper = weights - lower
    upper_right, lower_right = upper * x, lower * x
    return upper - upper_right, upper_right, lower - lower_right, lower_right


def _row_products(bags: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """The product of each bag [bags, d] with each of its rows, of the shape of `rows`: what `embedding_bag` gives its weights."""
    count = math.prod(rows.shape[3:])
    bag = torch.arange(len(bags), dtype=rows.dtype, device=rows.device)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        bags.contiguous(), table, rows.flatten(), bag * count, bag.repeat_interleave(count, output_size=rows.numel()), 0
    )
    return products.view_as(rows)


def _scatter(bags: Tensor, row: Tensor, corner_weights: tuple[Tensor, ...], shape: torch.Size, levels: Levels) -> Tensor:
    """The gradient of the values, of `shape` [B, L, heads, d]: each cell sums the bags of the points around it."""
    images, _, heads, dim = shape
    counts = _cells(levels)
    keys, order = row.flatten().sort(stable=True)
    cells = torch.arange(images * sum(counts) * heads, dtype=row.dtype, device=row.device)
    offsets = torch.searchsorted(keys, cells, out_int32=True)
    bag = (order // math.prod(row.shape[3:])).to(row.dtype)
    sums = [F.embedding_bag(bag, bags, offsets, per_sample_weights=w.flatten().index_select(0, order), mode="sum") for w in corner_weights]
    by_level = [s.view(images, sum(counts), heads, dim).split(counts, dim=1) for s in sums]
    maps = []
    for level, (h, w) in enumerate(levels):
        upper_left, upper_right, lower_left, lower_right = (s[level].unflatten(1, (h + 2, w + 2)) for s in by_level)
        total = upper_left[:, 1:-1, 1:-1] + upper_right[:, 1:-1, :-2] + lower_left[:, :-2, 1:-1] + lower_right[:, :-2, :-2]
        maps.append(total.flatten(1, 2))
    return torch.cat(maps, dim=1)


class DeformableAttention(nn.Module):
    """Every head of every query samples `points` places of each level around the query's reference."""

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads look in different directions, further points further away, all with the same weight (F-12)."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        bias = direction[:, None, None] * steps[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def project(self, tokens: Tensor, padding: Tensor) -> Tensor:
        """Tokens [B, L, D], padding [B, L] -> values [B, L, heads, d]; those of padding are zero, bias included (F-10)."""
        return self.value_proj(tokens).masked_fill(padding[..., None], 0).unflatten(-1, (self.heads, -1))

    def sampling_points(self, query: Tensor, reference: Tensor, sized: bool | Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """Where each query samples, and the weight of each place; both as `sample_values` takes them.

        Args:
            query: [B, N, D], content and position.
            reference: [B, N, levels, 4], seen from every level.
            sized: offsets are in units of the reference's half size / points; else in cells of the level. One for all or [N] bool.
        """
        shape = (self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query)
        # the wider type of the two: autocast's bfloat16 could not even hold the width of a large map
        offsets = offsets.to(torch.promote_types(offsets.dtype, reference.dtype)).unflatten(-1, (*shape, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, shape[1:])
        by_cell = 1 / _sizes(levels, offsets)
        scale = by_cell if sized is False else self._per_point(reference[..., 2:] * (0.5 / self.points))
        if isinstance(sized, Tensor):
            scale = torch.where(sized[:, None, None, None, None], scale, by_cell)
        return self._per_point(reference[..., :2]) + offsets * scale, weights

    def _per_point(self, x: Tensor) -> Tensor:
        """[B, N, levels, 2] -> [B, N, 1, levels, points, 2] in memory: broadcasting over runs of 2 numbers would be slow."""
        return x[:, :, None, :, None].repeat(1, 1, 1, 1, self.points, 1)

    def forward(self, query: Tensor, reference: Tensor, sized: bool | Tensor, value: Tensor, levels: Levels) -> Tensor:
        """The arguments of `sampling_points`, and value [B, L, heads, d] from `project` -> [B, N, D]."""
        locations, weights = self.sampling_points(query, reference, sized, levels)
        return self.output_proj(sample_values(value, levels, locations, weights))
