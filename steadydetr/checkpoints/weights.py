"""stub until h-weights lands"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from steadydetr.checkpoints.folder import DetectorCard, load_detector


@dataclass(frozen=True)
class TrainedWeights:
    """A trained detector as it was found."""

    card: DetectorCard
    state: dict[str, Tensor]
    where: str


def read_weights(where: str | Path) -> TrainedWeights:
    loaded = load_detector(where)
    return TrainedWeights(loaded.card, dict(loaded.detector.state_dict()), str(where))
