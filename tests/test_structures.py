"""The types that everything meets at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steadydetr.structures import (
    DecodedStages,
    Losses,
    Match,
    MatchedQueries,
    Memory,
    Stages,
    Targets,
    Totals,
    dense_proposals,
    take_rows,
)
from tests.conftest import make_batch

COUNTS = [(2, 0, 3), (0, 0), (1,), (0, 4)]


def targets_of(counts: tuple[int, ...]) -> Targets:
    return Targets(torch.arange(sum(counts)), torch.rand(sum(counts), 4), counts)


@pytest.mark.parametrize("counts", COUNTS)
def test_image_of_every_object(counts: tuple[int, ...]) -> None:
    assert targets_of(counts).image.tolist() == [image for image, n in enumerate(counts) for _ in range(n)]


@pytest.mark.parametrize("counts", COUNTS)
def test_splitting_and_joining_targets(counts: tuple[int, ...]) -> None:
    targets = targets_of(counts)
    parts = targets.split()
    assert [part.counts for part in parts] == [(n,) for n in counts]
    joined = Targets.cat(parts)
    assert joined.counts == counts
    assert torch.equal(joined.labels, targets.labels) and torch.equal(joined.boxes, targets.boxes)


def test_folded_targets_are_those_of_more_images() -> None:
    targets = targets_of((2, 0, 1))
    folded = targets.repeat_batch(2)
    assert folded.counts == (2, 0, 1, 2, 0, 1)
    assert folded.image.tolist() == [0, 0, 2, 3, 3, 5]
    assert folded.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_totals_of_a_step() -> None:
    batch = make_batch((2, 5))
    assert batch.global_totals == Totals(objects=7, most_objects=5, images=2, counts=(2, 5))
    assert (Totals(7, 5, 2, (2, 5)).object_counts, Totals(7, 5, 3).object_counts) == ((2, 5), (3, 2, 2))
    assert Totals(0, 0, 2).object_counts == (0, 0) and Totals(0, 0, 0).object_counts == ()
    assert replace(batch, totals=Totals(20, 9, 8)).global_totals == Totals(20, 9, 8)
    assert Totals(0, 0, 2).normaliser == 1.0  # the clamp acts on the step's sum
    assert Totals(7, 5, 2).normaliser == 7.0


def test_stages_fold_and_slice() -> None:
    logits, boxes = torch.rand(3, 2, 4, 5), torch.rand(3, 2, 4, 4)
    valid = torch.ones(2, 4, dtype=torch.bool)
    stages = DecodedStages(logits, boxes, valid, content=torch.rand(3, 2, 4, 8), reference=torch.rand(3, 2, 4, 4))
    flat_logits, flat_boxes = stages.flat
    assert torch.equal(flat_logits[1 * 2 + 1], logits[1, 1]) and torch.equal(flat_boxes[2 * 2], boxes[2, 0])
    last = stages[-1:]
    assert torch.equal(last.logits, logits[-1:]) and torch.equal(last.boxes, boxes[-1:]) and last.valid is valid
    assert torch.equal(last.content, stages.content[2:]) and torch.equal(last.reference, stages.reference[2:])
    by_stage = Stages(logits, boxes, torch.rand(3, 2, 4) > 0.5)
    assert by_stage.valid is not None and by_stage[1:].valid is not None and torch.equal(by_stage[1:].valid, by_stage.valid[1:])


@pytest.mark.parametrize("counts", COUNTS)
def test_matched_queries_are_a_match_as_a_table(counts: tuple[int, ...]) -> None:
    """There and back; some of their pairs; the same queries under other numbers, and at other stages."""
    targets, objects = targets_of(counts), sum(counts)
    query = torch.arange(2 * objects) % 4
    query[1::3] = -1
    at = (query >= 0).nonzero()[:, 0]
    match = Match(targets.repeat_batch(2).image[at], query[at], at)
    table = MatchedQueries.of(match, targets, 2)
    assert torch.equal(table.query.flatten(), query) and torch.equal(table.valid.flatten(), query >= 0)
    for found, expected in zip(vars(table.pairs()).values(), vars(match).values(), strict=True):
        assert found is expected is None or torch.equal(found, expected)
    chosen = table.query > 1
    assert table.pairs(chosen).target.tolist() == chosen.flatten().nonzero()[:, 0].tolist()
    numbers = torch.arange(2 * len(counts) * 4).view(2, len(counts), 4)
    for given, stages in ((numbers, range(2)), (numbers[0], (0, 0))):
        expected = [
            [int(numbers[s, b, q]) if q >= 0 else -1 for b, q in zip(targets.image.tolist(), row, strict=True)]
            for s, row in zip(stages, table.query.tolist(), strict=True)
        ]
        assert table.renumbered(given).query.tolist() == expected
    assert torch.equal(table.at_stages((1, 1, 0)).query, table.query[[1, 1, 0]])
    assert torch.equal(table.repeated(2).query, table.query[[0, 1, 0, 1]])


def test_matches_one_after_the_other() -> None:
    """Weights of 1 are made only where another part has some."""
    plain = Match(torch.tensor([0, 1]), torch.tensor([4, 5]), torch.tensor([2, 3]))
    heavy = replace(plain, query=torch.tensor([6, 7]), weight=torch.tensor([0.5, 2.0]))
    both = Match.cat((plain, heavy))
    assert both.image.tolist() == [0, 1, 0, 1] and both.query.tolist() == [4, 5, 6, 7] and both.target.tolist() == [2, 3, 2, 3]
    assert both.weight is not None and both.weight.tolist() == [1.0, 1.0, 0.5, 2.0]
    assert Match.cat((plain, plain)).weight is None


def test_rows_are_taken_image_by_image() -> None:
    tensor, rows = torch.rand(2, 3, 5, 4), torch.randint(5, (2, 3, 2))
    taken = take_rows(tensor, rows)
    assert taken.shape == (2, 3, 2, 4) and all(torch.equal(taken[s, b], tensor[s, b, rows[s, b]]) for s in range(2) for b in range(3))


def test_a_one_stage_memory_has_no_proposals() -> None:
    memory = Memory(torch.zeros(1, 1, 1), torch.zeros(1, 1), ((1, 1),), torch.ones(1, 1, 2), torch.zeros(1, 1, 1))
    with pytest.raises(TypeError, match="made by a one-stage detector"):
        dense_proposals(memory)


def test_losses_sum_their_weighted_stages() -> None:
    losses = Losses()
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    losses.add("main/class", values, 2.0)
    losses.add("main/l1", torch.tensor([0.5]), 5.0)
    assert float(losses.total.detach()) == pytest.approx(2 * 3 + 5 * 0.5)
    assert {name: float(value) for name, value in losses.weighted().items()} == {"main/class": 6.0, "main/l1": 2.5}
    assert torch.equal(losses["main/class"], values)
    assert [(name, weight) for name, _, weight in losses] == [("main/class", 2.0), ("main/l1", 5.0)]
    losses.total.backward()
    assert torch.equal(values.grad, torch.full((2,), 2.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'main/class' was added twice"):
        losses.add("main/class", values, 1.0)


def test_parts_of_a_batch_are_of_the_same_step() -> None:
    batch = replace(make_batch((2, 0, 3)), step=5, seed=1)
    parts = batch.split()
    assert [part.image_ids for part in parts] == [(0,), (1,), (2,)] and [part.targets.counts for part in parts] == [(2,), (0,), (3,)]
    assert all(part.totals == batch.global_totals and (part.step, part.seed) == (5, 1) for part in parts)
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
