"""Each equation against its slow twin and against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from steadydetr.boxes import inverse_sigmoid, iou_giou, to_cxcywh, to_xyxy
from steadydetr.criterion import Criterion
from steadydetr.equations.detection import classification_loss, focal_cost
from steadydetr.matching import pairwise_terms, solve
from steadydetr.structures import Assignment, Losses, Stages, Targets
from tests.conftest import make_batch
from tests.reference import detection as slow


def logit(p: float) -> torch.Tensor:
    return torch.tensor(p, dtype=torch.float64).logit()


@pytest.mark.parametrize(("p", "t", "expected"), [(0.5, 0.8, 0.062383), (0.3, 0.0, 0.032101), (0.6, 0.6, 0.0)])
def test_quality_focal_loss_by_hand(p: float, t: float, expected: float) -> None:
    value = classification_loss(logit(p), torch.tensor(t, dtype=torch.float64), torch.tensor(t > 0), alpha=None)
    assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("p", "expected"), [(0.3, -0.696968), (0.8, -0.022281)])
def test_focal_gradient_by_hand(p: float, expected: float) -> None:
    """The focal loss pushes both of Stable-DINO's Table 1 queries up."""
    x = logit(p).requires_grad_()
    classification_loss(x, torch.tensor(1.0, dtype=torch.float64), torch.tensor(True), alpha=None).backward()
    assert float(x.grad) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.25, None])
@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_classification_loss_equals_its_twin(alpha: float | None, gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64) * 3
    target = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    positive = torch.rand(4, 3, generator=generator) < 0.4
    ours = classification_loss(logits, target, positive, alpha, gamma)
    for i in range(4):
        for j in range(3):
            expected = slow.classification(float(logits[i, j]), float(target[i, j]), bool(positive[i, j]), alpha, gamma)
            assert float(ours[i, j]) == pytest.approx(expected, rel=1e-9)


def test_overlaps_by_hand() -> None:
    # a box of half the side inside another: IoU 0.25, hull = the larger box, so GIoU 0.25
    outer, inner = torch.tensor([0.5, 0.5, 0.4, 0.4]), torch.tensor([0.5, 0.5, 0.2, 0.2])
    iou, giou = iou_giou(to_xyxy(outer), to_xyxy(inner))
    assert (float(iou), float(giou)) == (pytest.approx(0.25), pytest.approx(0.25))
    # two unit squares with a gap of one between them: IoU 0, hull 3, union 2, so GIoU -1/3
    iou, giou = iou_giou(torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1]))
    assert (float(iou), float(giou)) == (0.0, pytest.approx(-1 / 3))


def test_overlaps_equal_their_twin() -> None:
    boxes = torch.rand(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5 + 0.1
    iou, giou = iou_giou(to_xyxy(boxes)[:, None], to_xyxy(boxes)[None])
    for i in range(20):
        for j in range(20):
            expected = slow.iou_and_giou(boxes[i].tolist(), boxes[j].tolist())
            assert (float(iou[i, j]), float(giou[i, j])) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_box_formats_invert_each_other() -> None:
    boxes = torch.rand(7, 4, dtype=torch.float64)
    torch.testing.assert_close(to_cxcywh(to_xyxy(boxes)), boxes)
    torch.testing.assert_close(inverse_sigmoid(boxes.clamp(0.01, 0.99)).sigmoid(), boxes.clamp(0.01, 0.99))
    assert torch.isfinite(inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))).all()


@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0), (1,), (3, 3)])
def test_costs_assignments_and_losses_equal_their_twins(counts: tuple[int, ...]) -> None:
    """Two stages, empty images, classes that repeat."""
    generator = torch.Generator().manual_seed(3)
    stages_count, queries, classes = 2, 4, 2
    shape = (stages_count, len(counts), queries)
    logits = torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    boxes = torch.rand(*shape, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    batch = make_batch(counts)
    targets = Targets(batch.targets.labels % classes, batch.targets.boxes.double(), counts)
    stages, criterion = Stages(logits, boxes), Criterion()
    terms = pairwise_terms(stages, targets)
    solved = solve([criterion.problem(stages, targets, "main")])[0]
    losses = Losses()
    criterion.add_losses(losses, "main", stages, Assignment((solved.match,), solved.match), targets, normaliser=3.0)
    cost = criterion.cost(terms)
    row = 0
    expected = torch.zeros(3, stages_count, dtype=torch.float64)
    for s in range(stages_count):
        for b, part in enumerate(targets.split()):
            table = [
                [slow.matching_cost(float(logits[s, b, q, label]), boxes[s, b, q].tolist(), box) for q in range(queries)]
                for label, box in zip(part.labels.tolist(), part.boxes.tolist(), strict=True)
            ]
            for line in table:
                torch.testing.assert_close(cost[row], torch.tensor(line, dtype=torch.float64), rtol=1e-6, atol=1e-8)
                row += 1
            mine = solved.match.image == s * len(counts) + b
            chosen = solved.match.query[mine].tolist()
            pairs = {}
            if table:
                _, best = slow.best_assignment(table)
                assert tuple(chosen) == best
                pairs = {q: t for t, q in enumerate(best)}
            values = slow.detection_loss(logits[s, b], boxes[s, b], part.labels.tolist(), part.boxes.tolist(), pairs, 3.0)
            expected[:, s] += torch.tensor(values, dtype=torch.float64)
    for name, values in zip(("class", "l1", "giou"), expected, strict=True):
        torch.testing.assert_close(losses[f"main/{name}"], values)


def test_more_objects_than_queries() -> None:
    batch = make_batch((6,))
    stages = Stages(torch.randn(1, 1, 4, 5), torch.rand(1, 1, 4, 4) * 0.3 + 0.3)
    match = solve([Criterion().problem(stages, batch.targets, "main")])[0].match
    assert len(match.query) == 4
    assert len(set(match.query.tolist())) == 4


def test_cost_that_is_not_finite_is_named() -> None:
    batch = make_batch((2,))
    stages = Stages(torch.full((1, 1, 4, 5), torch.nan), torch.rand(1, 1, 4, 4))
    with pytest.raises(FloatingPointError, match="'main' is not finite"):
        solve([Criterion().problem(stages, batch.targets, "main")])


def test_focal_cost_is_finite_at_the_ends() -> None:
    assert torch.isfinite(focal_cost(torch.tensor([-200.0, 200.0]), torch.zeros(2))).all()
