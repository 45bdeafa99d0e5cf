"""What OD-DETR's teacher gives: its average of the weights, the cheapest queries, counterparts and their queries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steadydetr.learning.frozen import Average
from steadydetr.learning.matching import cheapest_queries, pairwise_terms
from steadydetr.learning.predictions import TeacherOutput
from steadydetr.learning.teachers import EMATeacher
from steadydetr.objectives.assignment_distillation import teacher_stages
from steadydetr.objectives.matching_distillation import teacher_queries
from steadydetr.structures import DecodedStages, Match, MatchedQueries, MatchResult, Memory, Queries
from tests.conftest import CLASSES, make_batch, make_stages
from tests.online_cases import COUNTS, QUALITY, match_of, targets_of, whole
from tests.reference import online as slow


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


def test_the_teacher_of_the_paper_stops_and_may_be_the_student_itself() -> None:
    """Its average is frozen at the first drop of the rate; a decay of 0 is the student of the step before."""
    assert EMATeacher().stop_update and EMATeacher(decay=0.0).decay_for(100) == 0


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


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"teachers\.ema\.decay"):
        EMATeacher(decay)
