"""Recipes: functions without arguments, here `mylab:entropy-dino` and `mylab:plain`."""

from __future__ import annotations

from dataclasses import replace

from mylab.entropy import Entropy
from mylab.losses_csv import LossesCsv
from mylab.mosaic import Mosaic
from mylab.patches import PatchBackboneConfig
from mylab.plain_detr import PlainDETRConfig
from mylab.sharp import SharpCost, SoftenedTarget
from steadydetr import Recipe, recipe
from steadydetr.recipes import find


@recipe
def entropy_dino() -> Recipe:
    """The small DINO, whose scores are to decide."""
    start = find("small-dino")
    return replace(start, name="entropy-dino", objectives=(*start.objectives, Entropy()), notes="small DINO, with entropy")


@recipe
def plain() -> Recipe:
    """Everything of ours in one run."""
    start = find("small-deformable-detr")
    return replace(
        start,
        name="plain",
        detector=PlainDETRConfig(PatchBackboneConfig()),
        criterion=replace(start.criterion, class_cost=SharpCost(), class_target=SoftenedTarget()),
        objectives=(*start.objectives, Entropy()),
        data=replace(start.data, transform=Mosaic(size=128)),
        sinks=(LossesCsv(),),
        notes="a detector, a backbone, a cost, a target, an objective, an augmentation and a sink of ours",
    )
