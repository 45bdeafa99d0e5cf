"""Prediction distillation (OD-DETR Eq. 5, 6), by hand and against slow twins."""

from __future__ import annotations

import pytest
import torch

from steadydetr.equations.detection import box_terms, classification_loss
from steadydetr.equations.online import distillation_terms, task_weight
from steadydetr.learning.matching import paired_iou
from steadydetr.objectives.prediction_distillation import naive_terms, teacher_target
from steadydetr.structures import Stages, Targets
from tests.conftest import make_stages
from tests.online_cases import QUALITY, TARGET, match_of, one_image, tensor, whole
from tests.reference import online as slow
from tests.reference.boxes import iou_and_giou

TEACHER = one_image([[0.6, 0.2]], [(0.5, 0.5, 0.4, 0.36)])
OBJECT = Targets(whole(0), tensor(TARGET), (1,))


def distilled(student: Stages, listen: bool = True) -> tuple[float, float, float, float]:
    """c'[c_g], and the class, L1 and GIoU terms of Eq. 5 and 6 for one query with one target."""
    wanted, weight, iou = teacher_target(TEACHER, match_of((0, 0)), OBJECT)
    label = classification_loss(student.flat[0], wanted, wanted > 0, None)
    ours, theirs = student.boxes[0, 0], TEACHER.boxes[0, 0]
    l1, giou, _ = box_terms(ours, theirs)
    l1, giou = distillation_terms(paired_iou(ours, OBJECT.boxes), iou, weight, l1, giou, listen)
    return float(weight), float(label.sum()), float(l1.sum()), float(giou.sum())


def test_prediction_distillation_by_hand() -> None:
    """Eq. 5, 6."""
    weight, label, l1, giou = distilled(one_image([[0.5, 0.3]], [(0.5, 0.5, 0.4, 0.3)]))
    assert weight == pytest.approx(0.813242, abs=1e-6) == slow.task_weight(0.6, 0.9)
    assert label == pytest.approx(0.068012 + 0.005261, abs=1e-6)
    assert (l1 / weight, giou / weight) == pytest.approx((0.06, 0.166667), abs=1e-6)
    assert label + l1 + giou == pytest.approx(0.257608, abs=1e-6)
    assert label + 5 * l1 + 2 * giou == pytest.approx(0.588326, abs=1e-6)


def test_a_better_box_does_not_listen_by_hand() -> None:
    """Listen2stu: the student's IoU .95 is above the teacher's .9; without it the box is learned all the same."""
    better = one_image([[0.5, 0.3]], [(0.5, 0.5, 0.4, 0.38)])
    _, label, l1, giou = distilled(better)
    assert label + l1 + giou == pytest.approx(0.073273, abs=1e-6)
    assert l1 == giou == 0
    weight, _, l1, giou = distilled(better, listen=False)
    assert l1 == pytest.approx(weight * 0.02, abs=1e-9) and giou > 0
    turned = one_image([[0.5, 0.3]], [(0.5, 0.5, 0.36, 0.4)])
    _, _, l1, giou = distilled(turned)
    assert l1 == giou == 0  # as good is not better
    assert distilled(turned, listen=False)[2] == pytest.approx(weight * 0.08, abs=1e-9)


def test_naive_distillation_by_hand() -> None:
    """Table 5's second row, and that a student who is his teacher has nothing to learn from it."""
    student = one_image([[0.5, 0.3]], [(0.5, 0.5, 0.4, 0.3)])
    label, l1, giou = (float(value) for value in naive_terms(student, TEACHER, 1, QUALITY))
    assert label == pytest.approx(0.012193, abs=1e-6)
    assert l1 + giou == pytest.approx(0.226667, abs=1e-6)
    same = Stages(TEACHER.logits.clone().requires_grad_(), TEACHER.boxes.clone().requires_grad_())
    terms = torch.stack(naive_terms(same, TEACHER, 1, QUALITY))
    for gradient in torch.autograd.grad(terms.sum(), (same.logits, same.boxes)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    assert terms.detach().abs().max() < 1e-12


def test_task_weight_of_an_equal_student_by_hand() -> None:
    """With the TOOD weight the matched class entry still learns: p .6, IoU .9."""
    x = TEACHER.logits.clone().requires_grad_()
    wanted, *_ = teacher_target(TEACHER, match_of((0, 0)), OBJECT)
    loss = classification_loss(x.flatten(0, 1), wanted, wanted > 0, None)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.flatten().tolist() == pytest.approx((0.026672, 0), abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx((-0.069733, 0), abs=1e-6)


@pytest.mark.parametrize("listen", [True, False])
def test_distillation_terms_equal_their_twin(listen: bool) -> None:
    student, teacher, target = make_stages(3, 1, 50, seed=1), make_stages(3, 1, 50, seed=2), make_stages(3, 1, 50, seed=3)
    ours, theirs, truth = (s.boxes.reshape(-1, 4) for s in (student, teacher, target))
    score = torch.rand(150, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    iou = paired_iou(theirs, truth)
    weight = task_weight(score, iou)
    l1, giou, _ = box_terms(ours, theirs)
    found = distillation_terms(paired_iou(ours, truth), iou, weight, l1, giou, listen)
    for i, (a, b, t) in enumerate(zip(ours.tolist(), theirs.tolist(), truth.tolist(), strict=True)):
        expected = slow.task_weight(float(score[i]), iou_and_giou(b, t)[0])
        assert float(weight[i]) == pytest.approx(expected, rel=1e-12)
        assert [float(part[i]) for part in found] == pytest.approx(slow.box_distillation(a, b, t, expected, listen), rel=1e-9, abs=1e-12)
