"""The one detection loss against its slow twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steadydetr.learning.class_terms import QualityTarget
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import solve
from steadydetr.structures import Assignment, Losses, Match, Stages, Targets
from tests.conftest import make_batch, make_stages
from tests.reference import boxes as slow_boxes
from tests.reference import detection as slow

COUNTS = [(2, 0, 3), (0, 0), (1,), (3, 3)]


def targets_of(counts: tuple[int, ...]) -> Targets:
    targets = make_batch(counts).targets
    return replace(targets, labels=targets.labels % 2, boxes=targets.boxes.double())  # two classes: they repeat


def matched(criterion: Criterion, stages: Stages, targets: Targets) -> Assignment:
    match = solve([criterion.problem(stages, targets, "main")])[0].match
    return Assignment.of(match)


def losses_of(criterion: Criterion, stages: Stages, assignment: Assignment, targets: Targets, normaliser: float = 3.0) -> Losses:
    losses = Losses()
    criterion.add_losses(losses, "main", stages, assignment, targets, normaliser)
    return losses


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("quality", [False, True])
def test_losses_equal_their_twins(counts: tuple[int, ...], quality: bool) -> None:
    """The focal loss, and the quality focal loss, whose target is the IoU; two stages, each with a matching of its own."""
    criterion = Criterion(class_target=QualityTarget(), alpha=None) if quality else Criterion()
    stages, targets = make_stages(2, len(counts), 4), targets_of(counts)
    assignment = matched(criterion, stages, targets)
    losses = losses_of(criterion, stages, assignment, targets)
    first = torch.tensor([0, *counts]).cumsum(0).tolist()
    for s, (logits, boxes) in enumerate(zip(stages.logits, stages.boxes, strict=True)):
        expected = [0.0, 0.0, 0.0]
        for image, part in enumerate(targets.split()):
            mine = assignment.boxes.image == s * len(counts) + image
            things = (assignment.boxes.target[mine] - s * sum(counts) - first[image]).tolist()
            pairs = dict(zip(assignment.boxes.query[mine].tolist(), things, strict=True))
            predicted, wanted = boxes[image].tolist(), part.boxes.tolist()
            quality_of = {q: slow_boxes.iou_and_giou(predicted[q], wanted[t])[0] if quality else 1.0 for q, t in pairs.items()}
            positives = {(q, int(part.labels[t])): quality_of[q] for q, t in pairs.items()}
            label = slow.class_loss(logits[image].tolist(), positives, None if quality else 0.25)
            parts = (label, *slow.box_losses(predicted, wanted, pairs))
            expected = [total + value / 3 for total, value in zip(expected, parts, strict=True)]
        for name, value in zip(("class", "l1", "giou"), expected, strict=True):
            assert float(losses[f"main/{name}"][s]) == pytest.approx(value, rel=1e-9)


def test_weights_stand_beside_the_values() -> None:
    stages, targets = make_stages(1, 1, 4), targets_of((2,))
    assignment = matched(Criterion(), stages, targets)
    losses = losses_of(Criterion(loss_weights=Weights(2.0, 3.0, 4.0)), stages, assignment, targets)
    assert {name: weight for name, _, weight in losses} == {"main/class": 2.0, "main/l1": 3.0, "main/giou": 4.0}
    other = Losses()
    Criterion().add_losses(other, "main", stages, assignment, targets, 6.0, Weights(7.0, 8.0, 9.0))
    assert [weight for _, _, weight in other] == [7.0, 8.0, 9.0]
    torch.testing.assert_close(other["main/l1"] * 2, losses["main/l1"])  # twice the normaliser


def test_two_class_matches_are_a_union() -> None:
    """Entries of either match are positive; where both name one, it counts once, with the larger target."""
    stages, targets = make_stages(1, 1, 4), Targets(torch.tensor([0, 1]), torch.rand(2, 4, dtype=torch.float64) * 0.2 + 0.3, (2,))
    index = torch.tensor
    own = Match(index([0, 0]), index([0, 1]), index([0, 1]))
    teacher = Match(index([0, 0]), index([0, 2]), index([0, 0]))
    criterion = Criterion(class_target=QualityTarget(), alpha=None)
    losses = losses_of(criterion, stages, Assignment((own, teacher), own), targets, 1.0)
    boxes, wanted = stages.boxes[0, 0].tolist(), targets.boxes.tolist()
    positives = {(q, c): slow_boxes.iou_and_giou(boxes[q], wanted[t])[0] for q, c, t in ((0, 0, 0), (1, 1, 1), (2, 0, 0))}
    assert float(losses["main/class"]) == pytest.approx(slow.class_loss(stages.logits[0, 0].tolist(), positives, None))
    alone = losses_of(criterion, stages, Assignment.of(own), targets, 1.0)
    assert torch.equal(losses["main/l1"], alone["main/l1"])  # boxes follow their own match


def test_weighted_pairs() -> None:
    stages, targets = make_stages(2, 2, 4), targets_of((2, 1))
    assignment = matched(Criterion(), stages, targets)
    weight = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    weighted = losses_of(Criterion(), stages, replace(assignment, boxes=replace(assignment.boxes, weight=weight)), targets, 1.0)
    m = assignment.boxes
    folded = targets.repeat_batch(2).boxes[m.target].tolist()
    predicted = stages.flat[1][m.image, m.query].tolist()
    each = [slow.box_losses([a], [b], {0: 0}) for a, b in zip(predicted, folded, strict=True)]
    expected = [sum(w * l1 for w, (l1, _) in zip(weight[s], each[s], strict=True)) for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(weighted["main/l1"], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("garbage", [1e6, -1e30, float("nan"), float("inf")])
def test_garbage_in_invalid_rows(garbage: float) -> None:
    """Changes no loss and no gradient, and gets none."""
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 3 + [False] * 3, [False] * 6])
    targets, criterion = targets_of((2, 3, 1)), Criterion(class_target=QualityTarget())
    outcomes = []
    for filling in (0.5, garbage):
        clean, shown = make_stages(2, 3, 6), valid[None, :, :, None]
        logits, boxes = (torch.where(shown, t, filling).requires_grad_() for t in (clean.logits, clean.boxes))
        stages = Stages(logits, boxes, valid=valid)
        losses = losses_of(criterion, stages, matched(criterion, stages, targets), targets)
        outcomes.append((losses, *torch.autograd.grad(losses.total, (logits, boxes))))
    (clean_losses, *clean_gradients), (losses, *gradients) = outcomes
    for name, values, _ in losses:
        assert torch.equal(values, clean_losses[name])
    for ours, expected in zip(gradients, clean_gradients, strict=True):
        assert torch.equal(ours, expected)
        assert not ours[:, ~valid].any()


def test_invalid_rows_are_as_if_they_were_not_there() -> None:
    targets, criterion = targets_of((2, 1)), Criterion()
    short = make_stages(2, 2, 4)
    padded = Stages(
        torch.cat((short.logits, torch.full((2, 2, 3, 5), 9.0, dtype=torch.float64)), 2),
        torch.cat((short.boxes, torch.full((2, 2, 3, 4), 9.0, dtype=torch.float64)), 2),
        valid=torch.arange(7).expand(2, 7) < 4,
    )
    a, b = (losses_of(criterion, stages, matched(criterion, stages, targets), targets) for stages in (short, padded))
    for name, values, _ in a:
        torch.testing.assert_close(b[name], values, rtol=1e-12, atol=0)


def test_batch_without_objects_teaches_background() -> None:
    stages = make_stages(2, 2, 4)
    stages = replace(stages, logits=stages.logits.requires_grad_(), boxes=stages.boxes.requires_grad_())
    targets = targets_of((0, 0))
    losses = losses_of(Criterion(), stages, matched(Criterion(), stages, targets), targets, 1.0)
    losses.total.backward()
    assert stages.logits.grad is not None and (stages.logits.grad > 0).all()
    assert stages.boxes.grad is not None and not stages.boxes.grad.any()  # there, and zero: the parameter stays in the graph
    assert not losses["main/l1"].any() and not losses["main/giou"].any()


def test_losses_are_never_in_bfloat16() -> None:
    stages, targets = make_stages(1, 1, 5), make_batch((3,)).targets
    low = Stages(stages.logits.bfloat16().requires_grad_(), stages.boxes.bfloat16().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(Criterion(), low, matched(Criterion(), low, targets), targets)
    assert all(values.dtype == torch.float32 for _, values, _ in losses)
