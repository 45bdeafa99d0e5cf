"""How steadily a detector matches queries to objects.

The same held-out images are matched at every decoder stage, and the matches are compared between stages, epochs and models.
Legend: S stages, G objects of all images, B images, Q query ids of an image. The id of a query is the encoder token that it comes
from, in two-stage detectors, or its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
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
class DatasetMatches:
    """Which query is matched to each object of a fixed set of images, by the detector's own matcher."""

    query: Tensor  # [S, G] id of the matched query, -1 where there is none
    proposal: Tensor | None  # [G] id of the matched encoder proposal; None for one-stage detectors
    image: Tensor  # [G] image of each object
    images: int  # B
    ids: int  # Q, of the image with most

    @property
    def objects_of_queries(self) -> Tensor:
        """[S, B, Q] the object that every query is matched to, -1 for none."""
        return held_targets(self.query, self.image, self.images, self.ids)


@dataclass(frozen=True)
class Stability:
    """The measures of one model at one moment; the report and `steadydetr figures` draw them."""

    unstable_score: dict[str, float]  # percent, by decoder layer; layer 1 is compared with the encoder's proposals
    between_stages: list[float]  # IS^k of stages k and k + 1
    between_epochs: float | None  # of the last stage, against the measurement before; None for the first one
    consistency: list[float] | None  # percent by stage, with the average of the weights
    images: int
    objects: int


def held_out(dataset: Dataset, images: int | None) -> Dataset:
    """The first `images` that have objects, without crowd regions; None: all of them."""
    return for_training(dataset, filter_empty=True, limit=images)[0]


def match_dataset(detector: Detector, criterion: Criterion, dataset: Dataset, config: DataConfig, batch_size: int) -> DatasetMatches:
    """Match every image of `dataset` at every stage, in evaluation mode, in the order of the data."""
    return match_batches(detector, criterion, EvalLoader(dataset, config, batch_size, masks=True))


def match_batches(detector: Detector, criterion: Criterion, loader: EvalLoader) -> DatasetMatches:
    """As `match_dataset`, of what a loader loads."""
    device = next(detector.parameters()).device
    parts = [_match_batch(detector, criterion, batch.to(device)) for batch in loader]
    counts = torch.tensor([part.images for part in parts])
    first_image = counts.cumsum(0) - counts  # of every batch
    proposals = [part.proposal for part in parts if part.proposal is not None]
    loaded = torch.cat([part.image + start for part, start in zip(parts, first_image, strict=True)])
    image, order = torch.tensor(loader.positions)[loaded].sort(stable=True)
    return DatasetMatches(
        torch.cat([part.query for part in parts], 1)[:, order],
        torch.cat(proposals)[order] if proposals else None,
        image,
        sum(part.images for part in parts),
        max(part.ids for part in parts),
    )


def _match_batch(detector: Detector, criterion: Criterion, batch: Batch) -> DatasetMatches:
    """Match one batch; queries are identified by the encoder token that they come from, learned ones by their number."""
    found = match_batch(detector, criterion, batch)
    token, targets = found.queries.token, batch.targets
    tables = [found.matched_queries] if found.proposal_queries is None else [found.matched_queries, found.proposal_queries]
    query, *proposal = [(table if token is None else table.renumbered(token)).query.cpu() for table in tables]
    return DatasetMatches(
        query,
        proposal[0][0] if proposal else None,
        targets.image.cpu(),
        len(targets.counts),
        found.queries.content.shape[1] if token is None else found.memory.tokens.shape[1],
    )


def compare_matches(now: DatasetMatches, before: Tensor | None = None, average: DatasetMatches | None = None) -> Stability:
    """The measures of a model.

    Args:
        now: its matches at all stages.
        before: [G] its matches at the last stage in an earlier measurement of the same images.
        average: the matches of the average of its weights, for the same images.
    """
    layers = now.query if now.proposal is None else torch.cat((now.proposal[None], now.query))
    scores = unstable_score(layers[:-1], layers[1:], now.image, now.images).tolist()
    first_layer = 2 if now.proposal is None else 1
    stages = now.objects_of_queries
    epochs = None
    if before is not None:
        epochs = float(instability(held_targets(before, now.image, now.images, now.ids), stages[-1]))
    return Stability(
        {str(first_layer + i): score for i, score in enumerate(scores)},
        instability(stages[:-1], stages[1:]).tolist(),
        epochs,
        None if average is None else consistency(now.query, average.query).tolist(),
        now.images,
        len(now.image),
    )


def measure_models(
    models: Mapping[str, Detector],
    criterion: Criterion,
    dataset: Dataset,
    config: DataConfig,
    batch_size: int,
    before: Mapping[str, Tensor],
) -> tuple[dict[str, Stability], dict[str, Tensor]]:
    """The stability of every model on the images of `dataset`; "model" is compared with "ema" where there is one.

    Args:
        before: [G] each model's matches at the last stage in the measurement before; empty for the first one.

    Returns:
        The measures, and each model's matches at the last stage, which are `before` of the next measurement.
    """
    with closing(EvalLoader(dataset, config, batch_size, masks=True)) as loader:
        matches = {name: match_batches(model, criterion, loader) for name, model in models.items()}
    found = {}
    for name, matched in matches.items():
        average = matches.get("ema") if name == "model" else None
        found[name] = compare_matches(matched, before.get(name), average)
    return found, {name: matched.query[-1] for name, matched in matches.items()}
