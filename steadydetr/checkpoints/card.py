"""What stands beside the weights of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steadydetr.checkpoints.finding import CONFIG
from steadydetr.config import check_within, from_plain
from steadydetr.data.transforms import EvalTransform, ShortestSide
from steadydetr.detectors.configs.base import DetectorConfig
from steadydetr.files import printable, read_json_object
from steadydetr.kinds import register


@register("detector-card")
@dataclass(frozen=True)
class DetectorCard:
    """What config.json holds: all that is needed beside the weights to use a detector."""

    detector: DetectorConfig
    classes: tuple[str, ...]  # names of the classes, in the order of their logits
    category_ids: tuple[int, ...]  # of the same classes in the annotations of the data, and therefore in COCO results
    resize: EvalTransform = ShortestSide()
    top: int = 300  # detections of an image at most
    nms: float | None = None  # IoU above which the lower-scored of two detections of a class is removed; None: none is

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.category_ids) or not self.classes:
            raise ValueError(f"{len(self.classes)} classes and {len(self.category_ids)} category_ids: there must be as many, one at least")
        check_within("card", self, top=(1, 10**6), nms=(0, 1))


def read_card(folder: Path) -> DetectorCard:
    """The card of a checkpoint folder.

    Raises:
        ValueError: config.json is damaged, of another version, or not that of a checkpoint.
    """
    card = from_plain(read_json_object(folder / CONFIG), printable(folder / CONFIG))
    if not isinstance(card, DetectorCard):
        raise ValueError(f"{folder / CONFIG} is not that of a checkpoint but a {type(card).__name__}")
    return card
