"""Query groups: joined for one decoder pass with a plan of who attends to whom, and split again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steadydetr.nn.attention import AttentionPlan, Rows
from steadydetr.structures import DecodedStages, MaskPredictions, QueryGroup


@dataclass(frozen=True)
class Joined:
    """All groups side by side, N rows in total."""

    content: Tensor  # [B, N, D]
    reference: Tensor  # [B, N, 4]
    sized: bool | Tensor  # all rows alike, or [N] bool
    position: Tensor | None  # [B, N, D]
    plan: AttentionPlan
    groups: tuple[QueryGroup, ...]

    def split(self, stages: DecodedStages) -> dict[str, DecodedStages]:
        """Stages over all rows -> the stages of each group by its name."""
        sizes = [group.queries.content.shape[1] for group in self.groups]
        tensors = (stages.logits, stages.boxes, stages.content, stages.reference)
        parts = zip(self.groups, self._masks(stages.masks, sizes), *(tensor.split(sizes, dim=2) for tensor in tensors), strict=True)
        return {
            group.name: DecodedStages(logits, boxes, group.queries.valid, masks, content=content, reference=reference)
            for group, masks, logits, boxes, content, reference in parts
        }

    @staticmethod
    def _masks(masks: MaskPredictions | None, sizes: list[int]) -> Sequence[MaskPredictions | None]:
        """Those of each group; all groups have the same pixels."""
        if masks is None:
            return [None] * len(sizes)
        return [replace(masks, queries=queries) for queries in masks.queries.split(sizes, dim=2)]


def join_groups(groups: Sequence[QueryGroup]) -> Joined:
    """Concatenate the groups and plan their attention.

    The content of invalid rows is replaced here, because a NaN in it would reach the gradient: masking later gives 0 * NaN, which is NaN.

    Raises:
        ValueError: no group, a name used twice, a group that sees an unknown one, or positions given by some groups only.
    """
    names = [group.name for group in groups]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"decode needs groups with names of their own, got {names}")
    for group in groups:
        if unknown := set(group.sees) - set(names):
            raise ValueError(f"group {group.name!r} sees {sorted(unknown)}, but the groups of this pass are {names}")
    queries = [group.queries for group in groups]
    positions = [q.position for q in queries if q.position is not None]
    if positions and len(positions) < len(queries):
        missing = [group.name for group in groups if group.queries.position is None]
        raise ValueError(f"groups {missing} have no position, the others do: this detector needs one for every query")
    return Joined(
        content=torch.cat([_fill(q.content, q.valid, 0.0) for q in queries], 1),
        reference=torch.cat([_fill(q.reference, q.valid, 0.5) for q in queries], 1),
        sized=_sized(groups),
        position=torch.cat([_fill(q.position, q.valid, 0.0) for q in queries if q.position is not None], 1) if positions else None,
        plan=attention_plan(groups),
        groups=tuple(groups),
    )


def _fill(tensor: Tensor, valid: Tensor | None, value: float) -> Tensor:
    return tensor if valid is None else torch.where(valid[..., None], tensor, value)


def _sized(groups: Sequence[QueryGroup]) -> bool | Tensor:
    """Whether references have a size: one answer where all groups agree, else [N] bool."""
    flags = [group.queries.sized for group in groups]
    if all(flags) or not any(flags):
        return flags[0]
    device = groups[0].queries.content.device
    return torch.cat([torch.full((group.queries.content.shape[1],), group.queries.sized, device=device) for group in groups])


def attention_plan(groups: Sequence[QueryGroup]) -> AttentionPlan:
    """Each group attends to its own rows (of the same block) and to those of the groups it sees."""
    stops = torch.tensor([group.queries.content.shape[1] for group in groups]).cumsum(0).tolist()
    rows = {group.name: slice(stop - group.queries.content.shape[1], stop) for group, stop in zip(groups, stops, strict=True)}
    by_name = {group.name: group for group in groups}
    plan = []
    for group in groups:
        seen = tuple(by_name[name] for name in group.sees)
        keys = (rows[group.name], *(rows[other.name] for other in seen))
        plan.append(Rows(rows[group.name], keys, _visible(group, seen)))
    return plan


def _visible(group: QueryGroup, seen: Sequence[QueryGroup]) -> Tensor | None:
    """What each row of the group attends to, [1 or B, 1, rows, keys] bool. An invalid row sees itself: a softmax over nothing is NaN."""
    members = (group, *seen)
    if group.blocks is None and all(member.queries.valid is None for member in members):
        return None
    images, count = group.queries.content.shape[:2]
    device = group.queries.content.device
    own = torch.ones(1, count, count, dtype=torch.bool, device=device)
    if group.blocks is not None:
        own = (group.blocks[:, None] == group.blocks[None, :])[None]
    if group.queries.valid is not None:
        own = own & group.queries.valid[:, None, :] | torch.eye(count, dtype=torch.bool, device=device)
    parts = [own]
    for other in seen:
        width = other.queries.content.shape[1]
        valid = other.queries.valid
        parts.append(
            torch.ones(1, count, width, dtype=torch.bool, device=device)
            if valid is None
            else valid[:, None, :].expand(images, count, width)
        )
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=2)[:, None]
