"""A teacher's view of an image: the masks of its queries, by which feature distillation weighs the tokens (DETRDistill Eq. 6-8).

Legend: N queries, D channels, L tokens of all levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from steadydetr.boxes import to_xyxy
from steadydetr.detectors import Detector
from steadydetr.equations.distill import query_masks, spatial_attention
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.predictions import match_batch
from steadydetr.objectives.feature_distillation import matched_quality
from steadydetr.structures import Batch, Memory


@dataclass(frozen=True)
class TeacherView:
    """What a teacher computes for one image."""

    memory: Memory
    queries: Tensor  # [N, D] output of the last decoder stage
    quality: Tensor  # [N] (Eq. 7)
    score: Tensor  # [N] of the best class
    boxes_xyxy: Tensor  # [N, 4] predicted, in 0..1

    @property
    def masks(self) -> Tensor:
        """psi of every query, [N, L] (Eq. 6)."""
        return query_masks(self.memory.tokens.float(), self.queries[None])[0]

    @property
    def weighted(self) -> Tensor:
        """sum_i q_i psi_i, [L]: the masks of all queries, weighted by their quality (Fig. 6)."""
        return self.quality @ self.masks

    @property
    def activation_before_encoder(self) -> Tensor:
        """[L] mean of |F| over the channels of the encoder's input (Fig. 2)."""
        return spatial_attention(self.memory.inputs.float())[0]

    @property
    def activation_after_encoder(self) -> Tensor:
        """[L] the same of the encoder's output."""
        return spatial_attention(self.memory.tokens.float())[0]

    def levels(self, values: Tensor) -> list[Tensor]:
        """[L] -> a map [h, w] of every level, without the padding beside the image."""
        parts = values.split([h * w for h, w in self.memory.levels])
        maps = []
        for part, (h, w), ratio in zip(parts, self.memory.levels, self.memory.valid_ratios[0].tolist(), strict=True):
            maps.append(part.view(h, w)[: round(h * ratio[1]), : round(w * ratio[0])])
        return maps

    def over_levels(self, values: Tensor) -> Tensor:
        """[L] -> the mean over the levels, at the size of the finest, [h, w]."""
        maps = self.levels(values)
        size = maps[0].shape
        grown = [F.interpolate(m[None, None], size=size, mode="bilinear", align_corners=False)[0, 0] for m in maps]
        return torch.stack(grown).mean(0)


@torch.no_grad()
def view_of_teacher(teacher: Detector, criterion: Criterion, batch: Batch) -> TeacherView:
    """Run the teacher on a batch of one image, in evaluation mode, and match its last stage for the quality of its queries."""
    found = match_batch(teacher, criterion, batch)
    quality = matched_quality(found.stages.in_float32(), found.matched.match, batch.targets, gamma=0.5)[-1, 0]
    last = found.stages[-1:].in_float32()
    score = last.logits[0, 0].sigmoid().amax(-1)
    return TeacherView(found.memory, last.content[0, 0], quality, score, to_xyxy(last.boxes[0, 0]))
