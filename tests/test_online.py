"""Matching distillation (OD-DETR Eq. 2 to 4): numbers worked by hand, and slow twins on random matches."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.equations.detection import classification_loss
from steadydetr.equations.online import join_matches
from steadydetr.learning.class_terms import HardTarget, PositionTarget
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import Problem, solve
from steadydetr.objectives import MatchingDistillation
from steadydetr.structures import Assignment, Match, MatchedQueries, MatchResult, Stages, Targets
from tests.conftest import CLASSES, make_stages
from tests.online_cases import COUNTS, QUALITY, TARGET, match_of, one_image, parts, targets_of, tensor, whole
from tests.reference import detection as slow_detection
from tests.reference import online as slow
from tests.test_online_predictions import OBJECT

TABLE_3 = [MatchingDistillation(classes=c, boxes=False) for c in ("none", "conditional", "union")]
TABLE_4 = [
    MatchingDistillation(boxes=boxes, class_weight=c, box_weight=w)
    for boxes, c, w in ((False, 1, 1), (True, 1, 1), (True, 1, 0.51), (True, 0.51, 0.51))
]


def table(query: Tensor, targets: Targets, stages: int = 1) -> MatchedQueries:
    """The query of every target, stage by stage."""
    return MatchedQueries(query.view(stages, len(targets.labels)), targets.image, len(targets.counts))


def some_targets(counts: tuple[int, ...]) -> Targets:
    return Targets(torch.zeros(sum(counts), dtype=torch.int64), torch.zeros(sum(counts), 4), counts)


def own_queries(matched: MatchResult, targets: Targets, stages: int = 1) -> Tensor:
    return MatchedQueries.of(matched.match, targets, stages).query.flatten()


@pytest.mark.parametrize(("p", "t", "expected"), [(0.5, 0.8, 0.062383), (0.3, 0.0, 0.032101), (0.6, 0.6, 0.0)])
def test_quality_focal_loss_by_hand(p: float, t: float, expected: float) -> None:
    """Eq. 2."""
    value = classification_loss(tensor(p).logit(), tensor(t), torch.tensor([t > 0]), alpha=None)
    assert float(value) == pytest.approx(expected, abs=1e-6)
    assert slow.quality_focal(p, t) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("own", "taught", "labels", "expected"),
    [((0,), 1, (0, 1), 0.141617), ((0,), 1, (0, 0), 0.089717), ((), 1, (0, 1), 0.307972), ((), -1, (0, 1), 0.256073)],
    ids=["two classes", "one class", "teacher only", "none"],
)
def test_union_of_class_targets_by_hand(own: tuple[int, ...], taught: int, labels: tuple[int, int], expected: float) -> None:
    """Eq. 3 and Fig. 4: IoU .6 with its own target, .8 with the teacher's."""
    targets = Targets(whole(*labels), tensor((0.5, 0.5, 0.24, 0.4), (0.5, 0.5, 0.32, 0.4)), (2,))
    stages = one_image([[0.5, 0.4, 0.1]], [TARGET])
    cost = QUALITY.problem(stages, targets, "m").cost
    assignment = MatchingDistillation().assign(
        MatchResult(match_of(*((0, t) for t in own)), cost), table(whole(-1, 0 if taught == 1 else -1), targets), stages, targets
    )
    assert parts(QUALITY, stages, assignment, targets)["class"] == pytest.approx(expected, abs=1e-6)


def test_weighted_boxes_by_hand() -> None:
    """Eq. 4: the student's own query a and the teacher's b, which costs more."""
    targets = Targets(whole(0), tensor(TARGET), (1,))
    stages = one_image([[0.6], [0.3]], [(0.5, 0.5, 0.4, 0.3), (0.6, 0.5, 0.4, 0.4)])
    (matched,) = solve([QUALITY.problem(stages, targets, "m")])
    assert matched.cost[0].tolist() == pytest.approx((-1.453931, -0.453178), abs=1e-6)
    assert matched.match.query.tolist() == [0]
    found = parts(QUALITY, stages, MatchingDistillation().assign(matched, table(whole(1), targets), stages, targets), targets)
    assert found["l1"] + found["giou"] == pytest.approx(0.605, abs=1e-6)
    assert 5 * found["l1"] + 2 * found["giou"] == pytest.approx(1.663, abs=1e-6)
    plain = parts(QUALITY, stages, MatchingDistillation(box_weight=1.0).assign(matched, table(whole(1), targets), stages, targets), targets)
    assert plain["l1"] + plain["giou"] == pytest.approx(0.85, abs=1e-6)


def close_stages(targets: Targets, stages: int, queries: int) -> Stages:
    """Random predictions; half of the boxes lie near a target of their image, so that IoUs above one half occur."""
    made = make_stages(stages, len(targets.counts), queries)
    boxes = made.boxes.clone()
    for b, part in enumerate(targets.split()):
        if len(part.boxes):
            near = part.boxes[torch.arange(queries // 2) % len(part.boxes)]
            boxes[:, b, : queries // 2] = near + 0.1 * (boxes[:, b, : queries // 2] - 0.4)
    return replace(made, boxes=boxes)


def random_queries(counts: tuple[int, ...], stages: int, queries: int, generator: random.Random, missing: float = 0.2) -> Tensor:
    """A random query for every target at every stage, some without."""
    found = [q if generator.random() > missing else -1 for _ in range(stages) for n in counts for q in generator.sample(range(queries), n)]
    return whole(*found)


def as_dicts(stages: Stages, targets: Targets, assignment: Assignment) -> list[tuple[slow.Classes, slow.Boxes]]:
    """What every query of every folded image learns, by the numbers of its image's own targets."""
    folded = targets.repeat_batch(len(stages.logits))
    first = [sum(folded.counts[:i]) for i in range(len(folded.counts))]
    learned: list[tuple[slow.Classes, slow.Boxes]] = [({}, {}) for _ in folded.counts]

    def rows(match: Match) -> list[tuple[int, int, int, float]]:
        weight = torch.ones(len(match.query)) if match.weight is None else match.weight
        return list(zip(match.image.tolist(), match.query.tolist(), match.target.tolist(), weight.tolist(), strict=True))

    for match in assignment.classes:  # the first decides
        for image, query, target, weight in rows(match):
            learned[image][0].setdefault((query, int(folded.labels[target])), (target - first[image], pytest.approx(weight)))
    for image, query, target, weight in rows(assignment.boxes):
        assert query not in learned[image][1]  # one target's box a query
        learned[image][1][query] = (target - first[image], pytest.approx(weight))
    return learned


def expected_dicts(
    stages: Stages, targets: Targets, own: Tensor, taught: Tensor, options: MatchingDistillation
) -> list[tuple[slow.Classes, slow.Boxes]]:
    learned, row = [], 0
    for s, b in itertools.product(range(len(stages.logits)), range(len(targets.counts))):
        part = targets.split()[b]
        view, pairs = slow.View(stages.logits[s, b], stages.boxes[s, b]), list(zip(part.labels.tolist(), part.boxes.tolist(), strict=True))
        rows = slice(row, row := row + len(pairs))
        learned.append(
            slow.join(own[rows].tolist(), taught[rows].tolist(), part.labels.tolist(), view.costs(pairs), view.ious(pairs), options)
        )
    return learned


@pytest.mark.parametrize("classes", [1, CLASSES])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("options", [*TABLE_3, *TABLE_4, MatchingDistillation(classes="conditional", class_weight=0.51)])
def test_joined_assignment_equals_its_twin(options: MatchingDistillation, counts: tuple[int, ...], classes: int) -> None:
    """Random teachers, every row of Tables 3 and 4; one class only, too, where the student's own target decides."""
    targets = targets_of(counts, classes)
    stages = close_stages(targets, 2, 7)
    (matched,) = solve([QUALITY.problem(stages, targets, "m")])
    own = own_queries(matched, targets, 2)
    for seed in range(8):
        taught = random_queries(counts, 2, 7, random.Random(seed))
        assignment = options.assign(matched, table(taught, targets, 2), stages, targets)
        assert as_dicts(stages, targets, assignment) == expected_dicts(stages, targets, own, taught, options)


@pytest.mark.parametrize("own_is_optimal", [True, False])
def test_join_equals_its_twin_whatever_the_match(own_is_optimal: bool) -> None:
    """A match that is not the optimal one, as a case of its own: either of two queries can then be the costlier."""
    targets, generator = targets_of((4, 3), 2), random.Random(1)
    stages = close_stages(targets, 1, 6)
    (matched,) = solve([QUALITY.problem(stages, targets, "m")])
    swapped = 0
    for options in (*TABLE_3, *TABLE_4):
        for _ in range(5):
            own, taught = (random_queries((4, 3), 1, 6, generator) for _ in range(2))
            if own_is_optimal:
                own = own_queries(matched, targets)
            at = (own >= 0).nonzero()[:, 0]
            given = MatchResult(Match(targets.image[at], own[at], at), matched.cost)
            assert as_dicts(stages, targets, options.assign(given, table(taught, targets), stages, targets)) == expected_dicts(
                stages, targets, own, taught, options
            )
            joined = join_matches(given.match, taught, targets.image, 2, matched.cost)
            swapped += int((joined.boxes & (own >= 0) & ~joined.costlier).sum())
    assert (swapped == 0) == own_is_optimal


@pytest.mark.parametrize("seed", range(20))
def test_the_query_that_only_the_teacher_chose_is_never_the_cheaper(seed: int) -> None:
    """The lemma behind w_d: were it cheaper, the student's own optimal match would have taken it, for it holds nothing. Ties: costlier."""
    generator = random.Random(seed)
    counts = tuple(generator.choices(range(6), k=3))
    cost = torch.tensor([[float(generator.randint(0, 4)) for _ in range(7)] for _ in range(sum(counts))]).reshape(-1, 7)
    (matched,) = solve([Problem(cost, counts)])
    image = torch.arange(3).repeat_interleave(whole(*counts))
    for _ in range(10):
        taught = random_queries(counts, 1, 7, generator)
        joined = join_matches(matched.match, taught, image, 3, cost)
        assert joined.costlier[joined.boxes].all()


def joined(own: list[int], taught: list[int], cost: list[list[float]]) -> list[list[bool]]:
    """Of one image: classes, boxes, costlier."""
    image = torch.zeros(len(own), dtype=torch.int64)
    match = match_of(*((query, target) for target, query in enumerate(own) if query >= 0))
    found = join_matches(match, whole(*taught), image, 1, torch.tensor(cost).reshape(len(own), 3))
    return [found.classes.tolist(), found.boxes.tolist(), found.costlier.tolist()]


def test_join_by_hand() -> None:
    cost = [[1.0, 2.0, 3.0], [2.0, 1.0, 2.0]]
    assert joined([0, 1], [0, 1], cost) == [[False, False]] * 3  # agreed
    assert joined([0, 1], [2, 1], cost) == [[True, False]] * 3  # query 2 is idle: it learns target 0's box, the costlier of two
    assert joined([0, 1], [1, 0], cost) == [[True, True], [False, False], [True, True]]  # exchanged: classes, but no boxes
    assert joined([0, 1], [-1, -1], cost) == [[False, False]] * 3  # the teacher says nothing
    assert joined([-1, 1], [0, 1], cost) == [[True, False], [True, False], [False, False]]  # no query of its own: nobody is costlier
    assert joined([0, 1], [2, 1], [[1.0, 1.0, 1.0]] * 2) == [[True, False]] * 3  # at equal cost the taught one
    assert joined([0, -1], [1, 0], cost) == [[True, True], [True, False], [True, False]]
    assert joined([], [], []) == [[], [], []]


def options_of_class_loss(options: MatchingDistillation, criterion: Criterion, close: bool) -> dict[str, float]:
    """A target that the student gives query 0 and the teacher query 1, whose box overlaps it by more, or less, than half."""
    stages = one_image([[0.6, 0.2], [0.3, 0.2]], [(0.5, 0.5, 0.4, 0.38), (0.5, 0.5, 0.4, 0.3) if close else (0.7, 0.5, 0.4, 0.4)])
    (matched,) = solve([criterion.problem(stages, OBJECT, "m")])
    assert matched.match.query.tolist() == [0]
    return parts(criterion, stages, options.assign(matched, table(whole(1), OBJECT), stages, OBJECT), OBJECT)


@pytest.mark.parametrize("close", [True, False])
def test_rows_of_table_3_by_hand(close: bool) -> None:
    """QFL without MD; conditional MD with the focal loss; QFL with MD; QFL with conditional MD. Boxes are the student's own in all."""
    scores = {(0, 0): 0.6, (0, 1): 0.2, (1, 0): 0.3, (1, 1): 0.2}
    iou = {0: 0.95, 1: 0.75 if close else 1 / 3}

    def expected(pairs: list[int], target: float | None, alpha: float | None) -> float:
        return sum(
            slow_detection.classification(
                float(tensor(p).logit()), 0.0 if c or q not in pairs else target or iou[q], c == 0 and q in pairs, alpha, 2.0
            )
            for (q, c), p in scores.items()
        )

    conditional = [0, 1] if close else [0]
    without, accepted, union = (options_of_class_loss(options, QUALITY, close) for options in TABLE_3)
    focal = options_of_class_loss(TABLE_3[1], Criterion(class_target=HardTarget()), close)
    assert without["class"] == pytest.approx(expected([0], None, None), abs=1e-9)
    assert focal["class"] == pytest.approx(expected(conditional, 1.0, 0.25), abs=1e-9)
    assert union["class"] == pytest.approx(expected([0, 1], None, None), abs=1e-9)
    assert accepted["class"] == pytest.approx(expected(conditional, None, None), abs=1e-9)
    assert without["l1"] == accepted["l1"] == union["l1"] == focal["l1"] == pytest.approx(0.02)


def test_rows_of_table_4_by_hand() -> None:
    """Boxes off, plain, the costlier of two by .51, its class target by .51 too."""
    off, plain, weighted, both = (options_of_class_loss(options, QUALITY, close=True) for options in TABLE_4)
    assert [part["l1"] for part in (off, plain, weighted, both)] == pytest.approx([0.02, 0.12, 0.02 + 0.051, 0.02 + 0.051])
    assert [part["giou"] for part in (off, plain, weighted, both)] == pytest.approx([0.05, 0.3, 0.05 + 0.1275, 0.05 + 0.1275])
    assert off["class"] == plain["class"] == weighted["class"]
    second = slow.quality_focal(0.3, 0.75)
    assert weighted["class"] - both["class"] == pytest.approx(0.49 * second)


@pytest.mark.parametrize(("same", "expected"), [(True, 0.6), (False, 0.8)])
def test_of_two_targets_of_one_class_the_students_own_decides(same: bool, expected: float) -> None:
    """The score's target is its IoU with its own target, whichever is larger, and the weight is its own's."""
    targets = Targets(whole(0, 0 if same else 1), tensor((0.5, 0.5, 0.24, 0.4), (0.5, 0.5, 0.32, 0.4)), (2,))
    stages = one_image([[expected if same else 0.6, 0.0001 if same else 0.8]], [TARGET])
    given = MatchResult(match_of((0, 0)), QUALITY.problem(stages, targets, "m").cost)
    found = parts(
        QUALITY, stages, MatchingDistillation(class_weight=0.51).assign(given, table(whole(-1, 0), targets), stages, targets), targets
    )
    assert found["class"] == pytest.approx(0, abs=1e-7)
    assert found["l1"] == pytest.approx(0.16)  # one box a query: its own target's


@pytest.mark.parametrize(("rescale", "expected"), [("none", (0.9025, 0.0204)), ("max", (0.95, 0.0215)), ("one", (1.0, 0.0226))])
def test_targets_of_both_matches_are_rescaled_together_by_hand(rescale: Any, expected: tuple[float, float]) -> None:
    """Stable-DINO's target with matching distillation: IoU .95 with the own pair, 1/7 with the taught one, squared."""
    targets = Targets(whole(0), tensor(TARGET), (1,))
    stages = one_image([[0.6], [0.3]], [(0.5, 0.5, 0.4, 0.38), (0.8, 0.5, 0.4, 0.4)])
    criterion = Criterion(class_target=PositionTarget(rescale=rescale))
    found = parts(criterion, stages, Assignment((match_of((0, 0)), match_of((1, 0))), match_of((0, 0))), targets)
    wanted = classification_loss(stages.flat[0][0], tensor(*expected)[:, None], torch.ones(2, 1, dtype=torch.bool))
    assert found["class"] == pytest.approx(float(wanted.sum()), abs=1e-4)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="box_weight = -3"):
        MatchingDistillation(box_weight=-3)
