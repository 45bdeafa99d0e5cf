"""MaskDINO: equations of masks against slow twins and by hand, what a step draws and holds, levels of its files, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.start import Start
from steadydetr.data import FixedSize, LargeScaleJitter
from steadydetr.data.transforms import Sample, apply, seeded
from steadydetr.detectors import MaskDINOConfig
from steadydetr.equations import masks as ours
from steadydetr.learning import mask_terms
from steadydetr.learning.class_terms import PositionModulatedCost, PositionTarget
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.mask_terms import MaskTerms, pairs_of_images
from steadydetr.learning.matching import solve
from steadydetr.nn.encoder import EncoderLayer, token_centres
from steadydetr.objectives import (
    AssignmentDistillation,
    AuxiliaryGroups,
    GroupMatching,
    MaskDenoising,
    Objective,
    SetPrediction,
)
from steadydetr.objectives.denoising import known_match, repeat_stages
from steadydetr.objectives.method import Method
from steadydetr.recipes import find
from steadydetr.recipes.finetuning import finetuned
from steadydetr.structures import Assignment, Batch, Losses, MaskPredictions, Match, MatchedQueries, QueryGroup, Stages, Targets
from steadydetr.tools.cost import measure_cost
from steadydetr.training.preparation import prepare
from tests.conftest import BACKBONE, CLASSES, DETECTORS, TINY, make_batch
from tests.reference import masks as slow
from tests.steps import assert_parts_sum_to_the_whole

CONFIG = MaskDINOConfig(replace(BACKBONE, fine_map=True), TINY, queries=12)
TERMS = MaskTerms(points=16)
CRITERION = Criterion(cost_weights=Weights(4.0, 5.0, 2.0), loss_weights=Weights(4.0, 5.0, 2.0), giou_eps=1e-6, masks=TERMS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def method_of(config: MaskDINOConfig = CONFIG, criterion: Criterion = CRITERION, *others: Objective) -> Method:
    torch.manual_seed(0)
    method = Method(config.build(CLASSES), criterion, (SetPrediction(), MaskDenoising(number=6), *others))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return method


def batch_of(*counts: int) -> Batch:
    return make_batch(counts, masks=True)


# equations


def test_values_between_cells_by_hand() -> None:
    """In the middle of four cells their mean; a quarter of a cell from the border three quarters of the border's cell."""
    points = torch.tensor([[[0.5, 0.5], [0.125, 0.25]]])
    cells = torch.tensor([[[1, 0], [0, 1]]], dtype=torch.uint8)
    assert ours.sample_targets(cells, torch.tensor([0]), points).tolist() == [[0.5, 0.75]]
    assert ours.sample_maps(cells[:, None].float(), points).tolist() == [[[0.5, 0.75]]]


def test_values_at_points_equal_their_twins() -> None:
    points = random(3, 7, 2) * 1.2 - 0.1  # outside too
    maps, masks, target = random(3, 1, 4, 5, seed=1), (random(2, 6, 9, seed=2) > 0.5).byte(), torch.tensor([1, 0, 1])
    found, labels = ours.sample_maps(maps, points)[:, 0], ours.sample_targets(masks, target, points)
    for i in range(3):
        for k in range(7):
            point = points[i, k].tolist()
            assert float(found[i, k]) == pytest.approx(slow.value_at(maps[i, 0].tolist(), point))
            assert float(labels[i, k]) == pytest.approx(slow.value_at(masks[target[i]].tolist(), point))


def test_losses_and_costs_of_masks_equal_their_twins() -> None:
    logits, labels = random(4, 9) * 6 - 3, random(3, 9, seed=1)
    cross_entropy, dice = ours.mask_costs(logits, labels)
    for i in range(3):
        paired = ours.mask_losses(logits, labels[i].expand(4, -1))
        for k in range(4):
            expected = slow.losses(logits[k].tolist(), labels[i].tolist())
            assert (float(cross_entropy[i, k]), float(dice[i, k])) == pytest.approx(expected)
            assert (float(paired[0][k]), float(paired[1][k])) == pytest.approx(expected)


def test_losses_of_a_mask_by_hand() -> None:
    """Scores of a half at four points, two of them inside: ln 2, and 1 - (2 + 1) / (2 + 2 + 1)."""
    cross_entropy, dice = ours.mask_losses(torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert float(cross_entropy) == pytest.approx(0.693147, abs=1e-6) and float(dice) == pytest.approx(0.4)


@pytest.mark.parametrize("closed", [False, True])
def test_boxes_of_masks_equal_their_twin(closed: bool) -> None:
    masks = random(2, 6, 5, 7) > 0.9
    masks[1, 2] = False
    found = ours.boxes_of_masks(masks, closed)
    assert found.tolist() == [[slow.box(mask.tolist(), closed) for mask in image] for image in masks]
    assert masks.any((-1, -2)).sum() > 6


def test_the_least_certain_points_are_taken() -> None:
    points = torch.arange(8.0).view(1, 4, 2)
    chosen = ours.uncertain_points(points, torch.tensor([[-5.0, 0.1, 3.0, -0.2]]), 2)
    assert sorted(chosen[0, :, 0].tolist()) == [2.0, 6.0]


# the terms of a criterion


def stages_with_masks(stages: int, counts: tuple[int, ...], queries: int = 6, seed: int = 0) -> tuple[Stages, Targets]:
    """Random predictions in float64, and targets with masks of 32 x 32 pixels."""
    images, objects = len(counts), sum(counts)
    vectors, pixels = random(stages, images, queries, 4, seed=seed) - 0.5, random(images, 4, 8, 8, seed=seed + 1) - 0.5
    boxes = random(stages, images, queries, 4, seed=seed + 2) * 0.4 + 0.2
    logits = random(stages, images, queries, CLASSES, seed=seed + 3) * 4 - 2
    masks = (random(objects, 32, 32, seed=seed + 4) > 0.6).byte()
    labels, wanted = torch.arange(objects) % CLASSES, random(objects, 4, seed=seed + 5) * 0.4 + 0.2
    targets = Targets(labels, wanted, counts, masks, tuple(range(7, 7 + images)))
    return Stages(logits, boxes, masks=MaskPredictions(vectors.requires_grad_(), pixels.requires_grad_())), targets


def every_mask(stages: Stages) -> Tensor:
    """[S, B, N, h, w]: what is never made in a step."""
    assert stages.masks is not None
    return torch.einsum("sbnd,bdhw->sbnhw", stages.masks.queries, stages.masks.pixels)


def test_the_cost_of_masks_equals_loops_over_all_of_them() -> None:
    stages, targets = stages_with_masks(2, (2, 0, 3))
    assert stages.masks is not None and targets.masks is not None
    cost, masks, row = TERMS.cost(stages.masks, targets, "main"), every_mask(stages).detach(), 0
    for stage in range(2):
        for image, count in enumerate(targets.counts):
            drawn = mask_terms.random_points((2, TERMS.points, 2), torch.device("cpu"), targets.seeds[image], "main", "cost")
            for target in range(sum(targets.counts[:image]), sum(targets.counts[:image]) + count):
                points = drawn[stage].tolist()
                labels = [slow.value_at(targets.masks[target].tolist(), point) for point in points]
                for query in range(6):
                    logits = [slow.value_at(masks[stage, image, query].tolist(), point) for point in points]
                    expected = 5 * sum(slow.losses(logits, labels))
                    assert float(cost[row, query].detach()) == pytest.approx(expected, rel=1e-5)
                row += 1
    assert row == len(cost)


def test_losses_of_masks_and_their_gradients_equal_those_of_all_masks_at_once() -> None:
    """Nothing is kept for the backward pass, in which they are computed again at the same points."""
    stages, targets = stages_with_masks(2, (2, 0, 3))
    assert stages.masks is not None and targets.masks is not None
    match = Match(torch.tensor([0, 5, 2, 3, 5]), torch.tensor([4, 1, 0, 3, 2]), torch.tensor([1, 8, 3, 5, 7]))
    found = TERMS.losses(stages.masks, targets, match, "main")
    drawn: dict[int, Tensor] = {}
    with torch.no_grad():
        for image, pairs in ((0, [0, 3]), (2, [1, 2, 4])):
            logits = every_mask(stages)[match.image[pairs] // 3, image, match.query[pairs]]
            points = TERMS._points(logits, (targets.seeds[image], "main", 0))
            drawn |= dict(zip(pairs, points.double(), strict=True))
    points = torch.stack([drawn[pair] for pair in range(5)])
    chosen = every_mask(stages)[match.image // 3, match.image % 3, match.query]
    expected = ours.mask_losses(
        ours.sample_maps(chosen[:, None], points)[:, 0], ours.sample_targets(targets.masks, match.target % 5, points)
    )
    vectors = (stages.masks.queries, stages.masks.pixels)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        for x, y in zip(
            torch.autograd.grad(a.sum(), vectors, retain_graph=True), torch.autograd.grad(b.sum(), vectors, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(x, y)


def test_pairs_weigh_masks_as_they_weigh_boxes() -> None:
    stages, targets = stages_with_masks(1, (2, 1))
    match = solve([CRITERION.problem(stages, targets, "main")])[0].match
    losses = {}
    for name, weight in (("plain", None), ("weighed", torch.tensor([2.0, 0.0, 0.0]))):
        losses[name] = Losses()
        CRITERION.add_losses(losses[name], "main", stages, Assignment.of(replace(match, weight=weight)), targets, 1.0)
    only = Losses()
    first = Match(match.image[:1], match.query[:1], match.target[:1])
    one = Targets(targets.labels[:1], targets.boxes[:1], (1, 0), targets.masks[:1], targets.seeds)  # type: ignore[index]
    CRITERION.add_losses(only, "main", stages, Assignment.of(first), one, 1.0)
    assert {name for name, _, _ in only} == {f"main/{term}" for term in ("class", "l1", "giou", "mask", "dice")}
    assert float(losses["weighed"]["main/l1"]) == pytest.approx(2 * float(only["main/l1"]))
    assert 0 < losses["weighed"]["main/dice"] < losses["plain"]["main/dice"] * 2
    assert {name: weight for name, _, weight in only} | {"main/mask": 5.0, "main/dice": 5.0} == {name: weight for name, _, weight in only}


def test_the_cost_without_masks_is_what_it_was() -> None:
    stages, targets = stages_with_masks(2, (2, 1))
    plain = replace(CRITERION, masks=None)
    both = plain.problem(stages, targets, "main").cost
    assert torch.equal(plain.problem(replace(stages, masks=None), replace(targets, masks=None, seeds=()), "main").cost, both)
    assert plain.matcher == (plain.class_cost, plain.cost_weights, plain.giou_eps) and CRITERION.matcher[-1] == TERMS


def test_the_host_knows_how_many_pairs_an_image_has() -> None:
    """Of solved matches and of denoising; of tables it has to ask the device."""
    stages, targets = stages_with_masks(2, (2, 0, 3))
    match = solve([CRITERION.problem(stages, targets, "main")])[0].match
    known = repeat_stages(known_match(targets, 2, 3, 1), stages, 5)
    table = MatchedQueries.of(match, targets, 2).pairs()
    assert match.counts == (2, 0, 3, 2, 0, 3) and known.counts == (4, 0, 6, 4, 0, 6)
    assert table.counts is None and Match.cat((match, known)).counts == (6, 0, 9, 6, 0, 9)
    assert pairs_of_images(match, 3) == pairs_of_images(table, 3) == [4, 0, 6]


# a step


def test_parts_sum_to_the_whole() -> None:
    """Points are drawn for an image and a step, on whatever rank and with whatever neighbours it is."""
    assert_parts_sum_to_the_whole(method_of().double().eval(), masks=True)


def test_points_are_new_at_every_step() -> None:
    method, batch = method_of().eval(), batch_of(2, 3)
    with torch.no_grad():
        first, again, later = (method(replace(batch, step=step)) for step in (1, 1, 2))
    assert torch.equal(first["main/dice"], again["main/dice"]) and not torch.equal(first["main/dice"], later["main/dice"])


@pytest.mark.parametrize("counts", [(2, 3), (0, 0), (0, 4), (15,)])
@pytest.mark.parametrize("stable", [False, True])
def test_every_parameter_gets_a_gradient(counts: tuple[int, ...], stable: bool) -> None:
    """Without objects too, and with more objects than queries; with the loss, cost and fusion of Stable-DINO."""
    criterion, config = CRITERION, CONFIG
    if stable:
        criterion = replace(criterion, class_target=PositionTarget(rescale="one"), class_cost=PositionModulatedCost())
        config = replace(config, transformer=replace(TINY, fusion="dense"))
    method = method_of(config, criterion)
    losses = method(batch_of(*counts))
    losses.total.backward()
    assert losses.total.isfinite() and not [n for n, p in method.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that an operation makes; a view of another tensor is not made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        made = [t for t in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *(t.numel() for t in made if t.untyped_storage().data_ptr() not in given)])
        return found


def test_no_tensor_of_a_cost_is_larger_than_the_costs() -> None:
    """A mask has 64 cells, a hundred queries and four stages two images of them."""
    stages, targets = stages_with_masks(4, (6, 5), queries=100)
    assert stages.masks is not None
    with Largest() as largest:
        cost = TERMS.cost(stages.masks, targets, "main")
    assert largest.numbers == cost.numel() == 4 * 11 * 100


def test_the_loss_never_holds_the_masks_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forwards nor backwards: nothing is larger than the vectors of the pixels, which get a gradient."""
    monkeypatch.setattr(mask_terms, "CHUNK", 2)
    stages, targets = stages_with_masks(4, (6, 5))
    match = solve([CRITERION.problem(stages, targets, "main")])[0].match
    assert stages.masks is not None
    with Largest() as largest:
        cross_entropy, dice = TERMS.losses(stages.masks, targets, match, "main")
        (cross_entropy + dice).sum().backward()
    assert largest.numbers == stages.masks.pixels.numel() == 512 < 4 * 5 * 64


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_a_step_in_other_precisions(precision: str) -> None:
    method, batch = method_of(), batch_of(2, 3)
    exact = method(batch)
    if precision == "float64":
        other = method.double()(batch)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other = method(batch)
    assert other["main/mask"].dtype == (torch.float64 if precision == "float64" else torch.float32)
    assert float(other.total.detach()) == pytest.approx(float(exact.total.detach()), rel=0.1)


def test_autocast_makes_no_mask_and_no_cost_coarser() -> None:
    """Of the same vectors: sums over all points in bfloat16 would keep three digits."""
    stages, targets = stages_with_masks(4, (6, 5))
    match = solve([CRITERION.problem(stages, targets, "main")])[0].match
    assert stages.masks is not None
    masks = replace(stages.masks, queries=stages.masks.queries.float() * 4, pixels=stages.masks.pixels.float())
    exact = TERMS.cost(masks, targets, "main"), *TERMS.losses(masks, targets, match, "main")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = TERMS.cost(masks, targets, "main"), *TERMS.losses(masks, targets, match, "main")
    assert all(torch.equal(one, other) for one, other in zip(exact, found, strict=True))


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for on in (False, True):
        method = method_of(replace(CONFIG, transformer=replace(TINY, checkpointing=on)))
        method(batch_of(2, 3)).total.backward()
        gradients.append([p.grad for p in method.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]


def test_groups_of_queries_learn_masks() -> None:
    """Those of Group-DETR, their proposals, and denoising; of what a teacher gives, auxiliary groups and its queries."""
    method = method_of(CONFIG, CRITERION, GroupMatching(groups=3))
    losses = method(batch_of(2, 0, 3))
    losses.total.backward()
    found = {name.removesuffix("/mask") for name, _, _ in losses if name.endswith("/mask")}
    assert found == {"main", "proposals", "denoising", "groups", "groups/proposals"}
    assert not [name for name, p in method.named_parameters() if p.grad is None]


def test_what_a_teacher_gives_learns_masks() -> None:
    recipe = find("small-maskdino")
    online = find("small-od-dino")
    objectives = (SetPrediction(), AuxiliaryGroups(), AssignmentDistillation("ema"))
    shrunk = CONFIG.changed(box_init="mask2box")
    method = replace(recipe, detector=shrunk, objectives=objectives, teachers=online.teachers, criterion=CRITERION).build(CLASSES, 10)
    losses = method(batch_of(2, 0, 3))
    losses.total.backward()
    assert {name.removesuffix("/dice") for name, _, _ in losses if name.endswith("/dice")} == {
        "main",
        "proposals",
        "auxiliary",
        "assignment",
    }


def test_the_weight_of_an_objective_is_one_of_its_masks_too() -> None:
    stages, targets = stages_with_masks(1, (2, 1))
    match = solve([CRITERION.problem(stages, targets, "main")])[0].match
    losses = Losses()
    CRITERION.add_losses(losses, "main", stages, Assignment.of(match), targets, 1.0, factor=0.5)
    assert [weight for _, _, weight in losses] == [2.0, 2.5, 1.0, 2.5, 2.5]


# the detector


def test_boxes_start_around_masks() -> None:
    """The first stage is what enters the decoder: boxes of the masks of its queries, and within the image where there is padding."""
    torch.manual_seed(0)
    detector, batch = replace(CONFIG, box_init="bitmask").build(CLASSES).eval(), make_batch((1, 1))
    with torch.no_grad():
        memory = detector.encode(batch.images, batch.padding)
        queries = detector.queries(memory)["main"]
        proposals = detector.proposals(memory, queries)
        stages = detector.decode(memory, [QueryGroup("main", queries)])["main"]
    masks = proposals.masks.of(torch.arange(12).expand(2, -1)) > 0
    assert masks.shape == (2, 12, 16, 16) and stages.logits.shape[0] == detector.stages == 3
    masks[1, :, :, 12:] = False  # padding
    for image, width in ((0, 16), (1, 12)):
        for query in range(12):
            x1, y1, x2, y2 = slow.box(masks[image, query].tolist(), closed=False)
            expected = [(x1 + x2) / 2 / width, (y1 + y2) / 32, (x2 - x1) / width, (y2 - y1) / 16]
            assert stages.boxes[0, image, query].tolist() == pytest.approx(expected, abs=2e-5)


def test_kept_classes_are_scored_and_proposals_chosen_as_before() -> None:
    torch.manual_seed(0)
    detector, batch = CONFIG.build(CLASSES).eval(), make_batch((1, 1))
    with torch.no_grad():
        before, token = detector(batch.images, batch.padding), detector.queries(detector.encode(batch.images, batch.padding))["main"].token
        detector.keep_classes([3, 1])
        after, same = detector(batch.images, batch.padding), detector.queries(detector.encode(batch.images, batch.padding))["main"].token
    assert torch.equal(token, same) and detector.num_classes == 2
    torch.testing.assert_close(after.logits, before.logits[..., [3, 1]])


@pytest.mark.parametrize("coarse_first", [True, False])
def test_levels_of_a_file_come_into_our_order(coarse_first: bool) -> None:
    """A layer with the tensors of a file, fed with levels in the file's order, gives what ours gives in our order."""
    config = replace(CONFIG, coarse_anchors_first=coarse_first)
    levels, part = ((4, 6), (2, 3), (1, 2)), "decoder" if coarse_first else "encoder"
    official, own = (EncoderLayer(16, 2, 3, 2, 16, 0.0).double() for _ in range(2))
    with torch.no_grad():
        for parameter in official.parameters():
            parameter.normal_(0, 0.3)
    state = {f"{part}.layers.0.{name}": value for name, value in official.state_dict().items()}
    moved = config.rearranged(state)
    own.load_state_dict({name.removeprefix(f"{part}.layers.0."): value for name, value in moved.items()})
    tokens, position = random(1, 32, 16), random(1, 32, 16, seed=1)
    results = []
    for layer, order in ((own, levels), (official, levels[::-1])):
        x, y = (in_order(t, levels, order) for t in (tokens, position))
        reference = token_centres(order, torch.ones(1, 3, 2)).double()
        results.append(in_order(layer(x, y, reference, torch.zeros(1, 32, dtype=torch.bool), order), order, levels))
    torch.testing.assert_close(*results)


def in_order(tokens: Tensor, now: Any, wanted: Any) -> Tensor:
    parts = dict(zip(now, tokens.split([h * w for h, w in now], 1), strict=True))
    return torch.cat([parts[size] for size in wanted], 1)


def test_the_neck_of_a_file_comes_into_our_order() -> None:
    """Coarse to fine in files of `high2low`, further levels last; the embedding of a level goes with it."""
    state = {
        f"neck.convs.{i}.weight": torch.zeros(1, channels, side, side) for i, (channels, side) in enumerate([(24, 1), (16, 1), (24, 3)])
    }
    moved = replace(CONFIG, coarse_anchors_first=False).rearranged(state | {"level_embed": torch.arange(3.0)[:, None]})
    assert [moved[f"neck.convs.{i}.weight"].shape[1:3] for i in range(3)] == [(16, 1), (24, 1), (24, 3)]
    assert moved["level_embed"].flatten().tolist() == [2.0, 1.0, 0.0]


# recipes, commands and refusals


def test_parameters_are_those_of_the_official_model() -> None:
    with torch.device("meta"):
        detector = find("maskdino-r50-50ep").detector.without_pretrained().build(80)
    assert sum(p.numel() for p in detector.parameters()) == 52_058_004


@pytest.mark.parametrize("name", ["small-maskdino", "small-stable-maskdino"])
def test_cost_of_the_small_recipes(name: str) -> None:
    found = measure_cost(find(name), size=(128, 128))
    assert found.step > found.forward > found.student.inference > 0


def test_masks_of_a_detector_without_any_are_refused() -> None:
    with pytest.raises(ValueError, match=r"criterion\.masks needs a detector that predicts masks, as DINO does not"):
        Method(DETECTORS["dino"].build(CLASSES), CRITERION, (SetPrediction(),))


def test_masks_that_nothing_trains_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start from its masks, which nothing trains.*--detector\.box-init no"):
        Method(CONFIG.build(CLASSES), replace(CRITERION, masks=None), (SetPrediction(),))
    method = Method(DETECTORS["maskdino"].build(CLASSES), replace(CRITERION, masks=None), (SetPrediction(),))
    method(make_batch((2, 1))).total.backward()
    assert [f"student.{name}" for name in method.student.mask_parameters] == [
        n for n in method.unused_parameters if "label_content" not in n
    ]


def test_data_without_masks_are_refused(tmp_path: Any) -> None:
    recipe = find("small-maskdino")
    with pytest.raises(ValueError, match=r"data\.masks = False leaves unread: --data\.masks, or"):
        prepare(replace(recipe, data=replace(recipe.data, masks=False)), tmp_path / "run", False, "cpu")
    with pytest.raises(ValueError, match=r"--data\.masks, or"):
        method_of()(make_batch((2, 1)))


def test_without_masks_queries_are_matched_by_class_and_boxes() -> None:
    """Measures run on data that were read without them (D-197)."""
    stages, targets = stages_with_masks(2, (2, 1))
    unread, plain = replace(targets, masks=None, seeds=()), replace(CRITERION, masks=None)
    assert torch.equal(CRITERION.problem(stages, unread, "main").cost, plain.problem(stages, targets, "main").cost)


@pytest.mark.parametrize("method", [None, "stable", "od"])
def test_fine_tuning_learns_masks(method: Any) -> None:
    card = DetectorCard(find("maskdino-r50-50ep").detector, ("a",), (1,), FixedSize(64, 64))
    recipe = finetuned(card, Start("w"), 100, method)
    assert recipe.data.masks and recipe.criterion.masks == MaskTerms()
    assert "denoising" in [objective.name for objective in recipe.objectives]
    assert not finetuned(replace(card, detector=DETECTORS["dino"]), Start("w"), 100, method).data.masks


def test_large_scale_jitter_scales_and_crops() -> None:
    """Scales of 0.1 to 2 of what fits into the square; what is larger is cropped to it, what is smaller stays as it is."""
    transform = LargeScaleJitter(side=64)
    sample = Sample(torch.zeros(3, 40, 80, dtype=torch.uint8), torch.tensor([[10.0, 10.0, 30.0, 20.0]]), torch.tensor([1]))
    sizes, ratios = [], []
    for seed in range(40):
        with seeded(seed):
            found = apply(transform.build(), sample)
        sizes.append(tuple(found.image.shape[-2:]))
        if len(found.boxes_xyxy) and max(sizes[-1]) < 64:
            w, h = (found.boxes_xyxy[0, 2:] - found.boxes_xyxy[0, :2]).tolist()
            ratios.append(w / h)
    assert max(max(size) for size in sizes) == 64 and min(max(size) for size in sizes) < 16
    assert len(set(sizes)) > 20 and ratios and ratios == pytest.approx([2.0] * len(ratios), rel=0.2)
    thin = replace(sample, image=torch.zeros(3, 1, 400, dtype=torch.uint8), boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0))
    assert apply(transform.build(), thin).image.shape[-2] == 1
    assert LargeScaleJitter().largest_scale(torch.tensor([[512, 1024]]).numpy()).tolist() == [[2.0, 2.0]]
