"""DETRDistill (Chang et al. 2023): offline distillation of Deformable DETR and DINO, and with OD-DETR and stable matching in one run.

Released configurations: mmdet's Deformable DETR (no bias before the neck's GroupNorm), which has the paper's 39.84 M and 58.78 M
trainable parameters at COCO's 80 classes; the three objectives weigh 1, 20, 1. The teacher is given by `steadydetr distill`.
"""

from __future__ import annotations

from dataclasses import replace

from steadydetr.data import DataConfig
from steadydetr.detectors.configs.deformable import with_transformer
from steadydetr.learning.teachers import TrainedTeacher
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.objectives import AssignmentDistillation, FeatureDistillation, LogitsDistillation, Objective
from steadydetr.recipes.base import Recipe, recipe
from steadydetr.recipes.deformable import deformable_detr_r50_50ep
from steadydetr.recipes.dino import dino_4scale_r50_12ep
from steadydetr.recipes.online import stable_od_dino_4scale_r50_12ep

PAPERS = (LogitsDistillation(), FeatureDistillation(), AssignmentDistillation())
GENTLE = (LogitsDistillation(), FeatureDistillation(weight=2.0), AssignmentDistillation())  # D-60
BACKBONES = {"r101": "resnet101.tv_in1k", "r50": "resnet50.tv_in1k", "r18": "resnet18.tv_in1k", "mobilenetv2": "mobilenetv2_100.ra_in1k"}
VOC = DataConfig(source="voc", train_split="trainval", val_split="test")  # VOC2007 and VOC2012 in the folder voc; 2012 has no test


def distilled(recipe: Recipe, checkpoint: str = "", objectives: tuple[Objective, ...] = GENTLE) -> Recipe:
    """The recipe with a trained teacher, and DETRDistill's objectives where none of its own learns from it.

    Args:
        checkpoint: of the teacher; empty: the one that the recipe has, or none yet.
        objectives: those that it gets; by default the paper's, but for a weight of features that does not drown detection.
    """
    trained = TrainedTeacher(checkpoint)
    before = [teacher for teacher in recipe.teachers if isinstance(teacher, TrainedTeacher)]
    if before and not checkpoint:
        trained = before[0]
    others = tuple(teacher for teacher in recipe.teachers if not isinstance(teacher, TrainedTeacher))
    recipe = replace(recipe, teachers=(*others, trained))
    if any(trained.name in objective.learns_from for objective in recipe.objectives):
        return recipe
    objectives = (*recipe.objectives, *objectives)
    return replace(
        recipe, name=f"distilled-{recipe.name}", objectives=objectives, reported="", notes=f"{recipe.notes}, with a trained teacher"
    )


def _named(recipe: Recipe, name: str, reported: str, notes: str) -> Recipe:
    return replace(distilled(recipe, objectives=PAPERS), name=name, reported=reported, notes=notes)


def _with_backbone(recipe: Recipe, backbone: str) -> Recipe:
    return replace(recipe, detector=recipe.detector.changed(backbone=TimmBackboneConfig(BACKBONES[backbone])))


def _plain(backbone: str) -> Recipe:
    """mmdet's plain Deformable DETR, trained like its baseline."""  # D-40
    start = _with_backbone(deformable_detr_r50_50ep(), backbone)
    return replace(start, detector=with_transformer(start.detector, neck_bias=False))


@recipe
def deformable_detr_r101_50ep() -> Recipe:
    """The teacher: steadydetr train deformable-detr-r101-50ep --data COCO."""
    return replace(
        _plain("r101"),
        name="deformable-detr-r101-50ep",
        reported="45.5 (DETRDistill Table 3; released 44.8)",
        notes="Deformable DETR, plain, with ResNet-101: DETRDistill's teacher",
    )


def _deformable(student: str, teacher: str, reported: str = "") -> Recipe:
    name = f"detrdistill-deformable-detr-{teacher}-{student}-50ep"
    return _named(_plain(student), name, reported, f"Deformable DETR, plain, {student} taught by {teacher} (DETRDistill)")


@recipe
def detrdistill_deformable_detr_r101_r50_50ep() -> Recipe:
    """steadydetr distill detrdistill-deformable-detr-r101-r50-50ep --teacher runs/deformable-detr-r101-50ep --data COCO."""
    return _deformable("r50", "r101", "46.6 (DETRDistill Table 3)")


@recipe
def detrdistill_deformable_detr_r50_r50_50ep() -> Recipe:
    """Teacher and student of the same size: self-distillation."""
    return _deformable("r50", "r50")


@recipe
def detrdistill_deformable_detr_r101_r18_50ep() -> Recipe:
    return _deformable("r18", "r101")


@recipe
def detrdistill_deformable_detr_r101_mobilenetv2_50ep() -> Recipe:
    return _deformable("mobilenetv2", "r101")


@recipe
def dino_4scale_r101_12ep() -> Recipe:
    """The teacher of DINO's students."""
    return replace(
        _with_backbone(dino_4scale_r50_12ep(), "r101"),
        name="dino-4scale-r101-12ep",
        reported="50.6 (DETRDistill, supplement Table 1)",
        notes="DINO, 4 scales, with ResNet-101: DETRDistill's teacher",
    )


@recipe
def detrdistill_dino_4scale_r101_r18_12ep() -> Recipe:
    start = _with_backbone(dino_4scale_r50_12ep(), "r18")
    notes = "DINO, 4 scales, r18 with 900 queries taught by r101 (DETRDistill)"
    return _named(start, "detrdistill-dino-4scale-r101-r18-12ep", "47.9 (DETRDistill, supplement Table 1)", notes)


@recipe
def detrdistill_dino_4scale_r101_r50_12ep() -> Recipe:
    """A student with 300 queries, whose teacher has 900."""
    start = dino_4scale_r50_12ep()
    notes = "DINO, 4 scales, r50 with 300 queries taught by r101 with 900 (DETRDistill)"
    start = replace(start, detector=start.detector.changed(queries=300))
    return _named(start, "detrdistill-dino-4scale-r101-r50-12ep", "50.1 (DETRDistill, supplement Table 1)", notes)


def _on_voc(recipe: Recipe, name: str, reported: str) -> Recipe:
    """Trained on the trainval sets of 2007 and 2012, tested on that of 2007."""
    data = replace(VOC, transform=recipe.data.transform, resize=recipe.data.resize)
    return replace(recipe, name=name, data=data, reported=reported, notes=f"{recipe.notes}, on Pascal VOC 2007 + 2012")


@recipe
def deformable_detr_r101_voc() -> Recipe:
    return _on_voc(deformable_detr_r101_50ep(), "deformable-detr-r101-voc", "AP50 81.00, mAP 80.99 (supplement Table 2)")


@recipe
def detrdistill_deformable_detr_r101_r18_voc() -> Recipe:
    start = detrdistill_deformable_detr_r101_r18_50ep()
    return _on_voc(start, "detrdistill-deformable-detr-r101-r18-voc", "AP50 79.00, mAP 78.99 (supplement Table 2)")


@recipe
def detrdistill_deformable_detr_r101_r50_voc() -> Recipe:
    start = detrdistill_deformable_detr_r101_r50_50ep()
    return _on_voc(start, "detrdistill-deformable-detr-r101-r50-voc", "AP50 81.60, mAP 81.61 (supplement Table 2)")


@recipe
def steady_dino_4scale_r50_12ep() -> Recipe:
    """DETRDistill, OD-DETR and stable matching in one run: a trained teacher and the student's own average."""
    start = stable_od_dino_4scale_r50_12ep()
    return _named(start, "steady-dino-4scale-r50-12ep", "", f"{start.notes}, and a trained teacher")
