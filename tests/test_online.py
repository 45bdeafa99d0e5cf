"""Online distillation (OD-DETR), equation by equation: numbers worked by hand, and slow twins on random matches."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.equations.detection import box_terms, classification_loss
from steadydetr.equations.online import distillation_terms, join_matches, task_weight
from steadydetr.learning.class_terms import HardTarget, PositionTarget, QualityTarget
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import Problem, cheapest_queries, paired_iou, pairwise_terms, solve
from steadydetr.learning.predictions import TeacherOutput
from steadydetr.learning.teachers import Average, EMATeacher
from steadydetr.objectives import MatchingDistillation
from steadydetr.objectives.assignment_distillation import teacher_stages
from steadydetr.objectives.matching_distillation import teacher_queries
from steadydetr.objectives.prediction_distillation import naive_terms, teacher_target
from steadydetr.structures import Assignment, DecodedStages, Losses, Match, MatchedQueries, MatchResult, Memory, Queries, Stages, Targets
from tests.conftest import CLASSES, make_batch, make_stages
from tests.reference import detection as slow_detection
from tests.reference import online as slow
from tests.reference.boxes import iou_and_giou

TARGET = (0.5, 0.5, 0.4, 0.4)
QUALITY = Criterion(class_target=QualityTarget(), alpha=None)
COUNTS = [(2, 0, 3), (0, 0), (1,), (5, 4)]
TABLE_3 = [MatchingDistillation(classes=c, boxes=False) for c in ("none", "conditional", "union")]
TABLE_4 = [
    MatchingDistillation(boxes=boxes, class_weight=c, box_weight=w)
    for boxes, c, w in ((False, 1, 1), (True, 1, 1), (True, 1, 0.51), (True, 0.51, 0.51))
]


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def whole(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def table(query: Tensor, targets: Targets, stages: int = 1) -> MatchedQueries:
    """The query of every target, stage by stage."""
    return MatchedQueries(query.view(stages, len(targets.labels)), targets.image, len(targets.counts))


def some_targets(counts: tuple[int, ...]) -> Targets:
    return Targets(torch.zeros(sum(counts), dtype=torch.int64), torch.zeros(sum(counts), 4), counts)


def own_queries(matched: MatchResult, targets: Targets, stages: int = 1) -> Tensor:
    return MatchedQueries.of(matched.match, targets, stages).query.flatten()


def one_image(scores: list[list[float]], boxes: list[tuple[float, ...]]) -> Stages:
    """Queries of one image at one stage, by their scores."""
    return Stages(tensor(*scores)[None, None].logit(), tensor(*boxes)[None, None])


def match_of(*pairs: tuple[int, int]) -> Match:
    """MatchedPairs of a query and a target of the only image."""
    queries, targets = zip(*pairs, strict=True) if pairs else ((), ())
    return Match(torch.zeros(len(pairs), dtype=torch.int64), whole(*queries), whole(*targets))


def parts(criterion: Criterion, stages: Stages, assignment: Assignment, targets: Targets) -> dict[str, float]:
    losses = Losses()
    criterion.add_losses(losses, "m", stages, assignment, targets, 1.0)
    return {name.removeprefix("m/"): float(value.sum()) for name, value, _ in losses}


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


def targets_of(counts: tuple[int, ...], classes: int) -> Targets:
    targets = make_batch(counts).targets
    return replace(targets, labels=targets.labels % classes, boxes=targets.boxes.double())


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
            joined = join_matches(own, taught, targets.image, 2, matched.cost)
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
        joined = join_matches(own_queries(matched, some_targets(counts)), taught, image, 3, cost)
        assert joined.costlier[joined.boxes].all()


def joined(own: list[int], taught: list[int], cost: list[list[float]]) -> list[list[bool]]:
    """Of one image: classes, boxes, costlier."""
    image = torch.zeros(len(own), dtype=torch.int64)
    found = join_matches(whole(*own), whole(*taught), image, 1, torch.tensor(cost).reshape(len(own), 3))
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


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("queries", [1, 2, 9])
def test_cheapest_queries_equal_their_twin(counts: tuple[int, ...], queries: int) -> None:
    """The union of every image in order and without repeats; the rest of the slots only fills up."""
    targets = targets_of(counts, CLASSES)
    stages = make_stages(2, len(counts), queries)
    cost = QUALITY.cost(pairwise_terms(stages, targets))
    folded = targets.repeat_batch(2)
    most = max(min(2 * max(counts), queries), 1)
    found, valid = cheapest_queries(cost, folded.image, len(folded.counts), 2, most)
    assert found.shape == valid.shape == (2 * len(counts), most)
    for image, rows in enumerate(cost.split(folded.counts)):
        expected = slow.cheapest(rows.tolist())
        assert found[image][valid[image]].tolist() == expected
        assert valid[image].tolist() == [True] * len(expected) + [False] * (most - len(expected))
        assert len(set(found[image].tolist())) == most  # fillers are other queries: no slot is written twice


def test_cheapest_queries_by_hand() -> None:
    """Two targets of the first image share a query, the second has none, the third one."""
    cost = torch.tensor([[3.0, 1, 2, 9], [9, 0, 9, 1], [5, 6, 7, 4]])
    found, valid = cheapest_queries(cost, whole(0, 0, 2), 3, 2, 4)
    assert [row[keep].tolist() for row, keep in zip(found, valid, strict=True)] == [[1, 2, 3], [], [0, 3]]


def teacher_output(token: Tensor | None, queries: int, counts: tuple[int, ...] = (2,), match: Match | None = None) -> TeacherOutput:
    images = len(counts)
    memory = Memory(
        torch.zeros(images, 10, 4),
        torch.zeros(images, 10, dtype=torch.bool),
        ((2, 5),),
        torch.ones(images, 1, 2),
        torch.zeros(images, 10, 4),
    )
    matched = MatchResult(match or match_of(), torch.zeros(sum(counts), queries))
    made = make_stages(1, images, queries)
    stages = DecodedStages(made.logits, made.boxes, content=torch.zeros(1, images, queries, 4), reference=made.boxes)
    targets = MatchedQueries.of(matched.match, make_batch(counts).targets, 1)
    return TeacherOutput(memory, queries_of(token, queries, images), stages, matched, targets)


def queries_of(token: Tensor | None, count: int, images: int = 1) -> Queries:
    return Queries(torch.zeros(images, count, 4), torch.zeros(images, count, 4), token=token)


def test_counterparts_by_hand() -> None:
    """By the token that both come from, -1 where the student did not choose it; by rank; learned queries by their number."""
    theirs, mine = whole(7, 3, 5)[None], whole(3, 9, 7)[None]
    taught = teacher_output(theirs, 3)
    assert taught.counterparts(queries_of(mine, 3), "token").tolist() == [[2, 0, -1]]
    assert taught.counterparts(queries_of(mine, 3), "rank").tolist() == [[0, 1, 2]]
    assert teacher_output(None, 3).counterparts(queries_of(None, 3), "token").tolist() == [[0, 1, 2]]
    assert teacher_output(None, 3).counterparts(queries_of(None, 2), "token").tolist() == [[0, 1, -1]]
    both = teacher_output(torch.cat((theirs, mine)), 3, (1, 1)).counterparts(queries_of(torch.cat((mine, mine)), 3, 2), "token")
    assert both.tolist() == [[2, 0, -1], [0, 1, 2]]  # every image has tokens of its own


def test_teacher_queries_by_hand() -> None:
    """A target whose query has no counterpart is not taught, nor is one without a query; stages of the teacher one after the other."""
    token = torch.stack((whole(7, 3, 5), whole(1, 2, 3)))
    match = Match(whole(0, 1), whole(0, 2), whole(0, 2))
    given = teacher_output(token, 3, (2, 1), match)
    student = queries_of(torch.stack((whole(7, 3, 9), whole(4, 5, 6))), 3, 2)
    assert teacher_queries(given, student, "token").query.tolist() == [[0, -1, -1]]
    assert teacher_queries(given, student, "rank").query.tolist() == [[0, -1, 2]]


@pytest.mark.parametrize(("student", "teacher", "expected"), [(6, 6, [0, 1, 2, 3, 4, 5]), (3, 6, [1, 3, 5]), (6, 3, [0, 0, 1, 1, 2, 2])])
def test_teacher_stages_by_hand(student: int, teacher: int, expected: list[int]) -> None:
    assert teacher_stages(student, teacher).tolist() == expected


def test_the_horizon_is_a_share_of_the_run() -> None:
    assert EMATeacher().decay_for(89_000) == pytest.approx(0.9996, abs=2e-6) == slow.decay(89_000)
    assert EMATeacher().decay_for(1000) == pytest.approx(1 - 1 / 28) == slow.decay(1000)
    assert EMATeacher(0.9996).decay_for(1000) == 0.9996
    assert EMATeacher().decay_for(10) == 0.0  # shorter than a step: the weights themselves
    assert EMATeacher().decay_for(None) == 0.9996


def test_average_equals_its_twin() -> None:
    """Parameters and running statistics are averaged, counters copied; it stays in evaluation mode and wants no gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = Average(model, 0.9)
    weights, means = [], []
    start, mean = model[0].weight[0, 0].item(), float(model[1].running_mean[0])
    for _ in range(5):
        model(torch.randn(4, 2)).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        average.train().update(model)
        weights.append(model[0].weight[0, 0].item())
        means.append(float(model[1].running_mean[0]))
    copy = average.model
    assert float(copy[0].weight[0, 0]) == pytest.approx(slow.averaged(weights, start, 0.9), rel=1e-5)
    assert float(copy[1].running_mean[0]) == pytest.approx(slow.averaged(means, mean, 0.9), rel=1e-5)
    assert int(copy[1].num_batches_tracked) == 5
    assert not copy[1].training and not any(p.requires_grad or p.grad is not None for p in average.parameters())


@pytest.mark.parametrize(("rescale", "expected"), [("none", (0.9025, 0.0204)), ("max", (0.95, 0.0215)), ("one", (1.0, 0.0226))])
def test_targets_of_both_matches_are_rescaled_together_by_hand(rescale: Any, expected: tuple[float, float]) -> None:
    """Stable-DINO's target with matching distillation: IoU .95 with the own pair, 1/7 with the taught one, squared."""
    targets = Targets(whole(0), tensor(TARGET), (1,))
    stages = one_image([[0.6], [0.3]], [(0.5, 0.5, 0.4, 0.38), (0.8, 0.5, 0.4, 0.4)])
    criterion = Criterion(class_target=PositionTarget(rescale=rescale))
    found = parts(criterion, stages, Assignment((match_of((0, 0)), match_of((1, 0))), match_of((0, 0))), targets)
    wanted = classification_loss(stages.flat[0][0], tensor(*expected)[:, None], torch.ones(2, 1, dtype=torch.bool))
    assert found["class"] == pytest.approx(float(wanted.sum()), abs=1e-4)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"teachers\.ema\.decay"):
        EMATeacher(decay)


def test_negative_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="box_weight = -3"):
        MatchingDistillation(box_weight=-3)
