"""The objectives: a training method is a tuple of them over one criterion."""

from steadydetr.objectives.assignment_distillation import AssignmentDistillation, TeacherInit
from steadydetr.objectives.auxiliary_groups import AuxiliaryGroups
from steadydetr.objectives.base import Matched, Objective, Predicted
from steadydetr.objectives.denoising import Denoising, DenoisingObjective, DNDenoising, MaskDenoising
from steadydetr.objectives.feature_distillation import FeatureDistillation
from steadydetr.objectives.fgd import FGD
from steadydetr.objectives.fgfi import FGFI
from steadydetr.objectives.fkd import FKD
from steadydetr.objectives.group_matching import GroupMatching
from steadydetr.objectives.logits_distillation import LogitsDistillation
from steadydetr.objectives.matching_distillation import JoinedMatches, MatchingDistillation
from steadydetr.objectives.mgd import MGD
from steadydetr.objectives.one_to_many import OneToMany
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
    "DNDenoising",
    "Denoising",
    "DenoisingObjective",
    "FeatureDistillation",
    "GroupMatching",
    "JoinedMatches",
    "LogitsDistillation",
    "MaskDenoising",
    "Matched",
    "MatchingDistillation",
    "NaivePrediction",
    "Objective",
    "OneToMany",
    "Predicted",
    "PredictionDistillation",
    "ReleasedFeatures",
    "ReleasedLogits",
    "SetPrediction",
    "TeacherInit",
]
