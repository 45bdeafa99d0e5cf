"""Released DETRDistill: logits distillation and the teacher's group, on given predictions and in a whole step.

The feature losses of the same files are compared with those of feature distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadydetr.boxes import to_cxcywh, to_xyxy
from steadydetr.equations.distill import pairwise_boxes, soft_label_cost
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.frozen import Frozen
from steadydetr.learning.matching import Problem, solve
from steadydetr.objectives import AssignmentDistillation, Objective, ReleasedLogits, SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.structures import DecodedStages, Losses, Memory, Queries, QueryGroup
from tests.parity.golden import cases, load
from tests.parity.models import close, close_to_scale
from tests.parity.test_golden_mmdet import batch, rebuild

CRITERION = Criterion(loss_weights=Weights(2.0, 5.0, 2.0))
NAMES = {"class": "cls", "l1": "bbox", "giou": "iou"}
COST = {"rtol": 1e-5, "atol": 1e-5}


class Given(nn.Module):
    """A detector whose predictions are those of a file, by the names of the groups."""

    width, architecture = 1, "Given"
    positioned = makes_references = class_agnostic_proposals = predicts_masks = starts_from_masks = False

    def __init__(self, tensors: Mapping[str, Tensor], **groups: str) -> None:
        super().__init__()
        self.num_classes = tensors[f"in.{groups['main']}.cls_logits"].shape[-1]
        self.groups = groups
        self.logits = nn.ParameterDict({g: nn.Parameter(tensors[f"in.{key}.cls_logits"].clone()) for g, key in groups.items()})
        self.boxes = nn.ParameterDict({g: nn.Parameter(tensors[f"in.{key}.boxes_cxcywh"].clone()) for g, key in groups.items()})

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        tokens = torch.zeros(len(images), 1, 1)
        return Memory(tokens, tokens[..., 0].bool(), ((1, 1),), torch.ones(len(images), 1, 2), tokens)

    def queries(self, memory: Memory) -> dict[str, Queries]:
        shape = self.logits["main"].shape[1:3]
        return {"main": Queries(torch.zeros(*shape, 1), torch.zeros(*shape, 4))}

    def proposals(self, memory: Memory, queries: Queries) -> None:
        return None

    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, DecodedStages]:
        stages = {}
        for group in groups:
            logits, boxes = self.logits[group.name], self.boxes[group.name]
            stages[group.name] = DecodedStages(logits, boxes, content=boxes, reference=boxes)
        return stages


def given_method(tensors: Mapping[str, Tensor], objectives: tuple[Objective, ...], **groups: str) -> Method:
    teacher = Frozen(Given(tensors, main="teacher"))
    return Method(Given(tensors, **groups), CRITERION, objectives, {"teacher": teacher})  # type: ignore[arg-type, dict-item]


def check_terms(losses: Losses, tensors: Mapping[str, Tensor], group: str, expected: str, surplus: Tensor | None = None) -> None:
    """`expected` has places for the stage and for the term. `surplus`: [S] what the file has in the class loss besides."""
    for name, values, weight in losses:
        kind = name.rpartition("/")[2].rpartition("_")[2]
        if name.startswith(group):
            for stage, value in enumerate(values):
                key = expected.format("" if stage == len(values) - 1 else f"d{stage}.", NAMES[kind])
                besides = 0.0 if surplus is None or kind != "class" else surplus[stage]
                close(value * weight + besides, tensors[key].reshape(()), atol=1e-5, rtol=1e-5, name=key)


def unmatched_terms(student: Given, problem: Problem) -> Tensor:
    """[S] What the released code adds where the student has more queries: those without a partner learn the number of classes as their
    score, by mistake (F-63). 0 where all have one."""
    match, logits = solve([problem])[0].match, student.logits["main"]
    alone = torch.ones(logits.flatten(0, 1).shape[:2], dtype=torch.bool)
    alone[match.image, match.query] = False
    wanted = torch.full_like(logits, student.num_classes)
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(-1) * alone.view(logits.shape[:3])
    return loss.sum((1, 2)) * len(logits) / len(match.query)


@pytest.mark.parametrize("stages", ["progressive", "last"])
@pytest.mark.parametrize("path", cases("mmdet/detrdistill_logits_*"))
def test_logits(path: Path, stages: Any) -> None:
    """Losses and gradients as released, stage by stage and from the last stage; the detection losses beside them."""
    config, tensors = load(path)
    method = given_method(tensors, (SetPrediction(), ReleasedLogits(stages=stages)), main="student")
    student, objective = method.student, method.objectives[1]
    assert isinstance(student, Given)
    context = StepContext.of(batch(config, tensors), student, CRITERION, method.teaching)  # type: ignore[arg-type]
    (problem,) = objective.problems(context, student.decode(context.memory, [QueryGroup("main", context.queries["main"])]))
    surplus = unmatched_terms(student, problem)
    losses = method(context.batch)
    prefix = "out.loss." if stages == "progressive" else "out.last_stage_teacher.loss."
    check_terms(losses, tensors, "logits", prefix + "{}loss_{}_distill", surplus)
    check_terms(losses, tensors, "main", "out.loss.{}loss_{}")
    if stages == "progressive":
        distilled = [values.sum() * weight for name, values, weight in losses if name.startswith("logits")]
        (torch.stack(distilled).sum() + surplus.sum()).backward()
        for found, key in ((student.logits["main"].grad, "cls_logits"), (student.boxes["main"].grad, "boxes_cxcywh")):
            assert found is not None
            close_to_scale(found, tensors[f"out.grad_distill_only.student.{key}"], 1e-5, key)


@pytest.mark.parametrize("path", cases("mmdet/detrdistill_logits_*"))
def test_logits_costs_and_assignments(path: Path) -> None:
    """Each term of the cost matrix, and who is matched with whom."""
    config, tensors = load(path)
    method = given_method(tensors, (SetPrediction(), ReleasedLogits()), main="student")
    context = StepContext.of(batch(config, tensors), method.student, CRITERION, method.teaching)
    stages = method.student.decode(context.memory, [QueryGroup("main", context.queries["main"])])
    (problem,) = method.objectives[1].problems(context, stages)
    match, taught = solve([problem])[0].match, problem.counts[0]
    images = len(context.targets.counts)
    for stage in range(len(stages["main"].logits)):
        scores = tensors["in.teacher.cls_logits"][stage].sigmoid()
        close(scores, tensors[f"out.stage{stage}.teacher_target_scores"], atol=1e-6)
        clamped = to_cxcywh(to_xyxy(tensors["in.teacher.boxes_cxcywh"][stage]).clamp(0, 1))
        label = soft_label_cost(stages["main"].logits[stage], scores)
        l1, giou = pairwise_boxes(stages["main"].boxes[stage], clamped)
        for image in range(images):
            key = f"out.stage{stage}.img{image}.distill_"
            for found, term in ((label, "cls_cost"), (5 * l1, "reg_cost"), (-2 * giou, "iou_cost")):
                torch.testing.assert_close(found[image].T.detach(), tensors[key + term], **COST)
            rows = match.image == stage * images + image
            ours = torch.full((label.shape[2],), -1)
            ours[match.query[rows]] = match.target[rows] % taught
            assert torch.equal(ours, tensors[key + "assigned_teacher_inds"])


@pytest.mark.parametrize(("matching", "prefix"), [("teacher", "paper_teacher_assignment"), ("own", "released_own_assignment")])
@pytest.mark.parametrize("path", cases("mmdet/detrdistill_group_*"))
def test_group(path: Path, matching: Any, prefix: str) -> None:
    """Eq. 9, and what the released code does in its place."""
    config, tensors = load(path)
    method = given_method(tensors, (AssignmentDistillation(matching=matching),), main="student_group", assignment="student_group")
    losses = method(batch(config, tensors))
    check_terms(losses, tensors, "assignment", f"out.{prefix}.{{}}teacher_query_loss_{{}}")
    close(losses.total, tensors[f"out.{prefix}.total"].reshape(()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", cases("mmdet/detrdistill_full_*"))
def test_whole_step(path: Path) -> None:
    """Detectors and losses together: all terms but those on features, which hold the contrastive loss too."""
    config, tensors = load(path)
    teacher, student = (rebuild(config, tensors, who) for who in ("teacher", "student"))
    released = (SetPrediction(), ReleasedLogits(), AssignmentDistillation(matching="own", reference="student"))
    losses = Method(student, CRITERION, released, {"teacher": Frozen(teacher)}).eval()(batch(config, tensors))
    check_terms(losses, tensors, "main", "out.loss.{}loss_{}")
    check_terms(losses, tensors, "logits", "out.loss.{}loss_{}_distill")
    check_terms(losses, tensors, "assignment", "out.loss.{}teacher_query_loss_{}")
    features = sum(tensors[f"out.loss.stage{stage}_relation_distill_loss"] for stage in range(config["num_dec"]))
    close(losses.total + features.squeeze(), tensors["out.loss.total"].reshape(()), atol=1e-4, rtol=1e-5)
