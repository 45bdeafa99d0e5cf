"""Each equation against its slow twin and against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from steadydetr.equations.detection import box_terms, classification_loss, focal_cost
from steadydetr.learning.class_terms import HardTarget, MatchedPairs, QualityTarget
from tests.reference import boxes as slow_boxes
from tests.reference import detection as slow
from tests.reference import matching as slow_matching


def logit(p: float) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).logit()


@pytest.mark.parametrize(("p", "t", "expected"), [(0.5, 0.8, 0.062383), (0.3, 0.0, 0.032101), (0.6, 0.6, 0.0)])
def test_quality_focal_loss_by_hand(p: float, t: float, expected: float) -> None:
    value = classification_loss(logit(p), torch.tensor(t, dtype=torch.float64), torch.tensor(t > 0), alpha=None)
    assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("p", "expected"), [(0.3, -0.696968), (0.8, -0.022281)])
def test_focal_gradient_by_hand(p: float, expected: float) -> None:
    """The focal loss pushes both queries of Stable-DINO's Table 1 up, whatever their boxes are worth."""
    x = logit(p).requires_grad_()
    classification_loss(x, torch.tensor(1.0, dtype=torch.float64), torch.tensor(True), alpha=None).backward()
    assert x.grad is not None and float(x.grad) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.25, None])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_classification_loss_equals_its_twin(alpha: float | None, gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64) * 3
    target = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    positive = torch.rand(4, 3, generator=generator) < 0.4
    ours = classification_loss(logits, target, positive, alpha, gamma)
    expected = [
        slow.classification(x, t, p, alpha, gamma)
        for x, t, p in zip(logits.flatten().tolist(), target.flatten().tolist(), positive.flatten().tolist(), strict=True)
    ]
    torch.testing.assert_close(ours.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_gradient_of_the_classification_loss() -> None:
    """Also of the p inside |t - p|, which is not detached."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    target, positive = torch.tensor([0.0, 0.3, 0.7, 1.0, 0.0, 0.9], dtype=torch.float64), torch.tensor([False, True] * 3)
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, target, positive), logits)


@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
def test_classification_loss_is_finite_at_the_ends(target: float) -> None:
    logits = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = classification_loss(logits, torch.full((2,), target), torch.tensor([True, False]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and logits.grad is not None and torch.isfinite(logits.grad).all()


def test_focal_cost_equals_its_twin() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    expected = [[slow_matching.focal_cost(x) for x in row] for row in logits.tolist()]
    torch.testing.assert_close(focal_cost(logits.sigmoid()), torch.tensor(expected, dtype=torch.float64))
    assert torch.isfinite(focal_cost(torch.tensor([0.0, 1.0]))).all()


def test_box_terms_equal_their_twins() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.rand(n, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.1 for n in (4, 3))
    l1, giou_loss, iou = box_terms(a[:, None], b)
    for i, x in enumerate(a.tolist()):
        for j, y in enumerate(b.tolist()):
            expected_iou, expected_giou = slow_boxes.iou_and_giou(x, y)
            assert float(l1[i, j]) == pytest.approx(slow_boxes.l1(x, y))
            assert float(giou_loss[i, j]) == pytest.approx(1 - expected_giou)
            assert float(iou[i, j]) == pytest.approx(expected_iou)


def test_class_targets() -> None:
    pairs = MatchedPairs(torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.3]), torch.tensor([0, 0]), 1, lambda: torch.tensor([0.9]))
    assert HardTarget()(pairs).tolist() == [1.0, 1.0]
    assert torch.equal(QualityTarget()(pairs), pairs.iou)
