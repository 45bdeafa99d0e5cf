"""OD-DETR (Wu et al. 2024): online distillation on Deformable DETR with refinement, DAB-Deformable-DETR and DINO.

Learning rates and batches are the baselines'; the teacher is the average of the weights with decay 0.9996 (paper Sec. 4.1).
"""

from __future__ import annotations

from dataclasses import replace

from steadydetr.detectors.configs.deformable import with_transformer
from steadydetr.learning.class_terms import PositionModulatedCost, QualityTarget
from steadydetr.learning.teachers import EMATeacher
from steadydetr.objectives import AuxiliaryGroups, MatchingDistillation, PredictionDistillation, SetPrediction
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.dab import dab_deformable_detr_r50_24ep
from steadydetr.recipes.deformable import deformable_detr_refine_r50_12ep
from steadydetr.recipes.dino import dino_4scale_r50_12ep, dino_4scale_swin_l_12ep, dino_5scale_r50_12ep
from steadydetr.recipes.schedules import for_epochs

PAPERS_TEACHER = EMATeacher(0.9996)


def online(recipe: Recipe, name: str, reported: str = "", teacher: EMATeacher = PAPERS_TEACHER) -> Recipe:
    """The recipe with quality focal loss, matching distillation, prediction distillation and auxiliary groups.

    A detector whose queries take no box goes without auxiliary groups.  # D-165
    """
    groups = (AuxiliaryGroups(),) if recipe.detector.takes_boxes else ()
    others = tuple(o for o in recipe.objectives if not isinstance(o, SetPrediction))
    return replace(
        recipe,
        name=name,
        criterion=replace(recipe.criterion, class_target=QualityTarget(), alpha=None),
        objectives=(SetPrediction(MatchingDistillation()), *others, PredictionDistillation(), *groups),
        teachers=(teacher,),
        reported=reported,
        notes=f"{recipe.notes}, with online distillation",
    )


@recipe
def od_deformable_detr_r50_12ep() -> Recipe:
    """All decoder stages share one set of parameters, heads included (Table 8)."""
    start = deformable_detr_refine_r50_12ep()
    shared = with_transformer(start.detector, share_decoder=True)
    training = replace(start.training, weight_decay=2e-5)
    return online(replace(start, detector=shared, training=training), "od-deformable-detr-r50-12ep")


@recipe
def od_deformable_detr_r50_24ep() -> Recipe:
    return for_epochs(od_deformable_detr_r50_12ep(), 24, "24ep", "47.7 (Table 1)")


@recipe
def od_dab_deformable_detr_r50_24ep() -> Recipe:
    return online(dab_deformable_detr_r50_24ep(), "od-dab-deformable-detr-r50-24ep", "50.2 (Table 1)")


@recipe
def od_dino_4scale_r50_12ep() -> Recipe:
    return online(dino_4scale_r50_12ep(), "od-dino-4scale-r50-12ep", "50.4 (Table 1)")


@recipe
def od_dino_4scale_r50_24ep() -> Recipe:
    return for_epochs(od_dino_4scale_r50_12ep(), 24, "24ep", "51.8 (Table 1)")


@recipe
def od_dino_5scale_r50_12ep() -> Recipe:
    return online(dino_5scale_r50_12ep(), "od-dino-5scale-r50-12ep", "52.0 (Table 1)")


@recipe
def od_dino_4scale_swin_l_12ep() -> Recipe:
    return online(dino_4scale_swin_l_12ep(), "od-dino-4scale-swin-l-12ep", "57.7 (Table 11)")


@recipe
def od_dino_4scale_swin_l_24ep() -> Recipe:
    return for_epochs(od_dino_4scale_swin_l_12ep(), 24, "24ep", "58.8 (Table 11)")


@recipe
def stable_od_dino_4scale_r50_12ep() -> Recipe:
    """OD-DINO with the position-modulated cost and dense memory fusion of Stable-DINO; the class target stays OD-DETR's."""
    start = od_dino_4scale_r50_12ep()
    return replace(
        start,
        name="stable-od-dino-4scale-r50-12ep",
        criterion=replace(start.criterion, class_cost=PositionModulatedCost()),
        detector=with_transformer(start.detector, fusion="dense"),
        reported="",
        notes=f"{start.notes}, position-modulated cost and dense memory fusion",
    )


@recipe
def stable_od_dino_4scale_r50_24ep() -> Recipe:
    return for_epochs(stable_od_dino_4scale_r50_12ep(), 24, "24ep")
