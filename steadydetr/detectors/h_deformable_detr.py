"""H-Deformable-DETR (Jia et al. 2023): further queries in training, several of which learn one object (objectives/one_to_many.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from steadydetr.detectors.configs.h_deformable_detr import HDeformableDETRConfig
from steadydetr.detectors.deformable import require_tokens
from steadydetr.detectors.deformable_detr import DeformableDETR
from steadydetr.structures import Memory, Queries

GROUP = "one-to-many"


class HDeformableDETR(DeformableDETR):
    """The tokens of both groups are selected together: the best for the main queries, the next for the others."""

    config: HDeformableDETRConfig

    def __init__(self, config: HDeformableDETRConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.look_forward_twice = config.look_forward_twice
        names = ("content",) if config.mixed_selection else () if config.two_stage else ("content", "position")
        for name in names:
            self.add_module(f"query_extra_{name}", nn.Embedding(config.one_to_many_queries, self.width))
        self.extra_groups = {GROUP: tuple(f"query_extra_{name}.weight" for name in names)}

    def query_parts(self, count: int) -> dict[str, nn.Module]:
        parts = super().query_parts(count)
        if self.config.mixed_selection:
            parts["query_content"] = nn.Embedding(count, self.width)
        return parts

    def queries_of(self, memory: Memory, parts: Mapping[str, Any], ranks: slice) -> Queries:
        queries = super().queries_of(memory, parts, ranks)
        return with_content(queries, parts["query_content"]) if self.config.mixed_selection else queries

    def queries(self, memory: Memory) -> dict[str, Queries]:
        if not self.training:
            return super().queries(memory)
        parts: dict[str, Any] = dict(self.named_children())
        if not self.config.two_stage:
            extra = self.learned(len(memory.tokens), parts["query_extra_content"].weight, parts["query_extra_position"].weight)
            return super().queries(memory) | {GROUP: extra}
        count = self.config.queries
        both = self.proposed(memory, slice(count + self.config.one_to_many_queries))
        require_tokens(both.content.shape[1], count)
        main, extra = rows(both, slice(count)), rows(both, slice(count, None))
        if self.config.mixed_selection:
            main, extra = with_content(main, parts["query_content"]), with_content(extra, parts["query_extra_content"])
        return {"main": main, GROUP: extra}


def rows(queries: Queries, which: slice) -> Queries:
    """Some of the queries."""
    tensors: dict[str, Any] = {name: value[:, which] for name, value in vars(queries).items() if isinstance(value, torch.Tensor)}
    return replace(queries, **tensors)


def with_content(queries: Queries, content: nn.Embedding) -> Queries:
    """The queries with learned content, by their rank."""
    images, count, _ = queries.content.shape
    return replace(queries, content=content.weight[:count].expand(images, -1, -1))
