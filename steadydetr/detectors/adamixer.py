"""AdaMixer (Gao et al. 2022): no encoder; queries sample the pyramid of maps in three dimensions and mix what they see by layers they make.

Its decoder counts in pixels and has boxes as xyzr (`equations.adamixer`); what goes in and out is normalised cxcywh as everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steadydetr.boxes import to_xyxy
from steadydetr.detectors.base import Detector
from steadydetr.detectors.configs.adamixer import AdaMixerConfig
from steadydetr.detectors.query_groups import Joined, join_groups
from steadydetr.equations.adamixer import (
    from_xyzr,
    intersection_over_foreground,
    overlap_bias,
    refine,
    sides_of,
    to_xyzr,
)
from steadydetr.nn.adaptive_mixing import AdaptiveMixing, PlaceSampling
from steadydetr.nn.attention import AttentionPlan, SelfAttention, pick
from steadydetr.nn.layers import FeedForward, Neck, class_head, keep_outputs
from steadydetr.nn.padding import resize_padding, valid_ratio
from steadydetr.nn.positions import xyzr_position
from steadydetr.structures import DecodedStages, Levels, MeasuredMemory, Memory, Queries, QueryGroup, Stages, at_least_float32


class MixingLayer(nn.Module):
    """Self-attention within groups that knows which boxes lie in which, sampling and adaptive mixing, feed-forward."""

    def __init__(self, config: AdaMixerConfig) -> None:
        super().__init__()
        c = config
        self.self_attention = SelfAttention(c.width, c.heads)
        self.overlap_scale = nn.Parameter(torch.empty(c.heads).uniform_(0, 4))  # tau, of the bias by overlap
        self.self_norm = nn.LayerNorm(c.width)
        self.sampling = PlaceSampling(c.width, c.groups, c.in_points)
        self.mixing = AdaptiveMixing(c.width, c.groups, c.in_points, c.out_points)
        self.mixing_norm = nn.LayerNorm(c.width)
        self.ffn = FeedForward(c.width, c.ffn)

    def forward(
        self,
        content: Tensor,  # [B, N, D]
        xyzr: Tensor,  # [B, N, 4]
        tokens: Tensor,  # [B, L, D]
        levels: Levels,
        strides: Sequence[int],
        plan: AttentionPlan,
    ) -> Tensor:
        content = self.self_norm(self.attend(content, xyzr, plan))
        sampled = self.sampling(content, xyzr, tokens, levels, strides)
        return self.ffn(self.mixing_norm(content + self.mixing(sampled, content)))

    def attend(self, content: Tensor, xyzr: Tensor, plan: AttentionPlan) -> Tensor:
        """Attention and its residual. The position is part of all: query, key, value and residual."""
        placed = content + xyzr_position(xyzr, content.shape[-1]).to(content.dtype)
        corners = to_xyxy(torch.cat((xyzr[..., :2], sides_of(xyzr)), -1))

        def bias(queries: slice, keys: tuple[slice, ...]) -> Tensor:
            iof = intersection_over_foreground(corners[:, queries], pick(corners, keys))
            return overlap_bias(iof, self.overlap_scale.to(iof.dtype))

        return placed + self.self_attention(placed, None, plan, bias)


def tower(width: int) -> nn.Sequential:
    """What stands before a head of classes or boxes."""
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())


class MixingDecoder(nn.Module):
    """Layers and heads of the stages, of which none share any."""

    def __init__(self, config: AdaMixerConfig, num_classes: int) -> None:
        super().__init__()
        width, stages = config.width, range(config.decoder_layers)
        self.layers = nn.ModuleList(MixingLayer(config) for _ in stages)
        self.class_towers = nn.ModuleList(tower(width) for _ in stages)
        self.box_towers = nn.ModuleList(tower(width) for _ in stages)
        self.class_heads = nn.ModuleList(class_head(width, num_classes) for _ in stages)
        self.box_heads = nn.ModuleList(nn.Linear(width, 4) for _ in stages)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """xavier_uniform on every weight; boxes start as their references, and what queries make starts the same for all of them."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, SelfAttention):  # unlike elsewhere its output starts with a bias
                module.out_proj.reset_parameters()
        for layer, box_head in zip(
            cast("list[MixingLayer]", list(self.layers)), cast("list[nn.Linear]", list(self.box_heads)), strict=True
        ):
            nn.init.xavier_uniform_(layer.self_attention.out_proj.weight)
            nn.init.zeros_(layer.mixing.generator.weight)
            layer.sampling.reset_parameters()
            nn.init.zeros_(box_head.weight)
            nn.init.zeros_(box_head.bias)


class AdaMixer(Detector):
    samples_points = True
    makes_queries = True
    query_box: Tensor

    def __init__(self, config: AdaMixerConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.width, self.stages = config.width, config.decoder_layers
        self.backbone = config.backbone.build()
        self.normalise_for(self.backbone)
        self.take_channels(config.image_channels)
        maps = self.backbone.strides[: config.levels]
        self.strides = (*maps, *(maps[-1] * 2**k for k in range(1, config.levels - len(maps) + 1)))
        self.neck = Neck(self.backbone.channels, config.width, config.levels, config.norm_groups, shared_norm=True)
        self.query_content = nn.Embedding(config.queries, config.width)
        self.register_buffer("query_box", torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(config.queries, 1))  # the image, never learned
        self.decoder = MixingDecoder(config, num_classes)

    def encode(self, images: Tensor, padding: Tensor) -> MeasuredMemory:
        maps = self.neck(self.backbone(self.normalise(images, padding)))
        levels = tuple((m.shape[-2], m.shape[-1]) for m in maps)
        masks = [resize_padding(padding, size) for size in levels]
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        flat_padding = torch.cat([mask.flatten(1) for mask in masks], 1)
        valid_ratios = torch.stack([valid_ratio(mask) for mask in masks], 1)
        sizes = torch.stack(((~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)), -1).clamp(min=1).float()
        return MeasuredMemory(tokens, flat_padding, levels, valid_ratios, tokens, sizes)

    def queries(self, memory: Memory) -> dict[str, Queries]:
        return {"main": self._queries_of(memory, self.query_content.weight)}

    def _queries_of(self, memory: Memory, content: Tensor) -> Queries:
        images, normed = len(memory.tokens), F.layer_norm(content, (self.width,))
        boxes = self.query_box
        if len(content) != len(boxes):  # further queries
            boxes = boxes[torch.arange(len(content), device=boxes.device) % len(boxes)]
        return Queries(normed.expand(images, -1, -1), boxes.expand(images, -1, -1))

    def new_queries(self, count: int | None = None) -> nn.ModuleDict:
        """Content; boxes are the same for all groups."""
        return nn.ModuleDict({"query_content": nn.Embedding(self.config.queries if count is None else count, self.width)})

    def further_queries(self, memory: Memory, parts: nn.Module, count: int | None = None) -> tuple[Queries, Stages | None]:
        return self._queries_of(memory, cast(nn.Embedding, parts.get_submodule("query_content")).weight), None

    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, DecodedStages]:
        if not isinstance(memory, MeasuredMemory):
            raise TypeError("this memory does not tell the sizes of its images in pixels: it was made by another detector")
        joined = join_groups(groups)
        return joined.split(self._run(memory, joined))

    def _run(self, memory: MeasuredMemory, joined: Joined) -> DecodedStages:
        """The stages one after the other. A box starts from the one before without its gradient, content has its gradient."""
        decoder, content, reference = self.decoder, joined.content, at_least_float32(with_sides(joined.reference, joined.sized))
        sizes = memory.sizes.to(reference.dtype)
        xyzr = to_xyzr(reference, sizes)
        contents, logits, boxes, references = [], [], [], []
        for stage in range(self.stages):
            content = self._layer(stage, content, xyzr, memory, joined.plan)
            logits.append(decoder.class_heads[stage](decoder.class_towers[stage](content)))
            delta = decoder.box_heads[stage](decoder.box_towers[stage](content))
            refined = refine(xyzr, delta.to(torch.promote_types(delta.dtype, xyzr.dtype)))
            contents.append(content)
            references.append(from_xyzr(xyzr, sizes))
            boxes.append(from_xyzr(refined, sizes))
            xyzr = refined.detach()
        return DecodedStages(torch.stack(logits), torch.stack(boxes), content=torch.stack(contents), reference=torch.stack(references))

    def _layer(self, stage: int, content: Tensor, xyzr: Tensor, memory: Memory, plan: AttentionPlan) -> Tensor:
        arguments = (content, xyzr, memory.tokens, memory.levels, self.strides, plan)
        if self.config.checkpointing and self.training:
            return checkpoint(self.decoder.layers[stage], *arguments, use_reentrant=False)
        return self.decoder.layers[stage](*arguments)

    @contextmanager
    def record_sampling_points(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """The heads are the groups. All places of a query count alike, and the weights tell how a place is spread over the maps."""
        found: list[tuple[Tensor, Tensor]] = []

        def record(sampling: Any, arguments: tuple[Any, ...]) -> None:
            content, xyzr, _, levels, strides = arguments
            locations, weights = sampling.sampling_points(content, xyzr, levels, strides)
            found.append((locations, weights / sampling.points))

        layers = cast("list[MixingLayer]", list(self.decoder.layers))
        hooks = [layer.sampling.register_forward_pre_hook(record) for layer in layers]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def compiled_parts(self) -> Iterator[nn.Module]:
        """Every layer of the decoder."""
        return iter(self.decoder.layers)

    def keep_classes(self, classes: Sequence[int]) -> None:
        for head in self.decoder.class_heads:
            keep_outputs(cast(nn.Linear, head), classes)
        self.num_classes = len(classes)


def with_sides(reference: Tensor, sized: bool | Tensor) -> Tensor:
    """References [B, N, 4]; those without a size get the whole image's, as the detector's own have."""
    if sized is True:
        return reference
    sides = torch.ones_like(reference[..., 2:])
    if isinstance(sized, Tensor):
        sides = torch.where(sized[:, None], reference[..., 2:], sides)
    return torch.cat((reference[..., :2], sides), -1)
