"""Translates what earlier versions wrote into what today's version writes. The tables only grow, so that old files are read for good.

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


def _feature_distillation(plain: Plain) -> Plain:
    """With `as_released` the part is `ReleasedFeatures` today. Without a weight, each of the two has its default."""
    released, weight = plain.pop("as_released", False), plain.get("weight", 20.0)
    if released:
        return {"kind": "released-features", "teacher": plain.get("teacher", "teacher"), "weight": 1.0 if weight is None else weight}
    return plain | {"weight": 20.0 if weight is None else weight}


def _logits_distillation(plain: Plain) -> Plain:
    return _parted(plain, "as_released", "released-logits", ("teacher", "positive_class", "positive_box", "stages", "weights", "weight"))


def _assignment_distillation(plain: Plain) -> Plain:
    return _parted(plain, "init", "teacher-init", ("teacher",))


def _prediction_distillation(plain: Plain) -> Plain:
    return _parted(plain, "naive", "naive-prediction", ("teacher", "position"))


CHANGES_SINCE_0_1: dict[str, Callable[[Plain], Plain]] = {  # by kind
    "set-prediction": _set_prediction,
    "matching-distillation": _matching_distillation,
    "feature-distillation": _feature_distillation,
    "logits-distillation": _logits_distillation,
    "assignment-distillation": _assignment_distillation,
    "prediction-distillation": _prediction_distillation,
}


ADDED = {  # fields that files may lack which were written before there were any, with what they mean in these; by kind
    "timm-backbone": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},  # all pixels were normalised as ImageNet's
}


def _renamed(plain: Plain, **names: str) -> Plain:
    return {names.get(key, key): value for key, value in plain.items()}


def _parted(plain: Plain, flag: str, kind: str, kept: tuple[str, ...]) -> Plain:
    """Where the flag is set: a part of that kind, with the kept fields. Elsewhere: the same part without the flag."""
    if plain.pop(flag, False):
        return {"kind": kind} | {name: plain[name] for name in kept if name in plain}
    return plain


def upgrade(plain: Any) -> Any:
    """A stored config, of whichever format, as today's format: parts by their kinds, fields by their names of today."""
    if isinstance(plain, list):
        return [upgrade(item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    name = None if "kind" in plain else plain.get("type", plain.get("function"))
    if not isinstance(name, str):  # a part of today's format, or an object around parts
        return _with_added({key: upgrade(value) for key, value in plain.items()})
    fields = {key: upgrade(value) for key, value in plain.items() if key not in ("type", "function")}
    kind = KINDS_OF_0_1.get(name.removeprefix("steadydetr."), name)
    return _with_added(CHANGES_SINCE_0_1.get(kind, dict)({"kind": kind} | fields))


def _with_added(plain: Plain) -> Plain:
    kind = plain.get("kind")
    return plain | {name: value for name, value in ADDED.get(kind, {}).items() if name not in plain} if isinstance(kind, str) else plain
