"""The matcher: prices against the slow twin, assignments against all permutations, everything solved together as alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import Problem, largest_iou, paired_iou, pairwise_terms, solve
from steadydetr.structures import Stages, Targets
from tests.conftest import make_batch, make_stages
from tests.reference import boxes as slow_boxes
from tests.reference import matching as slow

COUNTS = [(2, 0, 3), (0, 0), (1,), (3, 3)]


def targets_of(counts: tuple[int, ...]) -> Targets:
    targets = make_batch(counts).targets
    return replace(targets, boxes=targets.boxes.double())


def slow_cost(stages: Stages, targets: Targets) -> list[list[list[float]]]:
    """[target][query] of every stage and image, in folded order."""
    tables = []
    for logits, boxes in zip(stages.logits, stages.boxes, strict=True):
        for image, part in enumerate(targets.split()):
            tables.append(
                [
                    [
                        slow.matching_cost(float(x), box, wanted)
                        for x, box in zip(logits[image, :, label], boxes[image].tolist(), strict=True)
                    ]
                    for label, wanted in zip(part.labels.tolist(), part.boxes.tolist(), strict=True)
                ]
            )
    return tables


@pytest.mark.parametrize("counts", COUNTS)
def test_costs_and_assignments_equal_their_twins(counts: tuple[int, ...]) -> None:
    """Two stages, empty images, classes that repeat."""
    stages, targets, criterion = make_stages(2, len(counts), 4), targets_of(counts), Criterion()
    targets = replace(targets, labels=targets.labels % 2)
    problem = criterion.problem(stages, targets, "main")
    tables = slow_cost(stages, targets)
    assert problem.counts == tuple(len(table) for table in tables)
    rows = torch.tensor([row for table in tables for row in table], dtype=torch.float64).reshape(-1, 4)
    torch.testing.assert_close(problem.cost, rows, rtol=1e-6, atol=1e-8)
    solved = solve([problem])[0]
    assert torch.equal(solved.cost, problem.cost)
    expected = [query for table in tables for query in slow.best_assignment(table)]
    assert solved.match.query.tolist() == expected
    assert solved.match.target.tolist() == list(range(len(expected)))
    assert solved.match.image.tolist() == [image for image, table in enumerate(tables) for _ in table]
    assert solved.match.weight is None


@pytest.mark.parametrize("counts", COUNTS)
def test_all_stages_at_once_equal_one_after_the_other(counts: tuple[int, ...]) -> None:
    stages, targets, criterion = make_stages(3, len(counts), 6), targets_of(counts), Criterion()
    together = solve([criterion.problem(stages, targets, "main")])[0]
    alone = [solve([criterion.problem(stages[s : s + 1], targets, "main")])[0] for s in range(3)]
    torch.testing.assert_close(together.cost, torch.cat([one.cost for one in alone]), rtol=1e-12, atol=1e-12)
    for name, step in (("image", len(counts)), ("query", 0), ("target", sum(counts))):
        parts = [getattr(one.match, name) + s * step for s, one in enumerate(alone)]
        assert torch.equal(getattr(together.match, name), torch.cat(parts))


def test_problems_of_a_step_are_solved_with_one_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion, targets = Criterion(), targets_of((2, 0, 3))
    wide, narrow = make_stages(2, 3, 7, seed=1), make_stages(1, 3, 4, seed=2)
    problems = [
        criterion.problem(wide, targets, "main"),
        criterion.problem(wide, targets_of((0, 0, 0)), "nothing"),
        criterion.problem(narrow, targets, "proposals"),
    ]
    alone = [solve([problem])[0] for problem in problems]
    fetches: list[Tensor] = []
    fetch = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (fetches.append(tensor), fetch(tensor))[1])
    together = solve(problems)
    assert len(fetches) == 1
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.cost, b.cost)
        assert all(torch.equal(getattr(a.match, name), getattr(b.match, name)) for name in ("image", "query", "target"))
    assert solve([]) == []


def test_more_objects_than_queries() -> None:
    match = solve([Criterion().problem(make_stages(1, 1, 4), targets_of((6,)), "main")])[0].match
    assert sorted(match.query.tolist()) == [0, 1, 2, 3]
    assert len(set(match.target.tolist())) == 4


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_invalid_queries_are_never_chosen(garbage: float) -> None:
    """Not even where the valid ones do not suffice, nor where none is."""
    valid = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    clean, targets, criterion = replace(make_stages(2, 3, 4), valid=valid), targets_of((3, 2, 2)), Criterion()
    shown = valid[None, :, :, None]
    spoiled = replace(clean, logits=torch.where(shown, clean.logits, garbage), boxes=torch.where(shown, clean.boxes, garbage))
    expected, match = (solve([criterion.problem(stages, targets, "main")])[0].match for stages in (clean, spoiled))
    assert valid[match.image % 3, match.query].all()
    assert match.image.bincount(minlength=6).tolist() == [2, 0, 2] * 2
    assert torch.equal(match.query, expected.query) and torch.equal(match.target, expected.target)


def test_cost_that_is_not_finite_is_named() -> None:
    stages = make_stages(1, 1, 4)
    stages = replace(stages, logits=torch.full_like(stages.logits, torch.nan))
    with pytest.raises(FloatingPointError, match="'main' is not finite"):
        solve([Criterion().problem(stages, targets_of((2,)), "main")])


def test_prices_are_never_in_bfloat16() -> None:
    stages = make_stages(2, 1, 5)
    low = Stages(stages.logits.bfloat16(), stages.boxes.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cost = Criterion().problem(low, make_batch((3,)).targets, "main").cost
    assert cost.dtype == torch.float32 and not cost.requires_grad


def test_rows_of_a_problem_have_no_gradient() -> None:
    stages = make_stages(1, 1, 5)
    problem = Criterion().problem(replace(stages, logits=stages.logits.requires_grad_()), targets_of((3,)), "main")
    assert isinstance(problem, Problem) and not problem.cost.requires_grad


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("garbage", [None, float("nan")])
@pytest.mark.parametrize("eps", [0.0, 0.01])
def test_largest_iou_equals_its_twin(counts: tuple[int, ...], garbage: float | None, eps: float) -> None:
    stages, targets = make_stages(2, len(counts), 4), targets_of(counts)
    queries = 4
    if garbage is not None:
        valid = torch.arange(4).expand(len(counts), 4) < 3
        stages = replace(stages, boxes=torch.where(valid[None, :, :, None], stages.boxes, garbage), valid=valid)
        queries = 3
    expected = [
        max((slow_boxes.iou_and_giou(q, t, eps)[0] for q in boxes[image, :queries].tolist() for t in part.boxes.tolist()), default=0.0)
        for boxes in stages.boxes
        for image, part in enumerate(targets.split())
    ]
    torch.testing.assert_close(largest_iou(stages, targets, eps), torch.tensor(expected, dtype=torch.float64))


def test_paired_iou_of_boxes_without_area() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]])
    targets = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.1], [0.5, 0.5, 0.2, 0.1]])
    assert paired_iou(boxes, targets).tolist() == pytest.approx([0.0, 0.5, 0.0])


def test_terms_are_priced_within_an_image_only() -> None:
    stages, targets = make_stages(2, 3, 4), targets_of((2, 0, 3))
    terms = pairwise_terms(stages, targets)
    assert terms.l1.shape == terms.iou.shape == terms.giou.shape == terms.logits.shape == (2 * 5, 4)
    other = replace(stages, boxes=stages.boxes.clone())
    other.boxes[:, 1:] = 0.9  # images 1 and 2
    moved = pairwise_terms(other, targets)
    first = torch.tensor([0, 1, 5, 6])  # the rows of image 0
    assert torch.equal(moved.l1[first], terms.l1[first]) and torch.equal(moved.giou[first], terms.giou[first])
