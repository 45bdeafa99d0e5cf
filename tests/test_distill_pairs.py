"""Offline distillation between detectors of every kind: what they hand on, what is trained, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from steadydetr.detectors import DetectorConfig
from steadydetr.learning.context import StepContext
from steadydetr.objectives import (
    AssignmentDistillation,
    LogitsDistillation,
    Objective,
    SetPrediction,
    TeacherInit,
)
from tests.conftest import CLASSES, DETECTORS, make_batch
from tests.distill_steps import ALL, OTHER, learned, make_distilled, other, perturb
from tests.steps import terms, wide

POSITIONED = {"deformable", "refine", "two-stage", "h-deformable", "conditional"}


@pytest.mark.parametrize("teacher", DETECTORS)
@pytest.mark.parametrize("student", DETECTORS)
def test_every_pair_of_detectors(student: str, teacher: str) -> None:
    """Another width, other queries and stages; everything that is trained learns, without objects too."""
    method = make_distilled(DETECTORS[student], other(teacher), ALL)
    method(wide(make_batch((2, 0, 3)))).total.backward()
    for name, parameter in learned(method).items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert dict(method.adapters).keys() == {"assignment"}


@pytest.mark.parametrize("counts", [(0, 0), (15,), (0, 14)])
@pytest.mark.parametrize("name", ["deformable", "two-stage", "dino"])
def test_every_parameter_gets_a_finite_gradient(name: str, counts: tuple[int, ...]) -> None:
    """Without objects, and with more than either side has queries."""
    method = make_distilled(DETECTORS[name], other(name))
    losses = method(wide(make_batch(counts)))
    losses.total.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learned(method).values())
    assert all(value.isfinite().all() for value in terms(losses).values())


@pytest.mark.parametrize(
    ("student", "teacher", "sized"),
    [
        ("refine", "two-stage", False),
        ("two-stage", "refine", False),
        ("dab", "dino", True),
        ("refine", "dino", False),
        ("two-stage", "dab", True),
    ],
)
def test_queries_of_the_group(student: str, teacher: str, sized: bool) -> None:
    """The teacher's, adapted; a size only where both sides know one; position vectors only where the student wants them."""
    method = make_distilled(DETECTORS[student], other(teacher))
    context = StepContext.of(wide(make_batch((2, 3))), method.student, method.criterion, method.teaching, dict(method.adapters))
    (group,) = AssignmentDistillation().query_groups(context)
    given, adapter = context.teacher_outputs["teacher"].queries, method.adapters["assignment"]
    assert isinstance(adapter, nn.ModuleDict)
    assert torch.equal(group.queries.reference, given.reference) and group.queries.sized == sized and not group.sees
    assert torch.equal(group.queries.content, adapter["content"](given.content)) and not given.content.requires_grad
    assert (group.queries.position is not None) == (student in POSITIONED)
    assert ("position" in adapter) == (student in POSITIONED and (student, teacher) != ("two-stage", "dab"))  # it has a layer for boxes


def test_references_made_by_the_student() -> None:
    """As released: its own layer on the teacher's position vectors, which then learns from the group too."""
    objective = AssignmentDistillation(reference="student")
    method = make_distilled(DETECTORS["deformable"], replace(DETECTORS["refine"], queries=9), (SetPrediction(), objective))
    context = StepContext.of(wide(make_batch((2, 3))), method.student, method.criterion, method.teaching)
    (group,) = objective.query_groups(context)
    layer, position = method.student.query_reference, method.teaching["teacher"].query_position.weight
    assert torch.equal(group.queries.reference[0, :, :2], (position @ layer.weight.T + layer.bias).sigmoid())
    assert not group.queries.sized and not method.adapters
    with pytest.raises(ValueError, match=r"teacher \(DINO\) have not: --objectives.assignment.reference teacher"):
        make_distilled(DETECTORS["deformable"], DETECTORS["dino"], (SetPrediction(), objective))
    for student in ("two-stage", "dab"):
        with pytest.raises(ValueError, match="reference student needs a layer that makes references"):
            make_distilled(DETECTORS[student], DETECTORS["deformable"], (SetPrediction(), objective))


@pytest.mark.parametrize("name", ["deformable", "refine", "dab", "dino", "conditional"])
def test_teacher_init(name: str) -> None:
    """The student's queries are the teacher's at the start; nothing else of it, no group, no term."""
    config = DETECTORS[name]
    plain, method = (make_distilled(config, config, (SetPrediction(), *more)) for more in ((), (TeacherInit(),)))
    teacher = method.teaching["teacher"].state_dict()
    for key, value in method.student.state_dict().items():
        if value.is_floating_point() and value.numel() > 1 and key.startswith("query_"):
            assert torch.equal(value, teacher[key]) and not torch.equal(value, plain.student.state_dict()[key])
        else:
            assert torch.equal(value, plain.student.state_dict()[key])
    assert terms(method(wide(make_batch((2, 3))))).keys() == terms(plain(wide(make_batch((2, 3))))).keys()
    assert not method.adapters


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (DETECTORS["refine"], replace(DETECTORS["refine"], queries=9)),
        (DETECTORS["refine"], replace(DETECTORS["refine"], transformer=OTHER["transformer"])),
        (DETECTORS["dab"], DETECTORS["refine"]),
        (DETECTORS["dino"], DETECTORS["two-stage"]),
        (DETECTORS["two-stage"], DETECTORS["two-stage"]),
    ],
)
def test_teacher_init_that_cannot_be(student: DetectorConfig, teacher: DetectorConfig) -> None:
    with pytest.raises(ValueError, match=r"learned queries of equal number and width .* the student \(\w+\) has .*, the teacher"):
        make_distilled(student, teacher, (SetPrediction(), TeacherInit()))


@pytest.mark.parametrize("objective", [LogitsDistillation("big"), AssignmentDistillation("big"), TeacherInit("big")])
def test_a_teacher_that_is_not_there_is_named(objective: Objective) -> None:
    with pytest.raises(ValueError, match=rf"objective {objective.name} learns from a teacher called 'big', but the recipe has teacher"):
        make_distilled(DETECTORS["refine"], DETECTORS["refine"], (SetPrediction(), objective))


def test_a_teacher_that_knows_more_scores_the_classes_of_the_data() -> None:
    """In their order; the rest of what it sees, and which proposals it chooses, is as before."""
    for name in ("refine", "two-stage", "dino", "conditional"):
        detector = DETECTORS[name].build(CLASSES)
        perturb(detector, 0)
        batch = make_batch((1, 2))
        before = detector.eval()(batch.images, batch.padding)
        detector.keep_classes([3, 0, 4])
        after = detector(batch.images, batch.padding)
        assert torch.equal(after.boxes, before.boxes) and detector.num_classes == 3
        torch.testing.assert_close(after.logits, before.logits[..., [3, 0, 4]])
