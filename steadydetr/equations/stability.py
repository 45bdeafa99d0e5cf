"""Measures of how steadily targets keep their queries.

Legend: G targets of B images, Q identities of queries (a query's number, or the encoder token it comes from), S stages.
`query` is the identity of the query that is matched to every target, -1 where none is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def held_targets(query: Tensor, image: Tensor, images: int, identities: int) -> Tensor:
    """V of DN-DETR and DETRDistill: the target that every query holds, -1 for none. [..., G] -> [..., B, Q]."""
    targets = torch.arange(query.shape[-1], device=query.device).expand_as(query)
    # unmatched targets write into a spare column, which is cut off
    place = image * (identities + 1) + torch.where(query < 0, identities, query)
    held = query.new_full((*query.shape[:-1], images * (identities + 1)), -1).scatter(-1, place, targets)
    return held.unflatten(-1, (images, identities + 1))[..., :identities]


def instability(before: Tensor, after: Tensor) -> Tensor:
    """Queries whose target changed, summed over queries, mean over images: at most 2 x objects. [..., B, Q] -> [...].

    Between epochs it is the instability of DN-DETR (Li et al. 2022, Sec. 3.1; OD-DETR Fig. 1), between the decoder stages k and k + 1
    the IS^k of DETRDistill (Fig. 7).
    """
    return (before != after).sum(-1).double().mean(-1)


def unstable_score(before: Tensor, after: Tensor, image: Tensor, images: int) -> Tensor:
    """Percentage of targets whose query is another one in the next layer, mean over images (Stable-DINO Fig. 3). [..., G] -> [...]."""
    counts = torch.bincount(image, minlength=images).clamp(min=1)
    changed = (before != after).double() / counts[image]
    return 100 * changed.sum(-1) / max(len(image.unique()), 1)


def consistency(student: Tensor, teacher: Tensor) -> Tensor:
    """Percentage of matched queries that hold the same target in both models (OD-DETR Fig. 5), over all images. [..., G] -> [...]."""
    matched = student >= 0
    return 100 * ((student == teacher) & matched).sum(-1).double() / matched.sum(-1).clamp(min=1)
