"""Recipes: functions that return a `Recipe`; a variant is its difference to another.

`find("dino-4scale-r50-12ep")` gives one, `names()` all of them.
"""

from __future__ import annotations

from collections.abc import Callable

from steadydetr.config import nearest
from steadydetr.recipes import dab, deformable, dino, distill, online, small, stable
from steadydetr.recipes.base import Recipe


def _named(*functions: Callable[[], Recipe]) -> dict[str, Callable[[], Recipe]]:
    return {function.__name__.replace("_", "-"): function for function in functions}


RECIPES = _named(
    small.quickstart,
    small.small_dino,
    small.small_stable_dino,
    small.small_deformable_detr,
    small.small_stable_deformable_detr,
    small.small_refine_deformable_detr,
    small.small_od_deformable_detr,
    small.small_od_dino,
    small.small_teacher_deformable_detr,
    small.small_distill_deformable_detr,
    deformable.deformable_detr_r50_12ep,
    deformable.deformable_detr_r50_24ep,
    deformable.deformable_detr_r50_50ep,
    deformable.deformable_detr_refine_r50_12ep,
    deformable.deformable_detr_refine_r50_24ep,
    deformable.deformable_detr_refine_r50_50ep,
    deformable.deformable_detr_two_stage_r50_12ep,
    deformable.deformable_detr_two_stage_r50_24ep,
    deformable.deformable_detr_two_stage_r50_50ep,
    dab.dab_deformable_detr_r50_12ep,
    dab.dab_deformable_detr_r50_24ep,
    dab.dab_deformable_detr_r50_50ep,
    dab.dab_deformable_detr_two_stage_r50_50ep,
    dino.dino_4scale_r50_12ep,
    dino.dino_4scale_r50_24ep,
    dino.dino_4scale_r50_36ep,
    dino.dino_5scale_r50_12ep,
    dino.dino_4scale_swin_l_12ep,
    dino.dino_4scale_swin_l_24ep,
    dino.dino_4scale_swin_l_36ep,
    stable.stable_dino_4scale_r50_12ep,
    stable.stable_dino_4scale_r50_24ep,
    stable.stable_dino_5scale_r50_12ep,
    stable.stable_dino_4scale_swin_l_12ep,
    stable.stable_dino_4scale_swin_l_24ep,
    stable.stable_deformable_detr_r50_12ep,
    stable.stable_dab_deformable_detr_r50_12ep,
    online.od_deformable_detr_r50_12ep,
    online.od_deformable_detr_r50_24ep,
    online.od_dab_deformable_detr_r50_24ep,
    online.od_dino_4scale_r50_12ep,
    online.od_dino_4scale_r50_24ep,
    online.od_dino_5scale_r50_12ep,
    online.od_dino_4scale_swin_l_12ep,
    online.od_dino_4scale_swin_l_24ep,
    online.stable_od_dino_4scale_r50_12ep,
    online.stable_od_dino_4scale_r50_24ep,
    distill.deformable_detr_r101_50ep,
    distill.dino_4scale_r101_12ep,
    distill.detrdistill_deformable_detr_r101_r50_50ep,
    distill.detrdistill_deformable_detr_r50_r50_50ep,
    distill.detrdistill_deformable_detr_r101_r18_50ep,
    distill.detrdistill_deformable_detr_r101_mobilenetv2_50ep,
    distill.detrdistill_dino_4scale_r101_r18_12ep,
    distill.detrdistill_dino_4scale_r101_r50_12ep,
    distill.deformable_detr_r101_voc,
    distill.detrdistill_deformable_detr_r101_r18_voc,
    distill.detrdistill_deformable_detr_r101_r50_voc,
    distill.steady_dino_4scale_r50_12ep,
)


def names() -> list[str]:
    return list(RECIPES)


def find(name: str) -> Recipe:
    """The recipe of that name, with - or _; a ValueError names the nearest ones."""
    name = name.replace("_", "-")
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}{nearest(name, names())} `steadydetr recipes` lists them all")
    return RECIPES[name]()
