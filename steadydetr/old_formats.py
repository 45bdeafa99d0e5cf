"""What earlier versions wrote, as today's version would write it. These tables only grow: what was once written is read for good.

Everything here works on plain JSON values, so that a report can show an old run whose parts no longer exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Plain = dict[str, Any]

KINDS_OF_0_1 = {  # {"type": ...} and {"function": ...} of format 1
    "checkpoint.Card": "detector-card",
    "classification.FocalCost": "focal-cost",
    "classification.HardTarget": "hard-target",
    "classification.PositionModulatedCost": "position-modulated-cost",
    "classification.PositionTarget": "position-target",
    "classification.QualityTarget": "quality-target",
    "criterion.Criterion": "criterion",
    "criterion.Weights": "loss-weights",
    "data.loading.DataConfig": "data",
    "data.transforms.DetrTransform": "detr-transform",
    "data.transforms.FixedSize": "fixed-size",
    "data.transforms.FixedSizeTransform": "fixed-size-transform",
    "data.transforms.ShortestSide": "shortest-side",
    "detectors.dab_deformable_detr.DABDeformableDETRConfig": "dab-deformable-detr",
    "detectors.deformable.TransformerConfig": "transformer",
    "detectors.deformable_detr.DeformableDETRConfig": "deformable-detr",
    "detectors.dino.DINOConfig": "dino",
    "equations.stable.exponential": "exponential",
    "equations.stable.half_sine": "half-sine",
    "equations.stable.identity": "identity",
    "equations.stable.unit_exponential": "unit-exponential",
    "nn.backbone.BackboneConfig": "timm-backbone",
    "nn.backbone.SmallBackboneConfig": "small-backbone",
    "objectives.assignment_distillation.AssignmentDistillation": "assignment-distillation",
    "objectives.auxiliary_groups.AuxiliaryGroups": "auxiliary-groups",
    "objectives.denoising.Denoising": "denoising",
    "objectives.detection.Detection": "set-prediction",
    "objectives.feature_distillation.FeatureDistillation": "feature-distillation",
    "objectives.feature_peers.FGD": "fgd",
    "objectives.feature_peers.FGFI": "fgfi",
    "objectives.feature_peers.FKD": "fkd",
    "objectives.feature_peers.MGD": "mgd",
    "objectives.logits_distillation.LogitsDistillation": "logits-distillation",
    "objectives.matching_distillation.JoinedMatches": "joined-matches",
    "objectives.matching_distillation.MatchingDistillation": "matching-distillation",
    "objectives.prediction_distillation.PredictionDistillation": "prediction-distillation",
    "recipe.Recipe": "recipe",
    "teachers.EMATeacher": "ema-teacher",
    "teachers.TrainedTeacher": "trained-teacher",
    "training_config.TrainingConfig": "training",
}


def _set_prediction(plain: Plain) -> Plain:
    return _renamed(plain, guide="teacher_match")


def _matching_distillation(plain: Plain) -> Plain:
    return _renamed(plain, twins="counterparts")


CHANGES_SINCE_0_1: dict[str, Callable[[Plain], Plain]] = {
    "set-prediction": _set_prediction,
    "matching-distillation": _matching_distillation,
}


def _renamed(plain: Plain, **names: str) -> Plain:
    return {names.get(key, key): value for key, value in plain.items()}


def upgrade(plain: Any) -> Any:
    """A stored config, of whichever format, as today's format: parts by their kinds, fields by their names of today."""
    if isinstance(plain, list):
        return [upgrade(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    fields = {key: upgrade(value) for key, value in plain.items() if key not in ("type", "function")}
    name = plain.get("type", plain.get("function"))
    if not isinstance(name, str):
        return fields
    kind = KINDS_OF_0_1.get(name.removeprefix("steadydetr."), name)
    return CHANGES_SINCE_0_1.get(kind, dict)({"kind": kind} | fields)
