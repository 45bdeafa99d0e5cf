"""The objectives: a training method is a tuple of them over one criterion."""

from steadydetr.objectives.assignment_distillation import AssignmentDistillation, TeacherInit
from steadydetr.objectives.auxiliary_groups import AuxiliaryGroups
from steadydetr.objectives.base import Matched, Objective, Predicted
from steadydetr.objectives.denoising import Denoising
from steadydetr.objectives.feature_distillation import FeatureDistillation
from steadydetr.objectives.fgd import FGD
from steadydetr.objectives.fgfi import FGFI
from steadydetr.objectives.fkd import FKD
from steadydetr.objectives.logits_distillation import LogitsDistillation
from steadydetr.objectives.matching_distillation import JoinedMatches, MatchingDistillation
from steadydetr.objectives.mgd import MGD
from steadydetr.objectives.prediction_distillation import NaivePrediction, PredictionDistillation
from steadydetr.objectives.released_features import ReleasedFeatures
from steadydetr.objectives.released_logits import ReleasedLogits
from steadydetr.objectives.set_prediction import SetPrediction

__all__ = [
    "FGD",
    "FGFI",
    "FKD",
    "MGD",
    "AssignmentDistillation",
    "AuxiliaryGroups",
    "Denoising",
    "FeatureDistillation",
    "JoinedMatches",
    "LogitsDistillation",
    "Matched",
    "MatchingDistillation",
    "NaivePrediction",
    "Objective",
    "Predicted",
    "PredictionDistillation",
    "ReleasedFeatures",
    "ReleasedLogits",
    "SetPrediction",
    "TeacherInit",
]
