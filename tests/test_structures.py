"""The types that everything meets at."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steadydetr.structures import Losses, Stages, Targets, Totals
from tests.conftest import make_batch

COUNTS = [(2, 0, 3), (0, 0), (1,), (0, 4)]


def targets_of(counts: tuple[int, ...], masks: bool = False) -> Targets:
    objects = sum(counts)
    shapes = torch.arange(objects * 4).view(objects, 2, 2) % 3 == 0 if masks else None
    return Targets(torch.arange(objects), torch.rand(objects, 4), counts, shapes)


@pytest.mark.parametrize("counts", COUNTS)
def test_image_of_every_object(counts: tuple[int, ...]) -> None:
    assert targets_of(counts).image.tolist() == [image for image, n in enumerate(counts) for _ in range(n)]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_splitting_and_joining_targets(counts: tuple[int, ...], masks: bool) -> None:
    targets = targets_of(counts, masks)
    parts = targets.split()
    assert [part.counts for part in parts] == [(n,) for n in counts]
    joined = Targets.cat(parts)
    assert joined.counts == counts
    assert torch.equal(joined.labels, targets.labels) and torch.equal(joined.boxes, targets.boxes)
    assert joined.masks is None if targets.masks is None else torch.equal(joined.masks, targets.masks)  # type: ignore[arg-type]


def test_folded_targets_are_those_of_more_images() -> None:
    targets = targets_of((2, 0, 1), masks=True)
    folded = targets.repeat_batch(2)
    assert folded.counts == (2, 0, 1, 2, 0, 1)
    assert folded.image.tolist() == [0, 0, 2, 3, 3, 5]
    assert folded.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert folded.masks is not None and folded.masks.shape == (6, 2, 2)


def test_totals_of_a_step() -> None:
    batch = make_batch((2, 5))
    assert batch.global_totals == Totals(objects=7, most_objects=5, images=2)
    assert replace(batch, totals=Totals(20, 9, 8)).global_totals == Totals(20, 9, 8)
    assert Totals(0, 0, 2).normaliser == 1.0  # the clamp acts on the step's sum
    assert Totals(7, 5, 2).normaliser == 7.0


def test_stages_fold_and_slice() -> None:
    logits, boxes = torch.rand(3, 2, 4, 5), torch.rand(3, 2, 4, 4)
    stages = Stages(logits, boxes, content=torch.rand(3, 2, 4, 8), valid=torch.ones(2, 4, dtype=torch.bool))
    flat_logits, flat_boxes = stages.flat
    assert torch.equal(flat_logits[1 * 2 + 1], logits[1, 1]) and torch.equal(flat_boxes[2 * 2], boxes[2, 0])
    last = stages[-1:]
    assert torch.equal(last.logits, logits[-1:]) and last.content is not None and len(last.content) == 1
    assert last.reference is None and last.valid is stages.valid


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
