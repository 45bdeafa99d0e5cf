"""The objectives: a training method is a tuple of them over one criterion."""

from steadydetr.objectives.assignment_distillation import AssignmentDistillation
from steadydetr.objectives.auxiliary_groups import AuxiliaryGroups
from steadydetr.objectives.base import Objective
from steadydetr.objectives.denoising import Denoising
from steadydetr.objectives.feature_distillation import FeatureDistillation
from steadydetr.objectives.feature_peers import FGD, FGFI, FKD, MGD
from steadydetr.objectives.logits_distillation import LogitsDistillation
from steadydetr.objectives.matching_distillation import JoinedMatches, MatchingDistillation
from steadydetr.objectives.prediction_distillation import PredictionDistillation
from steadydetr.objectives.set_prediction import SetPrediction

OBJECTIVES = (
    SetPrediction,
    Denoising,
    PredictionDistillation,
    AuxiliaryGroups,
    LogitsDistillation,
    FeatureDistillation,
    AssignmentDistillation,
    FGD,
    MGD,
    FKD,
    FGFI,
)

__all__ = [
    "FGD",
    "FGFI",
    "FKD",
    "MGD",
    "OBJECTIVES",
    "AssignmentDistillation",
    "AuxiliaryGroups",
    "Denoising",
    "Detection",
    "FeatureDistillation",
    "JoinedMatches",
    "LogitsDistillation",
    "MatchingDistillation",
    "Objective",
    "PredictionDistillation",
]
