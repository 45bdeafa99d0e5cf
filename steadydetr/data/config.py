"""What a run is trained and evaluated on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from steadydetr.data.hold_out import HoldOut
from steadydetr.data.transforms import DetrTransform, EvalTransform, ShortestSide, TrainTransform
from steadydetr.kinds import changeable, register
from steadydetr.limits import Limits


@register("data")
@dataclass(frozen=True)
class DataConfig(Limits, HoldOut):
    """What is trained and evaluated on, what may be read of it, and how it is prepared."""

    source: str = changeable("shapes")  # folder, `shapes`, or several joined by +
    val_source: str = changeable("")  # where validation images come from, if from another place
    train_split: str = "train"
    val_split: str = "val"
    same_images: Literal["refuse", "allow"] = changeable(
        "refuse"
    )  # validation on the images of training: whether they can be learned at all
    transform: TrainTransform = DetrTransform()
    resize: EvalTransform = ShortestSide()
    masks: bool = False  # read the masks of objects; those that have none are not trained on
    filter_empty: bool = False  # leave out training images without objects
    limit: int | None = None  # only the first images of each split, for a trial
    group_by_shape: bool = False  # training batches of images of like proportions, which need less padding
    decode: Literal["exact", "fast"] = "exact"  # fast: training images of which less is needed are decoded at 1/2, 1/4 or 1/8 of their size
    workers: int = changeable(4)  # processes that load images, per rank, at most its share of the processors; 0: none
    unreadable: Literal["error", "skip"] = changeable("error")  # images that cannot be read; skip: left out, after one pass over all files
    timeout: float = changeable(600.0)  # seconds that a batch may be waited for where processes load it; 0: no limit

    def __post_init__(self) -> None:
        Limits.__post_init__(self)
        HoldOut.__post_init__(self)
        if self.same_images not in ("refuse", "allow"):
            raise ValueError(f"data.same_images = {self.same_images!r} must be refuse or allow")
        if self.workers < 0:
            raise ValueError(f"data.workers = {self.workers} must not be negative; 0: no loading processes")
        if self.decode not in ("exact", "fast"):
            raise ValueError(f"data.decode = {self.decode!r} must be exact or fast")
        if self.unreadable not in ("error", "skip"):
            raise ValueError(f"data.unreadable = {self.unreadable!r} must be error or skip")
        if not 0 <= self.timeout < math.inf:
            raise ValueError(f"data.timeout = {self.timeout} must be a number of seconds; 0: no limit")
