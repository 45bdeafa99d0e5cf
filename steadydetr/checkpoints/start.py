"""What a run starts from: the weights of a trained detector, and what is done with its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.kinds import changeable, register

if TYPE_CHECKING:
    from steadydetr.checkpoints.transfer import Transfer
    from steadydetr.checkpoints.weights import TrainedWeights
    from steadydetr.detectors import Detector, DetectorConfig


@register("start")
@dataclass(frozen=True)
class Start:
    """Trained weights to start from. Without any, a run starts from random ones and those of its backbone."""

    weights: str = changeable("")  # a run, a checkpoint of ours or of another project, hub:owner/name, or a name of `steadydetr weights`
    classes: tuple[str, ...] = ()  # theirs=ours, for classes of the weights that the data call otherwise
    keep_classes: bool = False  # go on scoring the classes of the weights that the data do not have
    by_name: bool = True  # False: every class starts anew, as most projects do it
    allow_partial: tuple[str, ...] = ()  # parts that may start anew, or be left out, where the weights do not fit

    def load(self, detector: Detector, config: DetectorConfig, classes: Sequence[str], weights: TrainedWeights) -> Transfer:
        """Give the detector, which was just built of this config, the weights. Raises what `transfer` raises."""
        from steadydetr.checkpoints.transfer import transfer

        return transfer(detector, config, classes, weights, self.classes, self.by_name, self.allow_partial)

    def config_to_build(self, config: DetectorConfig) -> DetectorConfig:
        """The config to build: without fetching the backbone's own weights, unless these are the ones to start with."""
        return config if "backbone" in self.allow_partial or not self.weights else config.without_pretrained()
