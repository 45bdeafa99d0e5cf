"""Offline distillation by predictions and queries (DETRDistill): numbers by hand, the solver, and whole steps against slow twins."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import steadydetr.learning.matching
from steadydetr.detectors import Detector, DetectorConfig
from steadydetr.equations.detection import box_terms
from steadydetr.equations.distill import grouped_stages, pairwise_boxes, soft_label_cost, soft_label_loss, teacher_stages
from steadydetr.learning.class_terms import PositionModulatedCost, QualityTarget
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.frozen import Average, Frozen
from steadydetr.learning.matching import FORBIDDEN, Problem, solve
from steadydetr.objectives import (
    AssignmentDistillation,
    AuxiliaryGroups,
    LogitsDistillation,
    MatchingDistillation,
    Objective,
    PredictionDistillation,
    ReleasedLogits,
    SetPrediction,
    TeacherInit,
)
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Losses
from tests.conftest import DETECTORS, make_batch, make_stages
from tests.distill_steps import ALL, assert_close, learned, make_distilled, other, perturb
from tests.reference import distill as slow
from tests.reference.matching import best_assignment
from tests.steps import assert_parts_sum_to_the_whole, gradients, terms, wide

# by hand


def test_a_positive_pair_by_hand() -> None:
    """Eq. 2: scores (.5, .2) learn (.8, .1): ln 2, and .1 ln 5 + .9 ln 1.25; a box of three quarters of the teacher's height."""
    shown, scores, ours, theirs = (
        torch.tensor([[row]], dtype=torch.float64) for row in ((0.5, 0.2), (0.8, 0.1), (0.5, 0.5, 0.4, 0.3), (0.5, 0.5, 0.4, 0.4))
    )
    logits = shown.logit()
    assert soft_label_loss(logits[0], scores[0]).item() == pytest.approx(0.693147 + 0.361773, abs=1e-6)
    assert soft_label_cost(logits, scores).item() == pytest.approx(1.054920, abs=1e-6)
    l1, giou = pairwise_boxes(ours, theirs)
    assert (l1.item(), giou.item()) == pytest.approx((0.1, 0.75), abs=1e-9)
    pair, apart, _ = box_terms(ours[0], theirs[0])
    assert float(1.054920 + 5 * pair + 2 * apart) == pytest.approx(2.054920, abs=1e-6)


def test_stages_by_hand() -> None:
    """Fig. 5: three student stages under six of the teacher learn from the second, fourth and sixth, or from pairs."""
    assert teacher_stages(3, 6).tolist() == [1, 3, 5] and teacher_stages(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert teacher_stages(2, 3).tolist() == [1, 2] and teacher_stages(6, 6).tolist() == list(range(6))
    assert grouped_stages(3, 6) == [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    assert grouped_stages(2, 3) == [(0, 0), (0, 1), (1, 1), (1, 2)]
    assert grouped_stages(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]


@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(range(1, 8), repeat=2)))
def test_stages_equal_their_twin(student: int, teacher: int) -> None:
    expected = {which: [slow.stages_of(s, student, teacher, which) for s in range(student)] for which in ("progressive", "group")}
    assert [[t] for t in teacher_stages(student, teacher).tolist()] == expected["progressive"]
    assert grouped_stages(student, teacher) == [(s, t) for s, chosen in enumerate(expected["group"]) for t in chosen]


def test_costs_equal_their_twin() -> None:
    student, teacher = make_stages(2, 1, 5, seed=1), make_stages(2, 1, 4, seed=2)
    (logits, boxes), (given, targets) = student.flat, teacher.flat
    label, (l1, giou) = soft_label_cost(logits, given.sigmoid()), pairwise_boxes(boxes, targets)
    for f, k, n in itertools.product(range(2), range(4), range(5)):
        assert float(label[f, k, n]) == pytest.approx(slow.soft_label(logits[f, n].tolist(), given[f, k].sigmoid().tolist()), rel=1e-9)
        assert float(5 * l1[f, k, n] - 2 * giou[f, k, n]) == pytest.approx(slow.box_cost(boxes[f, n].tolist(), targets[f, k].tolist()))


# the solver


def random_cost(rows: int, columns: int, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [3, 8])
def test_forbidden_rows_take_no_column(rows: int) -> None:
    """Also where rows outnumber columns: then as many of the others as there are columns are matched."""
    cost, allowed = random_cost(rows, 4, 0), [row for row in range(rows) if row not in (0, 2)]
    forbidden = cost.clone()
    forbidden[[0, 2]] = FORBIDDEN
    match = solve([Problem(forbidden, (rows,))])[0].match
    alone = solve([Problem(cost[allowed], (len(allowed),))])[0].match
    assert len(match.target) == min(rows - 2, 4)
    assert match.target.tolist() == [allowed[row] for row in alone.target.tolist()] and torch.equal(match.query, alone.query)
    if rows == 3:
        assert tuple(match.query.tolist()) == best_assignment(cost[allowed].tolist())


def test_a_problem_after_another_takes_what_it_left() -> None:
    """Image by image, as if those queries were not there."""
    counts = ((2, 0, 3), (3, 1, 4))
    first, second = (Problem(random_cost(sum(c), 6, seed), c, f"p{seed}") for seed, c in enumerate(counts))
    one, two, free = solve([first, replace(second, after="p0"), second])
    taken = [one.match.query[one.match.image == image].tolist() for image in range(3)]
    blocks = second.cost.split(counts[1])
    for image, block in enumerate(blocks):
        left = [n for n in range(6) if n not in taken[image]]
        expected = [left[column] for _, column in slow.pairs_of(block[:, left].tolist())]
        assert two.match.query[two.match.image == image].tolist() == expected
    assert not torch.equal(two.match.query, free.match.query)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(random_cost(30, 12, 0), (10, 0, 15, 5))
    alone = solve([problem])[0].match
    monkeypatch.setattr(steadydetr.learning.matching, "LARGE", 0)
    together = solve([problem])[0].match
    assert torch.equal(alone.query, together.query) and torch.equal(alone.target, together.target)


# whole steps

VARIANTS: dict[str, Objective] = {
    "default": LogitsDistillation(),
    "score": LogitsDistillation(positives="score", threshold=0.55),
    "rest": LogitsDistillation(rest=True),
    "group": LogitsDistillation(stages="group"),
    "last": LogitsDistillation(stages="last"),
    "candidates": LogitsDistillation(candidates=4),
    "as released": ReleasedLogits(),
    "positive class": LogitsDistillation(positive_box=False, negative_box=False),
    "positive box": LogitsDistillation(positive_class=False, negative_box=False),
    "negative box": LogitsDistillation(positive_class=False, positive_box=False),
    "teacher group": AssignmentDistillation(matching="own"),
}


def assert_equals_twin(method: Method, batch: Batch) -> Losses:
    losses = method(batch)
    values = slow.step(method.student, method.teaching["teacher"], batch, method.objectives, dict(method.adapters))
    assert_close(terms(losses), {name: torch.stack(stages) for name, stages in values.items()})
    assert_close(gradients(method, losses.total), gradients(method, slow.total(values)))
    return losses


@pytest.mark.parametrize(("student", "teacher"), [("deformable", "two-stage"), ("refine", "deformable"), ("dab", "dino")])
def test_step_and_its_gradients_equal_the_slow_twin(student: str, teacher: str) -> None:
    """A teacher of another width, with other queries and stages; an image without objects, a padded one. Adapters learn too."""
    method = make_distilled(DETECTORS[student], other(teacher))
    losses = assert_equals_twin(method, wide(make_batch((2, 0, 3), seed=2)))
    assert all(losses[f"logits/{part}"].detach().abs().min() > 0 for part in ("positive_class", "positive_l1", "negative_giou"))
    assert dict(method.adapters).keys() == {"assignment"}


@pytest.mark.parametrize("queries", [9, 12, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_slow_twin(variant: str, queries: int) -> None:
    """Tables 6 and 7, the supplement's Teacher Group, all options; teachers with fewer, as many and more queries."""
    objectives = (SetPrediction(), VARIANTS[variant])
    method = make_distilled(DETECTORS["refine"], other("refine", queries=queries), objectives)
    losses = assert_equals_twin(method, wide(make_batch((2, 2))))
    named = {"positive class": {"positive_class"}, "positive box": {"positive_l1", "positive_giou"}}
    if variant == "score":
        assert losses["logits/positive_class"].min() > 0
    if variant in named:
        assert {name.partition("/")[2] for name in terms(losses) if name.startswith("logits")} == named[variant]


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("counts", [(5, 2), (0, 4)])
def test_more_objects_than_queries_equal_the_slow_twin(counts: tuple[int, ...], rest: bool) -> None:
    """Objects that the teacher has no query for are no positives; positives that the student has none for are not learned."""
    objectives = (SetPrediction(), LogitsDistillation(rest=rest), AssignmentDistillation())
    method = make_distilled(replace(DETECTORS["refine"], queries=3), other("refine", queries=4), objectives)
    assert_equals_twin(method, wide(make_batch(counts)))


def test_normalisers_are_of_the_whole_step() -> None:
    """Positives: its objects. Negatives: what is matched of them; as many as there is room, or as the teacher has besides its positives.

    An image whose objects leave no room takes none of another image's: 9 queries teach nothing but positives of 12 objects, and all
    9 of an image without any.
    """
    student = DETECTORS["refine"]
    cases = [
        (9, None, False, (2, 0, 3), 9 * 3 - 5),
        (16, None, False, (2, 0, 3), 36),
        (16, None, True, (2, 0, 3), 31),
        (9, 4, True, (2, 0, 3), 12),
        (9, None, False, (12, 0), 9),
        (9, 4, False, (12, 7, 0), 0 + 2 + 4),
        (16, None, True, (14, 0), 12),
        (20, None, False, (19, 0), 1 + 12),
        (9, None, False, (12, 12), 0),
    ]
    for queries, candidates, rest, counts, expected in cases:
        objective = LogitsDistillation(candidates=candidates, rest=rest)
        method = make_distilled(student, other("refine", queries=queries), (SetPrediction(), objective))
        context = StepContext.of(wide(make_batch(counts)), method.student, method.criterion, method.teaching)
        stages = {"main": method.student.decode(context.memory, SetPrediction().query_groups(context))["main"]}
        pairs = objective.stage_pairs(context, stages["main"])
        _, negative = (solution.match for solution in solve(objective.problems(context, stages)))
        assert objective.normalisers(pairs, context) == {"positive": sum(counts), "negative": max(expected, 1)}
        assert len(negative.query) == 2 * expected, counts  # at two stages


def test_a_teacher_is_matched_by_its_own_criterion() -> None:
    """What it is learned by is still the student's criterion; a teacher that has none of its own is matched by that, too."""
    batch, theirs = wide(make_batch((3, 4))), Criterion(class_cost=PositionModulatedCost(), cost_weights=Weights(20.0, 0.0, 0.0))
    start = make_distilled(DETECTORS["refine"], other("refine"), (SetPrediction(), AssignmentDistillation()))
    teachers = {"teacher": start.teachers["teacher"]}
    own, usual = (
        Method(start.student, start.criterion, start.objectives, teachers, criteria).double().eval()  # type: ignore[arg-type]
        for criteria in ({"teacher": theirs}, None)
    )
    found, expected = (
        solve([c.problem(m.step_context(batch).teacher_outputs["teacher"].stages, batch.targets, "")])[0]
        for m, c in ((own, theirs), (usual, usual.criterion))
    )
    for method, solution in ((own, found), (usual, expected)):
        match = method.step_context(batch).teacher_outputs["teacher"].matched.match
        assert torch.equal(match.query, solution.match.query)
    assert not torch.equal(found.match.query, expected.match.query)
    losses = {name: terms(method(batch)) for name, method in (("own", own), ("usual", usual))}
    assert_close(
        {n: v for n, v in losses["own"].items() if n.startswith("main")}, {n: v for n, v in losses["usual"].items() if n.startswith("main")}
    )
    assert not torch.allclose(losses["own"]["assignment/l1"], losses["usual"]["assignment/l1"])


@pytest.mark.parametrize("name", ["deformable", "two-stage", "dab", "dino"])
def test_teacher_gets_no_gradient_and_stays_in_evaluation_mode(name: str) -> None:
    method = make_distilled(DETECTORS[name], other(name)).train()
    before = {n: t.clone() for n, t in method.teachers.state_dict().items()}
    method(wide(make_batch((2, 3)))).total.backward()
    assert not [n for n, p in method.teachers.named_parameters() if p.grad is not None or p.requires_grad]
    assert method.student.training and not any(module.training for module in method.teachers["teacher"].modules())
    assert all(torch.equal(before[n], t) for n, t in method.teachers.state_dict().items())


@pytest.mark.parametrize("variant", ["default", "score", "rest", "candidates"])
def test_a_student_equal_to_its_teacher_learns_nothing_from_its_predictions(variant: str, detector_config: DetectorConfig) -> None:
    method = make_distilled(detector_config, detector_config, (SetPrediction(), VARIANTS[variant]))
    method.student.load_state_dict(method.teaching["teacher"].state_dict())
    losses = method(wide(make_batch((2, 0, 3))))
    distilled_terms = {n: v for n, v in terms(losses).items() if n.startswith("logits/")}
    for name, value in distilled_terms.items():
        assert value.abs().max() < 1e-12 or name.endswith("class"), name
    # boxes that differ by rounding, as AdaMixer's do, have a gradient: both of their losses have a kink where they are equal
    total = torch.stack([value.sum() for name, value in distilled_terms.items() if name.endswith("class") or not value.any()]).sum()
    for name, gradient in gradients(method, total).items():
        assert gradient.abs().max() < 1e-12, name


@pytest.mark.parametrize("name", ["refine", "two-stage", "dab", "dino"])
def test_an_objective_takes_its_own_terms_away_and_no_others(name: str) -> None:
    batch = wide(make_batch((2, 0, 3)))
    whole = terms(make_distilled(DETECTORS[name], other(name))(batch))
    for left_out in ALL[1:]:
        rest = terms(make_distilled(DETECTORS[name], other(name), [o for o in ALL if o is not left_out])(batch))
        assert_close(rest, {n: v for n, v in whole.items() if n.partition("/")[0] != left_out.name})
        assert len(rest) < len(whole)


@pytest.mark.parametrize("variant", ["default", "score", "as released"])
@pytest.mark.parametrize("name", ["refine", "dino"])
def test_parts_sum_to_the_whole(name: str, variant: str) -> None:
    objectives = (SetPrediction(), VARIANTS[variant], AssignmentDistillation())
    assert_parts_sum_to_the_whole(make_distilled(DETECTORS[name], other(name), objectives))


def test_weights_of_objectives() -> None:
    """lambda_1 and lambda_3 multiply what is learned and nothing else; they move no assignment."""
    batch, plain = wide(make_batch((2, 3))), make_distilled(DETECTORS["refine"], other("refine"))
    weighted = make_distilled(
        DETECTORS["refine"], other("refine"), (SetPrediction(), LogitsDistillation(weight=3.0), AssignmentDistillation(weight=0.5))
    )
    factor = {"main": 1.0, "logits": 3.0, "assignment": 0.5}
    for (name, a, before), (_, b, after) in zip(plain(batch), weighted(batch), strict=True):
        assert torch.equal(a, b) and after == before * factor[name.partition("/")[0]]


def test_one_fetch_serves_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the teacher's assignment, one for all of the student's."""
    objectives = (SetPrediction(), LogitsDistillation(), AssignmentDistillation(matching="own"))
    method = make_distilled(DETECTORS["refine"], other("refine"), objectives)
    batch, calls, original = wide(make_batch((2, 3))), [], torch.Tensor.cpu

    def counting(tensor: Tensor) -> Tensor:
        calls.append(tensor.shape)
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    method(batch)
    assert len(calls) == 2


def test_bfloat16_step_is_close() -> None:
    method, batch = make_distilled(DETECTORS["dino"], other("dino")).float(), make_batch((2, 3))
    exact = method(batch).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = method(batch).total
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.1)


def test_two_teachers_in_one_step() -> None:
    """OD-DETR, stable matching and DETRDistill together: what the student's average teaches is the same with and without the other."""
    online: tuple[Objective, ...] = (SetPrediction(MatchingDistillation()), PredictionDistillation(), AuxiliaryGroups())
    criterion = Criterion(class_target=QualityTarget(), class_cost=PositionModulatedCost(), alpha=None)
    batch, found = wide(make_batch((2, 0, 3))), []
    for objectives in (online, (*online, *ALL[1:])):
        start = make_distilled(DETECTORS["dino"], other("dino"))
        average = Average(start.student, 0.9)
        perturb(average, 5)
        teachers = {"ema": average, "teacher": start.teachers["teacher"]}
        method = Method(start.student, criterion, (*objectives, start.objectives[-1]), teachers).double().eval()
        losses = method(batch)
        losses.total.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in learned(method).values())
        found.append(terms(losses))
    alone, together = found
    assert {name.partition("/")[0] for name in together.keys() - alone.keys()} == {"logits", "assignment"}
    assert_close({name: together[name] for name in alone}, alone)


@pytest.mark.parametrize("objectives", [(SetPrediction(), TeacherInit()), (SetPrediction(), LogitsDistillation())])
def test_only_teachers_that_are_read_are_run(objectives: tuple[Objective, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The average of the weights, which nobody reads here, is still there to be updated and evaluated."""
    start = make_distilled(DETECTORS["refine"], DETECTORS["refine"])
    teachers: dict[str, Frozen[Detector]] = {"ema": Average(start.student, 0.5), "teacher": start.teachers["teacher"]}  # type: ignore[dict-item]
    method = Method(start.student, Criterion(), objectives, teachers).double()
    ran = []
    for name, teacher in method.teaching.items():
        monkeypatch.setattr(teacher, "encode", lambda *a, encode=teacher.encode, name=name: ran.append(name) or encode(*a))
    losses = method(wide(make_batch((2, 3))))
    assert losses.total.isfinite() and ran == [name for objective in objectives for name in objective.reads]
    assert method.ema is not None
    before = method.ema.model.level_embed.detach().clone()
    with torch.no_grad():
        method.student.level_embed.add_(1)
    method.ema.update(method.student)
    torch.testing.assert_close(method.ema.model.level_embed.detach(), before + 0.5)
