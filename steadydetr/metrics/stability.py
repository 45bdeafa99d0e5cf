"""How steadily a detector matches: the same held-out images, matched at every stage, compared between stages, epochs and models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steadydetr.data import DataConfig, Dataset, EvalLoader, for_training
from steadydetr.detectors import Detector
from steadydetr.equations.stability import consistency, held_targets, instability, unstable_score
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.predictions import match_batch
from steadydetr.structures import Batch


@dataclass(frozen=True)
class Matching:
    """Who holds the targets of a fixed set of images, by the detector's own matcher."""

    query: Tensor  # [S, G] identity of the matched query: the encoder token it comes from, or its number; -1: none
    proposal: Tensor | None  # [G] the same of the encoder's proposals; None for one-stage detectors
    image: Tensor  # [G]
    images: int
    identities: int  # Q, of the image with most

    @property
    def held(self) -> Tensor:
        """[S, M, Q] the target that every query holds, -1 for none."""
        return held_targets(self.query, self.image, self.images, self.identities)


@dataclass(frozen=True)
class Stability:
    """The measures of one model at one moment; all of the issue's figures are drawn from these."""

    unstable_score: dict[str, float]  # percent, by decoder layer; layer 1 is compared with the encoder's proposals
    between_stages: list[float]  # IS^k of stages k and k + 1
    between_epochs: float | None  # of the last stage, against the measurement before; None for the first one
    consistency: list[float] | None  # percent by stage, with the average of the weights
    images: int
    objects: int


def held_out(dataset: Dataset, images: int | None) -> Dataset:
    """The first `images` that have objects, without crowd regions; None: all of them."""
    return for_training(dataset, filter_empty=True, limit=images)[0]


def match(detector: Detector, criterion: Criterion, dataset: Dataset, config: DataConfig, batch_size: int) -> Matching:
    """Match every image of `dataset` at every stage, in evaluation mode, in the order of the data."""
    device = next(detector.parameters()).device
    loader: Iterable[Batch] = EvalLoader(dataset, config, batch_size)
    parts = [_match_batch(detector, criterion, batch.to(device)) for batch in loader]
    first = torch.tensor([part.images for part in parts]).cumsum(0) - torch.tensor([part.images for part in parts])
    proposals = [part.proposal for part in parts if part.proposal is not None]
    return Matching(
        torch.cat([part.query for part in parts], 1),
        torch.cat(proposals) if proposals else None,
        torch.cat([part.image + start for part, start in zip(parts, first, strict=True)]),
        sum(part.images for part in parts),
        max(part.identities for part in parts),
    )


def _match_batch(detector: Detector, criterion: Criterion, batch: Batch) -> Matching:
    """By the encoder tokens that the queries come from, or by the numbers of learned queries."""
    found = match_batch(detector, criterion, batch)
    token, targets = found.queries.token, batch.targets
    tables = [found.matched_queries] if found.proposal_queries is None else [found.matched_queries, found.proposal_queries]
    query, *proposal = [(table if token is None else table.renumbered(token)).query.cpu() for table in tables]
    return Matching(
        query,
        proposal[0][0] if proposal else None,
        targets.image.cpu(),
        len(targets.counts),
        found.queries.content.shape[1] if token is None else found.memory.tokens.shape[1],
    )


def compare(now: Matching, before: Tensor | None = None, average: Matching | None = None) -> Stability:
    """The measures of `now`.

    Args:
        before: [G] the last stage of an earlier measurement of the same images.
        average: the same images matched by the average of the weights.
    """
    chain = now.query if now.proposal is None else torch.cat((now.proposal[None], now.query))
    scores = unstable_score(chain[:-1], chain[1:], now.image, now.images).tolist()
    first_layer = 2 if now.proposal is None else 1
    held = now.held
    epochs = None
    if before is not None:
        epochs = float(instability(held_targets(before, now.image, now.images, now.identities), held[-1]))
    return Stability(
        {str(first_layer + i): score for i, score in enumerate(scores)},
        instability(held[:-1], held[1:]).tolist(),
        epochs,
        None if average is None else consistency(now.query, average.query).tolist(),
        now.images,
        len(now.image),
    )


def measure(
    models: Mapping[str, Detector],
    criterion: Criterion,
    dataset: Dataset,
    config: DataConfig,
    batch_size: int,
    before: Mapping[str, Tensor],
) -> tuple[dict[str, Stability], dict[str, Tensor]]:
    """Every model's measures, "model" against "ema" where there is one, and the last stages to compare the next time with."""
    matchings = {name: match(model, criterion, dataset, config, batch_size) for name, model in models.items()}
    found = {}
    for name, matching in matchings.items():
        average = matchings.get("ema") if name == "model" else None
        found[name] = compare(matching, before.get(name), average)
    return found, {name: matching.query[-1] for name, matching in matchings.items()}
