"""Contrastive denoising: its noise and layout against the slow twin, its padding, its independence of how images are dealt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steadydetr.boxes import inverse_sigmoid, to_xyxy
from steadydetr.detectors import DINO
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.objectives import Denoising, DenoisingObjective, DNDenoising, Objective, SetPrediction
from steadydetr.objectives.denoising import (
    Draws,
    denoising_groups,
    draw_noise,
    known_match,
    label_queries,
    noise_boxes,
    noise_labels,
    noised_queries,
    repeat_stages,
)
from steadydetr.objectives.method import Method
from steadydetr.structures import Targets, Totals
from tests.conftest import CLASSES, DETECTORS, make_batch, make_method, make_stages, part_of
from tests.reference.denoising import denoising_rows
from tests.steps import assert_close, assert_parts_sum_to_the_whole, terms, wide

COUNTS = [(2, 0, 3), (0, 0), (1,), (3, 3)]


def dino() -> DINO:
    detector = make_method(DETECTORS["dino"]).student
    assert isinstance(detector, DINO)
    return detector


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("spare", [0, 2])  # another rank's image has more objects than any of this batch
def test_queries_equal_their_twin(counts: tuple[int, ...], spare: int) -> None:
    batch, detector, groups, most = make_batch(counts), dino(), 2, max(counts) + spare
    targets, draws = batch.targets, draw_noise(batch, groups, CLASSES)
    labels, boxes = noise_labels(targets.labels, draws, 0.9), noise_boxes(targets.boxes, draws, 0.4)
    queries = noised_queries(detector.embed, targets, labels, boxes, most)
    expected = denoising_rows(counts, targets.labels, targets.boxes, draws, 0.9, 0.4, most)
    assert queries.valid is not None and queries.content.shape[1] == max(2 * groups * most, 1)
    for image in range(len(counts)):
        for row in range(queries.content.shape[1]):
            wanted = expected.get((image, row))
            assert bool(queries.valid[image, row]) == (wanted is not None)
            if wanted is None:
                assert not queries.content[image, row].any()
                continue
            assert torch.equal(queries.content[image, row], detector.label_content.weight[wanted.label])
            box = inverse_sigmoid(torch.tensor(wanted.box), detector.eps).sigmoid()
            torch.testing.assert_close(queries.reference[image, row], box, rtol=0, atol=1e-6)
    match = known_match(targets, groups, most)
    pairs = sorted(zip(match.image.tolist(), match.query.tolist(), match.target.tolist(), strict=True))
    assert pairs == sorted((image, row, r.target) for (image, row), r in expected.items() if r.target is not None)


def test_match_of_every_stage() -> None:
    targets, stages = make_batch((2, 0, 1)).targets, make_stages(3, 3, 12)
    match = known_match(targets, 2, 2)
    folded = repeat_stages(match, stages, 3)
    for s in range(3):
        rows = slice(s * 6, s * 6 + 6)
        assert torch.equal(folded.image[rows] - 3 * s, match.image)
        assert torch.equal(folded.query[rows], match.query)
        assert torch.equal(folded.target[rows] - 3 * s, match.target)


@pytest.mark.parametrize(
    ("number", "most", "groups"), [(100, 7, 14), (100, 100, 1), (100, 101, 1), (5, 8, 1), (100, 1, 100), (100, 0, 100)]
)
def test_denoising_groups(number: int, most: int, groups: int) -> None:
    assert denoising_groups(number, most) == groups


def test_noise_by_hand() -> None:
    box = torch.tensor([[0.5, 0.5, 0.4, 0.2]])
    draws = Draws(
        keep_label=torch.tensor([[0.24], [0.26]]),
        new_label=torch.tensor([[3], [3]]),
        sign=torch.tensor([[[1.0, -1, 1, -1]]]).repeat(2, 1, 1),
        part=torch.full((2, 1, 4), 0.5),
    )
    assert noise_labels(torch.tensor([1]), draws, 0.5).tolist() == [[3], [1]]  # redrawn below half the ratio
    positive, negative = noise_boxes(box, draws, 0.5)[:, 0]
    # half sides .2 and .1, moved by .5 * .5 of them: x0 .3 + .05, y0 .4 - .025, x1 .7 + .05, y1 .6 - .025
    torch.testing.assert_close(positive, torch.tensor([0.55, 0.475, 0.4, 0.2]))
    # by 1.5 * .5 of them: x0 .3 + .15, y0 .4 - .075, x1 .7 + .15, y1 .6 - .075
    torch.testing.assert_close(negative, torch.tensor([0.65, 0.425, 0.4, 0.2]))


def test_noise_stays_within_its_bounds() -> None:
    batch = make_batch((40,))
    boxes, draws = batch.targets.boxes, draw_noise(batch, 3, CLASSES)
    half = boxes[:, 2:].repeat(1, 2) / 2
    assert ((draws.part >= 0) & (draws.part < 1)).all() and set(draws.sign.unique().tolist()) == {-1.0, 1.0}
    assert draws.new_label.min() == 0 and draws.new_label.max() == CLASSES - 1
    moved = (to_xyxy(noise_boxes(boxes, draws, 0.4)) - to_xyxy(boxes)).abs() / half
    inside = (to_xyxy(boxes) > 0.2 * half + 0.2).all(-1) & (to_xyxy(boxes) < 0.8).all(-1)
    assert (moved[0::2] <= 0.4 + 1e-5).all()  # positives
    assert (moved[1::2] <= 0.8 + 1e-5).all() and (moved[1::2][:, inside] >= 0.4 - 1e-5).all()  # negatives, where nothing is clamped
    wild = to_xyxy(noise_boxes(boxes, draws, 9.0))
    assert (wild >= -1e-6).all() and (wild <= 1 + 1e-6).all()


def test_noise_does_not_depend_on_how_images_are_dealt() -> None:
    """Same seed, step and image id: same noise, in whatever company and order."""
    whole = replace(make_batch((2, 1, 0, 3)), step=5, seed=1)
    draws = draw_noise(whole, 2, CLASSES)
    columns = [slice(0, 2), slice(2, 3), slice(3, 3), slice(3, 6)]
    for images in ([0, 1], [2, 3], [3, 0], [1]):
        part = draw_noise(part_of(whole, images), 2, CLASSES)
        for name in ("keep_label", "new_label", "sign", "part"):
            expected = torch.cat([getattr(draws, name)[:, columns[image]] for image in images], 1)
            assert torch.equal(getattr(part, name), expected)
    for other in (replace(whole, step=6), replace(whole, seed=2), replace(whole, image_ids=(7, 8, 9, 10))):
        assert not torch.equal(draw_noise(other, 2, CLASSES).part, draws.part)


def test_noise_does_not_touch_the_global_generator() -> None:
    state = torch.get_rng_state()
    draw_noise(make_batch((2, 3)), 2, CLASSES)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_group_sees_main_and_nothing_else() -> None:
    detector, batch = dino(), make_batch((1, 3))
    group = Denoising(number=6).query_groups(StepContext.of(batch, detector, Criterion(), {}))[0]
    assert group.sees == ("main",) and group.blocks is not None
    assert group.blocks.tolist() == [block for block in range(2) for _ in range(6)]  # 2 groups of 3 positives and 3 negatives


@pytest.mark.parametrize(("counts", "differ"), [((1, 4), True), ((3, 3), False)])
def test_padding_is_masked_or_counts_as_background(counts: tuple[int, ...], differ: bool) -> None:
    """D-05: the two differ where images have different numbers of objects, and only there."""
    detector = dino().eval()
    masked, original = (
        Method(detector, Criterion(), (SetPrediction(), Denoising(number=4, mask_padding=mask)))(make_batch(counts))
        for mask in (True, False)
    )
    assert torch.allclose(masked["denoising/class"], original["denoising/class"], atol=1e-6) != differ
    torch.testing.assert_close(masked["main/class"], original["main/class"])


@pytest.mark.parametrize("mask", [True, False])
def test_no_objects_no_denoising_loss(mask: bool) -> None:
    """D-07: one invalid row, whatever happens to padding otherwise."""
    losses = Method(dino(), Criterion(), (SetPrediction(), Denoising(mask_padding=mask)))(make_batch((0, 0)))
    for kind in ("class", "l1", "giou"):
        assert not losses[f"denoising/{kind}"].any()


def test_images_without_objects_on_this_rank_only() -> None:
    """The step's totals decide on groups and rows, so that the ranks agree; here all rows are invalid."""
    method = make_method(DETECTORS["dino"])
    losses = method(replace(make_batch((0, 0)), totals=Totals(objects=6, most_objects=4, images=4)))
    assert not losses["denoising/class"].any() and losses["main/class"].all()
    losses.total.backward()
    assert not [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]


def test_loss_of_an_image_does_not_depend_on_its_company() -> None:
    """Masked padding: with the groups of a fuller step, an image's own denoising loss stays what it was."""
    detector, criterion = dino().double().eval(), Criterion()
    batch = replace(make_batch((2,)), totals=Totals(2, 2, 1))
    batch = replace(batch, images=batch.images.double(), targets=replace(batch.targets, boxes=batch.targets.boxes.double()))
    alone = Method(detector, criterion, (SetPrediction(), Denoising(number=2)))(batch)
    crowded = Method(detector, criterion, (SetPrediction(), Denoising(number=5)))(replace(batch, totals=Totals(2, 5, 2)))
    for kind in ("class", "l1", "giou"):  # one group both times
        torch.testing.assert_close(alone[f"denoising/{kind}"], crowded[f"denoising/{kind}"])


def test_weights_of_its_own() -> None:
    objectives = (SetPrediction(), Denoising(number=4, weights=Weights(1.5, 2.5, 3.5)))
    losses = Method(dino(), Criterion(), objectives)(make_batch((2, 1)))
    weights = {name: weight for name, _, weight in losses}
    assert [weights[f"denoising/{kind}"] for kind in ("class", "l1", "giou")] == [1.5, 2.5, 3.5]
    assert [weights[f"main/{kind}"] for kind in ("class", "l1", "giou")] == [1.0, 5.0, 2.0]


def unlabelled(name: str, *objectives: Objective) -> Method:
    torch.manual_seed(0)
    return Method(DETECTORS[name].build(CLASSES), Criterion(), (SetPrediction(), *objectives)).double().eval()


UNLABELLED = [name for name, config in DETECTORS.items() if not config.build(CLASSES).embeds_labels]


@pytest.mark.parametrize("objective", [Denoising(number=4), DNDenoising(groups=2)])
@pytest.mark.parametrize("name", UNLABELLED)
def test_a_detector_without_labels_gets_layers_for_denoising(name: str, objective: DenoisingObjective) -> None:
    """They are trained, and no part of the detector; what it learns of its own queries stays what it is, whoever denoises."""
    method, batch = unlabelled(name, objective), wide(make_batch((2, 0, 3)))
    plain = unlabelled(name)
    assert method.student.state_dict().keys() == plain.student.state_dict().keys()
    losses, expected = method(batch), Method(method.student, Criterion(), (SetPrediction(),)).double().eval()(batch)
    assert_close({key: value for key, value in terms(losses).items() if not key.startswith("denoising/")}, terms(expected))
    layers = dict(method.adapters["denoising"].named_parameters())
    found = torch.autograd.grad(sum(v.sum() for k, v in terms(losses).items() if k.startswith("denoising/")), list(layers.values()))
    assert "content.weight" in layers and all(gradient.isfinite().all() and gradient.any() for gradient in found)
    if name in ("refine", "conditional"):
        assert_parts_sum_to_the_whole(method)


@pytest.mark.parametrize("name", UNLABELLED)
def test_queries_of_labels_and_boxes(name: str) -> None:
    """Content of the label; the box, or its centre alone, as reference; a position vector, where it needs one, of the whole box."""
    student = DETECTORS[name].build(CLASSES)
    layers, boxes = Denoising().prepare(student, {}), torch.rand(2, 3, 4) * 0.2 + 0.4
    assert layers is not None
    labels = torch.tensor([[0, 1, 2], [2, 1, 0]])
    found = label_queries(student, layers, labels, boxes)
    assert torch.equal(found.content, layers.content.weight[labels]) and torch.equal(found.reference, boxes)
    assert found.sized == student.takes_boxes and (found.position is None) == (not student.positioned)
    if found.position is not None:
        wider = label_queries(student, layers, labels, boxes * torch.tensor([1, 1, 1.5, 1]))
        assert wider.position is not None and (wider.position != found.position).any(-1).all()
    if name == "two-stage":  # its own layer, which makes position vectors of proposals
        memory = student.encode(torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
        own = student.queries(memory)["main"]
        again = label_queries(student, layers, torch.zeros(2, 12, dtype=torch.int64), own.reference)
        assert own.position is not None and torch.equal(again.position, own.position) and layers.position is None


def test_places_of_objects() -> None:
    targets = Targets(torch.tensor([0, 1, 2]), torch.rand(3, 4), (1, 0, 2))
    match = known_match(targets, groups=2, most=3)
    # group 0: positives in rows 0..2, negatives in 3..5; group 1: rows 6..8 and 9..11
    assert match.image.tolist() == [0, 2, 2, 0, 2, 2]
    assert match.query.tolist() == [0, 0, 1, 6, 6, 7]
    assert match.target.tolist() == [0, 1, 2, 0, 1, 2]
