"""Align-DETR: its loss and mixed matching, by hand, against slow twins, as whole steps, and beside the other methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from steadydetr.detectors import DetectorConfig
from steadydetr.equations.align import aligned_quality, prime_weights
from steadydetr.equations.detection import classification_loss
from steadydetr.equations.online import join_matches
from steadydetr.learning.class_terms import AlignTarget, ClassTarget, HardTarget, PositionModulatedCost, PositionTarget, QualityTarget
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Average, Frozen
from steadydetr.learning.matching import FORBIDDEN, MixedMatching, Problem, pairwise_terms, solve
from steadydetr.learning.predictions import match_batch, proposal_targets
from steadydetr.objectives import (
    AssignmentDistillation,
    AuxiliaryGroups,
    FeatureDistillation,
    LogitsDistillation,
    MatchingDistillation,
    Objective,
    PredictionDistillation,
    SetPrediction,
)
from steadydetr.objectives.method import Method
from steadydetr.recipes import find
from steadydetr.recipes.align import align
from steadydetr.structures import Assignment, Losses, Match, MatchedQueries, MatchResult, Stages, Targets
from tests.commands import understand
from tests.conftest import CLASSES, DETECTORS, make_batch, make_stages, own_objectives
from tests.reference import align as slow
from tests.reference import matching as slow_matching
from tests.reference.detection import classification
from tests.steps import assert_close, assert_parts_sum_to_the_whole, terms, wide
from tests.test_recipes import parameters

ALIGN = Criterion(class_target=AlignTarget(), alpha=None, matching=MixedMatching())
COUNTS = [(2, 0, 3), (0, 0), (1,), (3, 3), (1, 4)]  # with six queries, three or more objects get one each


def make(config: DetectorConfig, *objectives: Objective, criterion: Criterion = ALIGN, **teachers: DetectorConfig) -> Method:
    """In float64 and evaluation mode, with weights away from their start; a detector's own objectives besides."""
    torch.manual_seed(0)
    built = {name: other.build(CLASSES) for name, other in {"student": config, **teachers}.items()}
    for model in built.values():
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    student = built.pop("student")
    taught: dict[str, Frozen] = {name: Average(student, 0.9) if name == "ema" else Frozen(model) for name, model in built.items()}
    return Method(student, criterion, (*(objectives or (SetPrediction(),)), *own_objectives(config)), taught).double().eval()


def targets_of(counts: tuple[int, ...]) -> Targets:
    targets = make_batch(counts).targets
    return replace(targets, labels=targets.labels % 2, boxes=targets.boxes.double())


# the equations


def test_quality_by_hand() -> None:
    """0.5^0.25 0.8^0.75 = 0.8409 x 0.8459; a box beside its target still learns 0.01."""
    score, iou = torch.tensor([0.5, 0.0, 1.0, 0.9]), torch.tensor([0.8, 0.7, 1.0, 0.0])
    assert aligned_quality(score, iou).tolist() == pytest.approx([0.711312, 0.01, 1.0, 0.01], abs=1e-6)


def test_loss_by_hand() -> None:
    """A positive has no focal factor: -0.8 ln 0.5 - 0.2 ln 0.5 = ln 2; a negative of score 0.5 a quarter of it."""
    logits, target = torch.zeros(2, dtype=torch.float64), torch.tensor([0.8, 0.0], dtype=torch.float64)
    value = classification_loss(logits, target, torch.tensor([True, False]), None, focal_positives=False)
    assert value.tolist() == pytest.approx([math.log(2), math.log(2) / 4])


def test_loss_equals_its_twin_and_its_gradient_is_right() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(12, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    target, positive = torch.rand(12, generator=generator, dtype=torch.float64), torch.arange(12) < 5
    target = torch.where(positive, target, 0)
    found = classification_loss(logits, target, positive, None, 1.5, focal_positives=False)
    each = zip(logits.tolist(), target.tolist(), positive.tolist(), strict=True)
    expected = [classification(x, t, p, None, 0.0 if p else 1.5) for x, t, p in each]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.autograd.gradcheck(lambda x: classification_loss(x, target, positive, None, 2.0, focal_positives=False), logits)


def test_shares_by_hand() -> None:
    """Ranks of 0.3, 0.6 and 0.5 are 2, 0 and 1; of equal ones the first is the better; other targets do not matter."""
    quality, target = torch.tensor([0.3, 0.9, 0.6, 0.5, 0.9]), torch.tensor([7, 2, 7, 7, 2])
    expected = [math.exp(-rank / 1.5) for rank in (2, 0, 0, 1, 1)]
    assert prime_weights(quality, target, 1.5).tolist() == pytest.approx(expected)
    assert prime_weights(quality, target, 1e-3).tolist() == pytest.approx([0, 1, 1, 0, 0])


@pytest.mark.parametrize("pairs", [0, 1, 40])
def test_shares_equal_their_twin(pairs: int) -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(6, (pairs,), generator=generator)
    quality = (torch.rand(pairs, generator=generator, dtype=torch.float64) * 8).round() / 8  # many are equal
    values = {(query, int(t)): float(q) for query, (t, q) in enumerate(zip(target, quality, strict=True))}
    expected = torch.tensor(list(slow.shares(values, 0.7).values()), dtype=torch.float64)
    torch.testing.assert_close(prime_weights(quality, target, 0.7), expected, rtol=1e-12, atol=0)


# mixed matching


def pairs_by_image(match: Match, counts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Query and target of every folded image, in order."""
    first = [sum(counts[:image]) for image in range(len(counts))]
    found = zip(match.image.tolist(), match.query.tolist(), match.target.tolist(), strict=True)
    pairs: list[list[tuple[int, int]]] = [[] for _ in counts]
    for image, query, target in found:
        pairs[image].append((query, target - first[image]))
    return pairs


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("most", [2, 3])
def test_mixed_matching_equals_its_twin(counts: tuple[int, ...], most: int) -> None:
    """Two stages; k at the first, one to one at the last. What an image gets depends on no other image (D-175)."""
    stages, targets, criterion = make_stages(2, len(counts), 6), targets_of(counts), replace(ALIGN, matching=MixedMatching(most))
    problem = criterion.mixed_problem(stages, targets, "main", last=True)
    solved = solve([problem])[0]
    assert torch.equal(solved.cost, criterion.problem(stages, targets, "main").cost)
    found = pairs_by_image(solved.match, problem.counts)
    for image, cost in enumerate(solved.cost.split(problem.counts)):
        assert found[image] == slow.best_pairs(cost.tolist(), most if image < len(counts) else 1)


def test_as_many_queries_as_half_of_them_allow() -> None:
    """Six queries: three each for one object, one each for three; and one at least, also for more objects than half the queries."""
    assert [slow.queries_of_a_target(6, n, 4) for n in (1, 2, 3, 4)] == [3, 1, 1, 1]
    for objects, pairs in ((1, 3), (2, 2), (3, 3), (4, 4), (6, 6), (8, 6)):
        problem = Problem(make_stages(1, 1, 6).logits.new_ones(objects, 6).cumsum(1), (objects,), queries=(4,), at_most_half=True)
        assert len(solve([problem])[0].match.query) == pairs


def test_the_order_of_images_does_not_matter() -> None:
    """Released code lets an image with many objects lower k for those after it (D-175)."""
    stages, targets, criterion = make_stages(1, 2, 8), targets_of((4, 1)), replace(ALIGN, matching=MixedMatching(3))
    turned = replace(stages, logits=stages.logits.flip(1), boxes=stages.boxes.flip(1))
    forward, backward = (
        pairs_by_image(solve([criterion.mixed_problem(s, t, "proposals", last=False)])[0].match, t.counts)
        for s, t in ((stages, targets), (turned, Targets.cat(targets.split()[::-1])))
    )
    assert forward == backward[::-1]
    assert [len(pairs) for pairs in forward] == [4, 3]


def test_queries_that_are_not_valid_are_neither_matched_nor_counted() -> None:
    cost = torch.rand(2, 9, generator=torch.Generator().manual_seed(3))
    cost[:, 4:] = FORBIDDEN

    def matched(cost: Tensor, queries: int, half: bool = True) -> Tensor:
        return solve([Problem(cost, (len(cost),), queries=(queries,), at_most_half=half)])[0].match.query

    assert matched(cost, 2).max() < 4 and len(matched(cost, 2)) == 2  # four of them, two objects: one each
    assert matched(cost, 2, half=False).max() < 4 and len(matched(cost, 2, half=False)) == 4
    assert len(matched(cost[:1], 4)) == 2
    assert len(matched(torch.full((1, 3), FORBIDDEN), 2)) == 0


def test_mixed_and_other_problems_are_solved_with_one_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, stages = targets_of((2, 0, 1)), make_stages(2, 3, 9)
    problems = [ALIGN.mixed_problem(stages, targets, "main", last=True), ALIGN.problem(stages, targets, "auxiliary")]
    alone = [solve([problem])[0].match for problem in problems]
    fetches: list[Tensor] = []
    fetch = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (fetches.append(tensor), fetch(tensor))[1])
    for result, expected in zip(solve(problems), alone, strict=True):
        assert torch.equal(result.match.query, expected.query) and torch.equal(result.match.target, expected.target)
    assert len(fetches) == 1


def test_a_large_problem_is_solved_in_threads_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ALIGN.mixed_problem(make_stages(2, 2, 9), targets_of((2, 3)), "main", last=True)
    expected = solve([problem])[0].match
    monkeypatch.setattr("steadydetr.learning.matching.LARGE", 1)
    found = solve([problem])[0].match
    assert torch.equal(found.query, expected.query) and torch.equal(found.target, expected.target)


def test_what_measures_matching_sees_one_query_a_target(detector_config: DetectorConfig) -> None:
    """Stability, and teachers, are matched one to one by the same cost (D-177)."""
    detector, batch = make(detector_config).student, wide(make_batch((2, 3)))
    mixed, plain = (match_batch(detector, criterion, batch) for criterion in (ALIGN, replace(ALIGN, matching=None)))
    assert torch.equal(mixed.matched_queries.query, plain.matched_queries.query)
    assert len(mixed.matched.match.query) == len(mixed.stages.logits) * 5
    assert (mixed.proposal_queries is None) == (plain.proposal_queries is None)
    if mixed.proposal_queries is not None and plain.proposal_queries is not None:
        assert torch.equal(mixed.proposal_queries.query, plain.proposal_queries.query)


# losses


def expected_losses(stages: Stages, targets: Targets, last: bool, tau: float, most: int) -> list[tuple[float, float, float]]:
    """Of every stage, from its predictions alone."""
    found = []
    for s, (logits, boxes) in enumerate(zip(stages.logits, stages.boxes, strict=True)):
        totals = (0.0, 0.0, 0.0)
        for image, part in enumerate(targets.split()):
            x, b, t, labels = (tensor.tolist() for tensor in (logits[image], boxes[image], part.boxes, part.labels))
            cost = [
                [slow_matching.matching_cost(row[label], box, wanted) for row, box in zip(x, b, strict=True)]
                for label, wanted in zip(labels, t, strict=True)
            ]
            pairs = slow.best_pairs(cost, 1 if last and s == len(stages.logits) - 1 else most)
            totals = tuple(sum(both) for both in zip(totals, slow.losses(x, b, t, labels, pairs, tau), strict=True))  # type: ignore[assignment]
        found.append(totals)
    return found


@pytest.mark.parametrize("name", ["refine", "two-stage", "dino"])
def test_a_step_equals_its_slow_twin(name: str) -> None:
    """All stages, and the proposals, which have several queries a target too. Denoising has one, by its own match."""
    config, matching = replace(DETECTORS[name], queries=6), MixedMatching(2, 0.8)
    method, batch = make(config, criterion=replace(ALIGN, matching=matching)), wide(make_batch((1, 0, 2)))
    losses, context = method(batch), method.step_context(batch)
    groups = [group for objective in method.objectives for group in objective.query_groups(context)]
    main = method.student.decode(context.memory, groups)["main"]
    parts = {"main": (main, batch.targets, True)}
    if context.proposals is not None:
        parts["proposals"] = (context.proposals, proposal_targets(method.student, batch.targets), False)
    for part, (stages, targets, last) in parts.items():
        if part == "proposals" and stages.logits.shape[2] > 30:  # every token: the twin tries all choices
            continue
        expected = torch.tensor(expected_losses(stages, targets, last, matching.tau, matching.queries), dtype=torch.float64) / 3
        for kind, values in zip(("class", "l1", "giou"), expected.T, strict=True):
            torch.testing.assert_close(losses[f"{part}/{kind}"], values, rtol=1e-8, atol=1e-10)
    if "denoising/l1" in {term for term, _, _ in losses}:
        alone = make(config, criterion=replace(ALIGN, matching=None))(batch)
        assert torch.equal(losses["denoising/class"], alone["denoising/class"])
        assert torch.equal(losses["denoising/l1"], alone["denoising/l1"])


def test_one_query_a_target_is_as_without() -> None:
    batch = wide(make_batch((2, 0, 3)))
    one, none = (make(DETECTORS["dino"], criterion=replace(ALIGN, matching=matching))(batch) for matching in (MixedMatching(1), None))
    for term, values, _ in one:
        assert torch.equal(values, none[term])


@pytest.mark.parametrize("target", [HardTarget(), QualityTarget(), PositionTarget(), AlignTarget()])
def test_every_class_target_with_mixed_matching(target: ClassTarget) -> None:
    """The queries of a target are ranked by what the class target says is their quality; what the others learn shrinks with tau."""
    batch = wide(make_batch((1, 2)))
    criterion = Criterion(PositionModulatedCost(), target, alpha=None)
    every, first = (make(DETECTORS["dino"], criterion=replace(criterion, matching=MixedMatching(2, tau)))(batch) for tau in (1e6, 1e-3))
    plain = make(DETECTORS["dino"], criterion=replace(criterion, matching=None))(batch)
    for stage in range(2):
        assert (float(every["main/l1"][stage]) > float(first["main/l1"][stage])) == (stage == 0)
    torch.testing.assert_close(every["main/class"][-1], plain["main/class"][-1], rtol=1e-12, atol=0)


def test_the_better_of_two_boxes_is_the_prime_one() -> None:
    """IoU 1 and score 0.2 against IoU 0.5 and score 0.9: t is 0.669 and 0.579."""
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.2], *[[0.1, 0.1, 0.1, 0.1]] * 2], dtype=torch.float64)
    stages = Stages(torch.tensor([[0.2], [0.9], [0.01], [0.01]], dtype=torch.float64).logit()[None, None], boxes[None, None])
    targets = Targets(torch.tensor([0]), boxes[:1], (1,))
    match = ALIGN.shared(solve([ALIGN.mixed_problem(stages, targets, "p", last=False)])[0].match, stages, targets)
    assert match.query.tolist() == [0, 1] and match.share is not None
    assert match.share.tolist() == pytest.approx([1, math.exp(-1 / 1.5)])
    assert ALIGN.shared(match, stages, targets).weight is None
    turned = replace(ALIGN, class_target=AlignTarget(alpha=1.0)).shared(match, stages, targets)  # by the score alone
    assert turned.share is not None and turned.share.tolist() == pytest.approx([math.exp(-1 / 1.5), 1])


def test_shares_and_weights_of_joined_matches() -> None:
    index = torch.tensor
    plain, shared = Match(index([0]), index([1]), index([2])), Match(index([0]), index([3]), index([4]), share=index([0.5]))
    joined = Match.cat((plain, shared))
    assert joined.weight is None and joined.share is not None and joined.share.tolist() == [1.0, 0.5]
    assert Match.cat((plain, plain)).share is None


@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_garbage_in_invalid_rows(garbage: float) -> None:
    valid = torch.tensor([[True] * 6 + [False] * 2, [True] * 5 + [False] * 3])
    targets, outcomes = targets_of((1, 2)), []
    for filling in (0.5, garbage):
        clean, shown = make_stages(2, 2, 8), valid[None, :, :, None]
        logits, boxes = (torch.where(shown, t, filling).requires_grad_() for t in (clean.logits, clean.boxes))
        stages, losses = Stages(logits, boxes, valid=valid), Losses()
        match = solve([ALIGN.mixed_problem(stages, targets, "main", last=True)])[0].match
        assert valid[match.image % 2, match.query].all()
        ALIGN.add_losses(losses, "main", stages, Assignment.of(ALIGN.shared(match, stages, targets)), targets, 1.0)
        outcomes.append((losses.total, *torch.autograd.grad(losses.total, (logits, boxes))))
    for ours, expected in zip(*outcomes, strict=True):
        assert torch.equal(ours, expected) and torch.isfinite(ours).all()


# whole steps


@pytest.mark.parametrize("counts", [(2, 3), (0, 0), (0, 4), (15,)])
def test_every_parameter_gets_a_gradient(detector_config: DetectorConfig, counts: tuple[int, ...]) -> None:
    """Without objects too, and with more objects than queries."""
    method = make(detector_config).float().train()
    losses = method(make_batch(counts))
    losses.total.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    assert [name for name, grad in gradients.items() if grad is None] == method.unused_parameters
    assert not [name for name, grad in gradients.items() if grad is not None and not torch.isfinite(grad).all()]


def test_parts_sum_to_the_whole(detector_config: DetectorConfig) -> None:
    """However images are dealt to processes: k of an image depends on that image alone."""
    assert_parts_sum_to_the_whole(make(detector_config))


def test_bfloat16_step_is_close() -> None:
    method, batch = make(DETECTORS["dino"]).float(), make_batch((1, 2))
    exact = method(batch).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = method(batch).total
    assert rounded.dtype == torch.float32
    assert float(rounded.detach()) == pytest.approx(float(exact.detach()), rel=0.1)


# beside the other methods

EMA = (PredictionDistillation(), AuxiliaryGroups())
OFFLINE = (LogitsDistillation(), FeatureDistillation(), AssignmentDistillation(matching="own"))


@pytest.mark.parametrize("name", ["refine", "dab", "dino"])
@pytest.mark.parametrize("stable", [False, True])
def test_all_methods_together(name: str, stable: bool) -> None:
    """Prediction distillation, auxiliary groups and DETRDistill with the loss and matching of Align-DETR; with Stable-DINO's cost too."""
    config = DETECTORS[name]
    if stable:
        config = replace(config, transformer=replace(config.transformer, fusion="dense"))
    criterion = replace(ALIGN, class_cost=PositionModulatedCost()) if stable else ALIGN
    method = make(config, SetPrediction(), *EMA, *OFFLINE, criterion=criterion, ema=config, teacher=DETECTORS[name])
    losses = method(wide(make_batch((1, 2))))
    assert torch.isfinite(losses.total)
    losses.total.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())]
    assert not missing


OPTIONS = (
    MatchingDistillation(),
    MatchingDistillation(classes="conditional", class_weight=0.51),
    MatchingDistillation(classes="none"),
    MatchingDistillation(class_weight=0.3, boxes=False),
)


def learned(match: Match, first: int) -> list[tuple[int, int, float, float]]:
    """Query, target of its image, weight and share of every pair."""
    factors = [torch.ones(len(match.query)) if f is None else f for f in (match.weight, match.share)]
    return list(zip(match.query.tolist(), (match.target - first).tolist(), *(f.tolist() for f in factors), strict=True))


@pytest.mark.parametrize("counts", [(2,), (3,), (1,), (0,)])
@pytest.mark.parametrize("options", OPTIONS)
def test_joined_with_a_teachers_match_it_equals_its_twin(options: MatchingDistillation, counts: tuple[int, ...]) -> None:
    """Random teachers, whose queries may be the student's own of this target, of another one, or idle; two queries a target and three.

    Of some cases the student's match is random too.
    """
    targets, queries, seen = targets_of(counts), 14, set()
    generator = torch.Generator().manual_seed(sum(counts))
    for seed in range(12):
        stages = make_stages(1, 1, queries, seed)
        near = targets.boxes[torch.arange(queries // 2) % max(counts[0], 1)] if counts[0] else stages.boxes[0, 0, : queries // 2]
        stages.boxes[0, 0, : queries // 2] = near + 0.1 * (stages.boxes[0, 0, : queries // 2] - 0.4)
        criterion = replace(ALIGN, matching=MixedMatching(2 + seed % 2))
        (solved,) = solve([criterion.mixed_problem(stages, targets, "proposals", last=False)])
        match = solved.match
        if seed % 3 == 0:  # not the cheapest one, so that an added query may be the cheaper
            match = replace(match, query=torch.randperm(queries, generator=generator)[: len(match.query)])
        match = criterion.shared(match, stages, targets)
        query = torch.randperm(queries, generator=generator)[: counts[0]]
        query = torch.where(torch.rand(counts[0], generator=generator) < 0.2, -1, query)
        if len(match.query) and seed % 2:  # the teacher agrees with one of the student's own
            query[match.target[-1]] = torch.where((query == match.query[-1]).any(), query[match.target[-1]], match.query[-1])
        given = MatchResult(match, solved.cost)
        found = options.assign(given, MatchedQueries(query[None], targets.image, 1), stages, targets)
        own = [match.query[match.target == t].tolist() for t in range(counts[0])]
        terms = pairwise_terms(stages, targets)
        assert match.share is not None
        share = {(q, t): s for q, t, _, s in learned(match, 0)}
        classes, boxes = slow.join(own, query.tolist(), targets.labels.tolist(), solved.cost.tolist(), terms.iou.tolist(), share, options)
        ours: dict[tuple[int, int], tuple[int, float, float]] = {}
        for part in found.classes:  # the first decides
            for q, t, *factors in learned(part, 0):
                ours.setdefault((q, int(targets.labels[t])), (t, *factors))
        assert ours == {key: (t, pytest.approx(weight), pytest.approx(s)) for key, (t, weight, s) in classes.items()}
        pairs = {q: (t, weight, s) for q, t, weight, s in learned(found.boxes, 0)}
        assert pairs == {q: (t, pytest.approx(weight), pytest.approx(s)) for q, (t, weight, s) in boxes.items()}
        assert len(pairs) == len(found.boxes.query)  # one target's box a query
        seen |= {(t in own, q in own[t]) for t, q in enumerate(query.tolist())}
    assert not counts[0] or {inside for _, inside in seen} == {True, False}


def test_a_query_that_only_the_teacher_chose_is_the_costliest_of_its_target() -> None:
    """As with one query a target: were it cheaper than one of the student's own, the cheapest assignment would have it instead."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(30):
        cost = torch.randint(0, 6, (2, 9), generator=generator).float()
        match = solve([Problem(cost, (2,), queries=(2,))])[0].match
        taught = torch.randperm(9, generator=generator)[:2]
        added = join_matches(match, taught, torch.zeros(2, dtype=torch.int64), 1, cost)
        assert added.costlier[added.boxes].all() and added.classes.dtype == torch.bool


def test_with_a_teacher_it_is_either_method_where_the_other_says_nothing() -> None:
    """One query a target: the union of OD-DETR. A teacher that is not listened to: Align-DETR."""
    config, batch = DETECTORS["refine"], wide(make_batch((1, 2)))
    joined = SetPrediction(MatchingDistillation())
    one, none = (
        make(config, joined, criterion=replace(ALIGN, matching=matching), ema=DETECTORS["refine"])(batch)
        for matching in (MixedMatching(1), None)
    )
    assert_close(terms(one), terms(none))
    deaf = make(config, SetPrediction(MatchingDistillation(classes="none", boxes=False)), ema=config)
    assert_close(terms(deaf(batch)), terms(Method(deaf.student, ALIGN, (SetPrediction(),))(batch)))


@pytest.mark.parametrize("name", ["refine", "dab", "dino", "adamixer"])
@pytest.mark.parametrize("counts", [(2, 3), (0, 0), (15,)])
def test_every_parameter_gets_a_gradient_beside_a_teacher(name: str, counts: tuple[int, ...]) -> None:
    config = DETECTORS[name]
    method = make(config, SetPrediction(MatchingDistillation()), *EMA, ema=config).train()
    losses = method(wide(make_batch(counts)))
    losses.total.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())]
    assert not missing and 0 <= losses.measures["main/same_query_as_teacher"] <= 1


def test_a_teacher_is_matched_as_before() -> None:
    """Its match gives every target one query, whatever the student's rule; so do the objectives that learn from it."""
    config, batch = DETECTORS["refine"], wide(make_batch((1, 2)))
    objectives = (SetPrediction(), LogitsDistillation(), AssignmentDistillation())
    contexts = [
        make(config, *objectives, criterion=replace(ALIGN, matching=matching), teacher=config).step_context(batch)
        for matching in (None, MixedMatching())
    ]
    before, after = (context.teacher_outputs["teacher"].matched.match for context in contexts)
    assert torch.equal(before.query, after.query) and torch.equal(before.target, after.target)


# recipes


def test_recipes_differ_from_their_baselines_in_loss_and_matching() -> None:
    for name, baseline in (("small-align-dino", "small-dino"), ("align-deformable-detr-r50-50ep", "deformable-detr-refine-r50-50ep")):
        recipe, plain = find(name), find(baseline)
        weights = replace(plain.criterion.loss_weights, label=1.0)
        changed = replace(
            plain.criterion, class_target=AlignTarget(0.25, 0.01), alpha=None, matching=MixedMatching(2, 1.5), loss_weights=weights
        )
        assert recipe == replace(plain, name=name, criterion=changed, reported=recipe.reported, notes=recipe.notes)
    assert align(find("small-dino"), "1.2").name == "align-small-dino" and align(find("small-dino"), "1.2").reported == "1.2"


def test_size_is_that_of_the_released_model() -> None:
    assert [parameters(find(f"align-dino-4scale-r50-{epochs}ep"), 80)[0] for epochs in (12, 24)] == [47_650_316] * 2


def test_any_recipe_takes_it_by_flags() -> None:
    flags = "--criterion.class-target align --criterion.alpha None --criterion.matching mixed --criterion.matching.queries 3"
    (recipe,) = understand(f"steadydetr train small-deformable-detr {flags}")
    assert recipe.criterion == replace(
        find("small-deformable-detr").criterion,
        **vars(replace(ALIGN, matching=MixedMatching(3))) | {"loss_weights": recipe.criterion.loss_weights},
    )


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: MixedMatching(0), r"criterion.matching.queries = 0 must lie in 1 .. 1000"),
        (lambda: MixedMatching(2, 0.0), r"criterion.matching.tau = 0.0 must lie in"),
        (lambda: AlignTarget(1.5), r"criterion.class_target.alpha = 1.5 must lie in 0 .. 1"),
        (lambda: AlignTarget(0.25, -0.1), r"criterion.class_target.least = -0.1 must lie in 0 .. 1"),
    ],
)
def test_what_cannot_be_is_refused(made, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        made()


def test_costs_are_those_of_the_detector() -> None:
    """The rule changes how many queries a target gets, not what they cost."""
    stages, targets = make_stages(1, 2, 5), targets_of((2, 1))
    terms = pairwise_terms(stages, targets)
    assert torch.equal(ALIGN.cost(terms), Criterion().cost(terms)) and ALIGN.matcher == Criterion().matcher


def test_the_plan_is_written_down(tmp_path: Path) -> None:
    """A saved recipe says all of it; one that was saved before says nothing of matching, and means one query a target."""
    from steadydetr.config import from_plain, to_plain

    plain = to_plain(find("small-align-dino"))
    assert plain["criterion"]["matching"] | {"kind": ""} == {"kind": "", "queries": 2, "tau": 1.5}
    before = to_plain(find("small-dino"))
    del before["criterion"]["matching"]
    assert from_plain(before) == find("small-dino")
