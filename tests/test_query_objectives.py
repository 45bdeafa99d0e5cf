"""Hybrid matching, groups of queries and the denoising of DN-DETR: against slow twins, and what they leave as it is."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from steadydetr.boxes import inverse_sigmoid
from steadydetr.config import from_plain, to_plain
from steadydetr.detectors import DeformableDETRConfig, DetectorConfig, DNDABDeformableDETRConfig, HDeformableDETRConfig
from steadydetr.detectors.configs.deformable import with_transformer
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion, Weights
from steadydetr.learning.matching import Problem, solve
from steadydetr.nn.named_tensors import NamedTensors, Untraced
from steadydetr.objectives import Denoising, DNDenoising, GroupMatching, Objective, OneToMany, SetPrediction
from steadydetr.objectives.denoising import Draws, draw_noise, known_match, noise_centres_and_sides, noise_labels, noised_queries
from steadydetr.objectives.group_matching import fold
from steadydetr.objectives.method import Method
from steadydetr.recipes import find
from steadydetr.recipes.finetuning import finetuned, is_plain
from steadydetr.recipes.group import grouped
from steadydetr.structures import Batch, DecodedStages, Losses, Stages, Totals
from tests.conftest import CLASSES, DETECTORS, make_batch, make_method, make_stages
from tests.reference.denoising import centre_and_sides_moved, dn_denoising_rows
from tests.reference.groups import repeated_losses
from tests.reference.matching import best_assignment
from tests.steps import assert_close, assert_parts_sum_to_the_whole, gradients, terms, wide

COUNTS = [(2, 0, 1), (0, 0), (1,)]


def method_of(config: DetectorConfig, *objectives: Objective) -> Method:
    """In float64, with weights away from their special start."""
    torch.manual_seed(3)
    method = Method(config.build(CLASSES), Criterion(), (SetPrediction(), *objectives)).double()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return method


def test_a_row_that_is_to_get_several_queries() -> None:
    """As if it stood there so many times; where there are too few queries it gets fewer."""
    cost = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    match = solve([Problem(cost, (2,), queries=(2,))])[0].match
    chosen = best_assignment([cost[row].tolist() for row in (0, 0, 1, 1)])
    pairs = sorted(zip(match.target.tolist(), match.query.tolist(), strict=True))
    assert pairs == sorted([(0, chosen[0]), (0, chosen[1]), (1, chosen[2]), (1, chosen[3])])
    few = solve([Problem(cost, (0, 2, 0), queries=(4, 4, 4))])[0]
    assert len(set(few.match.query.tolist())) == 5 and set(few.match.image.tolist()) == {1} and few.cost.shape == (2, 5)


@pytest.mark.parametrize("counts", COUNTS)
def test_one_to_many_equals_its_twin(counts: tuple[int, ...]) -> None:
    """Its weight is on all terms, its divisor objects times repeats."""
    stages, batch = make_stages(2, len(counts), 5), make_batch(counts)
    targets = replace(batch.targets, boxes=batch.targets.boxes.double())
    context, objective = context_of(replace(batch, targets=targets)), OneToMany(repeats=2, weight=0.5)
    found = {"one-to-many": DecodedStages(stages.logits, stages.boxes, content=stages.boxes, reference=stages.boxes)}
    losses, problems = method_losses(objective, context, found)
    assert len(problems) == 1 and problems[0].cost.shape[0] == 2 * sum(counts)
    for s in range(2):
        sums = torch.zeros(3, dtype=torch.float64)
        for image, part in enumerate(targets.split()):
            twin = repeated_losses(
                stages.logits[s, image].tolist(), stages.boxes[s, image].tolist(), part.labels.tolist(), part.boxes.tolist(), 2
            )
            sums += torch.tensor(twin, dtype=torch.float64)
        ours = torch.stack([losses[f"one-to-many/{kind}"][s] for kind in ("class", "l1", "giou")])
        torch.testing.assert_close(ours, sums / (2 * max(sum(counts), 1)), rtol=1e-6, atol=1e-9)
    assert [weight for _, _, weight in losses] == [0.5, 2.5, 1.0]


def context_of(batch: Batch) -> StepContext:
    return StepContext(batch, None, Criterion(), None, {}, None, {}, {}, {})  # type: ignore[arg-type]


def method_losses(objective: Objective, context: StepContext, stages: dict[str, DecodedStages]) -> tuple[Losses, list[Problem]]:
    losses, problems = Losses(), objective.problems(context, stages)
    matched = {problem.name: result for problem, result in zip(problems, solve(problems), strict=True)}
    objective.add_losses(losses, context, stages, matched)
    return losses, problems


def test_the_further_queries_are_the_next_best_tokens_and_go_in_evaluation() -> None:
    method = make_method(DETECTORS["h-deformable"])
    detector, batch = method.student, make_batch((2, 3))
    memory = detector.encode(batch.images, batch.padding)
    found = detector.queries(memory)
    assert list(found) == ["main", "one-to-many"] == ["main", *detector.extra_groups]
    tokens = torch.cat([found[name].token for name in found], 1)
    assert torch.equal(tokens, memory.dense.logits[..., 0].topk(32).indices)  # type: ignore[attr-defined]
    detector.eval()
    alone = detector.queries(detector.encode(batch.images, batch.padding))
    assert list(alone) == ["main"] and alone["main"].content.shape[1] == 12
    losses = method(batch)
    assert {name.partition("/")[0] for name, _, _ in losses} == {"main", "proposals"}


def test_the_group_is_that_of_h_deformable_detr() -> None:
    """With the same parameters, a two-stage detector that gets further queries for training learns what one learns that has them itself."""
    flags = {"mixed_selection": False, "look_forward_twice": False}
    batch, hybrid = wide(make_batch((2, 0, 3))), method_of(DETECTORS["h-deformable"].changed(**flags), OneToMany(2, weight=0.5))
    plain = method_of(DETECTORS["two-stage"], OneToMany(2, queries=20, weight=0.5))
    plain.student.load_state_dict(hybrid.student.state_dict())
    found = terms(plain(batch))
    assert_close(found, terms(hybrid(batch)))
    assert "one-to-many/l1" in found and not list(plain.adapters.parameters())


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "h-deformable"])
def test_further_queries_of_every_detector(name: str) -> None:
    """As many as asked for, like its own but others; trained beside the detector, whose own queries learn the same as without."""
    method, batch = method_of(DETECTORS[name], OneToMany(2, queries=20)), wide(make_batch((2, 3)))
    alone = Method(method.student, Criterion(), (SetPrediction(),)).double()
    losses, context = method(batch), method.step_context(batch)
    assert_close({key: value for key, value in terms(losses).items() if not key.startswith("one-to-many/")}, terms(alone(batch)))
    (group,) = OneToMany(2, queries=20).query_groups(context)
    main, further = context.queries["main"], group.queries
    assert further.content.shape == (2, 20, method.student.width) and further.sized == main.sized
    assert (further.position is None) == (main.position is None) and losses["one-to-many/l1"].all()
    if main.token is None:
        assert len(list(method.adapters["one-to-many"].parameters())) > 0
    else:
        best = context.memory.dense.logits[..., 0] if "dab" not in name and "dino" not in name else context.memory.dense.logits.amax(-1)  # type: ignore[attr-defined]
        assert torch.equal(torch.cat((main.token, further.token), 1), best.topk(32).indices)  # type: ignore[list-item]
    found = gradients(method, losses.total)
    assert all(value.isfinite().all() for value in found.values())
    assert all(found[name].any() for name, _ in method.named_parameters() if name.startswith("adapters."))


def test_a_detector_with_further_queries_of_its_own_has_their_number_itself() -> None:
    with pytest.raises(ValueError, match=r"objectives.one-to-many.queries: HDeformableDETR .* --detector.one-to-many-queries"):
        method_of(DETECTORS["h-deformable"], OneToMany(queries=20))
    few = method_of(DETECTORS["dino"].changed(queries=84), OneToMany(queries=20))
    with pytest.raises(ValueError, match=r"an image of 84 tokens has none left .* detector.queries = 84"):
        few(wide(make_batch((1,))))


@pytest.mark.parametrize("flags", [{}, {"mixed_selection": False}, {"mixed_selection": False, "two_stage": False}])
def test_both_groups_of_every_variant_are_trained(flags: dict[str, bool]) -> None:
    method = make_method(DETECTORS["h-deformable"].changed(**flags))
    losses = method(make_batch((2, 3)))
    losses.total.backward()
    assert losses["one-to-many/class"].shape == (2,) and losses["one-to-many/l1"].all()
    assert not [name for name, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert {name for name in method.student.learned_queries() if "extra" in name} == {
        f"query_extra_{kind}.weight"
        for kind in ("content", "position")
        if not flags.get("two_stage", True) or (kind == "content" and not flags)
    }


def test_what_an_h_deformable_detr_cannot_be_is_said() -> None:
    for flags, message in (
        ({"two_stage": False}, "mixed_selection needs detector.two_stage"),
        ({"two_stage": False, "mixed_selection": False, "refine": False}, "look_forward_twice needs detector.refine"),
        ({"one_to_many_queries": 0}, "one_to_many_queries"),
    ):
        with pytest.raises(ValueError, match=message):
            DETECTORS["h-deformable"].changed(**flags)
    many = DETECTORS["h-deformable"].changed(queries=900)
    with pytest.raises(ValueError, match="an image of 84 tokens has none left"):
        make_method(many)(make_batch((2, 3)))
    with pytest.raises(ValueError, match="two_stage"):
        from_plain(to_plain(DETECTORS["dn-dab"]) | {"two_stage": True})


@pytest.mark.parametrize(("rows", "queries", "expected"), [(1800, 300, (300, 1500)), (2400, 300, (900, 1500)), (60, 40, (40, 20))])
def test_a_file_of_both_groups_is_divided(rows: int, queries: int, expected: tuple[int, int]) -> None:
    """Official ones have 1500 further queries; of others the number of main ones is asked for."""
    config = with_transformer(DETECTORS["h-deformable"], width=32, norm_groups=32)
    own = {name: value for name, value in config.build(CLASSES).state_dict().items() if not name.startswith("query_")}
    joint = torch.randn(rows, 32)
    tensors = NamedTensors(own | {"query_position_and_content": joint}, "original", (), Untraced(heads=2, queries=queries))
    found = HDeformableDETRConfig.from_tensors(tensors)
    assert found is not None and (found.queries, found.one_to_many_queries) == expected
    assert DeformableDETRConfig.from_tensors(tensors) is None and DNDABDeformableDETRConfig.from_tensors(tensors) is None
    divided = found.split_queries(joint)
    assert torch.equal(torch.cat([divided["query_content.weight"], divided["query_extra_content.weight"]]), joint) and len(divided) == 2
    one_stage = found.changed(two_stage=False, mixed_selection=False).split_queries(joint)
    assert torch.equal(one_stage["query_extra_position.weight"], joint[expected[0] :, :16]) and len(one_stage) == 4
    with pytest.raises(ValueError, match="learns 60 queries"):
        HDeformableDETRConfig.from_tensors(
            replace(tensors, tensors=own | {"query_position_and_content": joint[:60]}, untraced=Untraced(queries=60))
        )


def test_groups_equal_detectors_of_their_queries(detector_config: DetectorConfig) -> None:
    """Each group learns what a detector would learn that had its queries, and the shared parameters get the sum of the gradients."""
    method, batch = method_of(detector_config, GroupMatching(groups=3)), wide(make_batch((2, 0, 3)))
    losses = method(batch)
    found, own = gradients(method, losses.total), {name for name in method.student.state_dict()}
    main, total = terms(losses), dict.fromkeys(("class", "l1", "giou"), 0)
    alone = [Method(copy.deepcopy(method.student), Criterion(), (SetPrediction(),)) for _ in range(3)]
    for other, group in zip(alone[1:], method.adapters["groups"], strict=True):
        state = group.state_dict()
        assert state.keys() <= own
        other.student.load_state_dict(state, strict=False)
    apart = [each(batch) for each in alone]
    for kind in total:
        torch.testing.assert_close(main[f"groups/{kind}"], torch.cat([each[f"main/{kind}"] for each in apart[1:]]))
        torch.testing.assert_close(main[f"main/{kind}"], apart[0][f"main/{kind}"])
        if "proposals/class" in main:
            torch.testing.assert_close(main[f"groups/proposals/{kind}"], torch.cat([each[f"proposals/{kind}"] for each in apart[1:]]))
    separate = [gradients(each, losses.total) for each, losses in zip(alone, apart, strict=True)]
    mine = {f"student.{name}" for name in method.adapters["groups"][0].state_dict()}
    for name in separate[0]:
        if name in mine:
            torch.testing.assert_close(found[name], separate[0][name], rtol=1e-6, atol=1e-8)
            for number in (0, 1):
                ours = found[f"adapters.groups.{number}.{name.removeprefix('student.')}"]
                torch.testing.assert_close(ours, separate[number + 1][name], rtol=1e-6, atol=1e-8)
        else:
            torch.testing.assert_close(found[name], sum(each[name] for each in separate), rtol=1e-6, atol=1e-8)


def test_groups_are_no_part_of_the_detector() -> None:
    method = method_of(DETECTORS["dino"], GroupMatching(groups=3))
    assert method.student.state_dict().keys() == method_of(DETECTORS["dino"]).student.state_dict().keys()
    assert {name for name in method.training_state() if "groups.1." in name}
    starts = [group.state_dict()["query_content.weight"] for group in method.adapters["groups"]]
    assert not torch.equal(*starts)


def test_groups_with_invalid_queries_are_folded() -> None:
    stages = replace(make_stages(2, 1, 3), valid=torch.tensor([[True, False, True]]))
    found = fold([stages, stages])
    assert isinstance(found, Stages) and found.valid is not None
    assert found.logits.shape[:3] == found.valid.shape == (4, 1, 3) and found.valid[:, 0, 1].logical_not().all()


@pytest.mark.parametrize(
    ("name", "objective"), [("h-deformable", OneToMany(3)), ("dino", GroupMatching(3)), ("dn-dab", DNDenoising(groups=2))]
)
def test_parts_of_a_step_sum_to_the_whole(name: str, objective: Objective) -> None:
    method = method_of(DETECTORS[name], objective)
    method.student.backbone.eval()  # its batch norm would see the company
    assert_parts_sum_to_the_whole(method)


def test_what_a_detector_cannot_do_is_said() -> None:
    class Alone(type(DETECTORS["dino"].build(CLASSES))):  # type: ignore[misc]
        makes_queries = False

    student = Alone(DETECTORS["dino"], CLASSES)
    with pytest.raises(ValueError, match=r"objective groups: Alone makes no further queries; --objectives\.groups none"):
        Method(student, Criterion(), (SetPrediction(), GroupMatching()))
    with pytest.raises(ValueError, match=r"objective one-to-many: Alone makes no further queries; --objectives\.one-to-many none"):
        Method(student, Criterion(), (SetPrediction(), OneToMany()))
    for values, kind in (({"groups": 1}, GroupMatching), ({"repeats": 0}, OneToMany), ({"label_noise": 1.5}, DNDenoising)):
        with pytest.raises(ValueError, match="must lie in"):
            kind(**values)


@pytest.mark.parametrize("counts", [(2, 0, 3), (0, 0), (1,)])
@pytest.mark.parametrize("spare", [0, 2])
def test_queries_of_dn_denoising_equal_their_twin(counts: tuple[int, ...], spare: int) -> None:
    """The last channel tells them from learned ones; rows without an object have none of it."""
    batch, detector, most = make_batch(counts), DETECTORS["dn-dab"].build(CLASSES), max(counts) + spare
    targets, draws = batch.targets, draw_noise(batch, 2, detector.embedded_labels, copies=1)
    labels, boxes = noise_labels(targets.labels, draws, 1.6), noise_centres_and_sides(targets.boxes, draws, 0.4)
    queries = noised_queries(detector.embed, targets, labels, boxes, most)
    expected = dn_denoising_rows(counts, targets.labels, targets.boxes, draws, 0.8, 0.4, most)
    for image in range(len(counts)):
        for row in range(queries.content.shape[1]):
            wanted = expected.get((image, row))
            assert bool(queries.valid[image, row]) == (wanted is not None)
            if wanted is None:
                assert not queries.content[image, row].any()
                continue
            assert torch.equal(queries.content[image, row, :-1], detector.label_content.weight[wanted.label])
            assert queries.content[image, row, -1] == 1
            box = inverse_sigmoid(torch.tensor(wanted.box), detector.eps).sigmoid()
            torch.testing.assert_close(queries.reference[image, row], box, rtol=0, atol=1e-6)
    match = known_match(targets, 2, most, copies=1)
    pairs = sorted(zip(match.image.tolist(), match.query.tolist(), match.target.tolist(), strict=True))
    assert pairs == sorted((image, row, r.target) for (image, row), r in expected.items())
    memory = detector.encode(batch.images, batch.padding)
    assert not detector.queries(memory)["main"].content[..., -1].any()


def test_dn_noise_by_hand() -> None:
    """Half sides .2 and .1: the centre moves by .5 * .5 of them, the sides by .25 of themselves; beyond 1 they are cut."""
    draws = Draws(torch.zeros(1, 1), torch.zeros(1, 1).long(), torch.tensor([[[1.0, -1, 1, -1]]]), torch.full((1, 1, 4), 0.5))
    found = noise_centres_and_sides(torch.tensor([[0.5, 0.5, 0.4, 0.2]]), draws, 0.5)[0, 0]
    torch.testing.assert_close(found, torch.tensor([0.55, 0.475, 0.5, 0.15]))
    assert centre_and_sides_moved([0.5, 0.5, 0.4, 0.2], [1, -1, 1, -1], [0.5] * 4, 0.5) == pytest.approx(found.tolist())
    assert noise_centres_and_sides(torch.tensor([[0.9, 0.9, 0.9, 0.2]]), draws, 1.0)[0, 0, 2] == 1


def test_dn_denoising_draws_no_class_where_it_can_be_embedded() -> None:
    batch = make_batch((40,))
    for name, most in (("dn-dab", CLASSES), ("dino", CLASSES), ("dino without it", CLASSES - 1)):
        config = DETECTORS["dino"].changed(spare_label=False) if "without" in name else DETECTORS[name]
        labels, boxes = DNDenoising(groups=4, label_noise=1.0).noised(batch, 4, config.build(CLASSES))
        assert (int(labels.max()), labels.shape, boxes.shape) == (most, (4, 40), (4, 40, 4))


@pytest.mark.parametrize("counts", [(0, 0), (2, 3)])
def test_groups_of_dn_denoising_are_blocks(counts: tuple[int, ...]) -> None:
    method = make_method(DETECTORS["dn-dab"])
    context = method.step_context(make_batch(counts))
    (group,) = DNDenoising(groups=2).query_groups(context)
    assert group.sees == ("main",) and group.blocks.tolist() == ([0, 0, 0, 1, 1, 1] if sum(counts) else [0])
    losses = method(make_batch(counts))
    assert bool(losses["denoising/l1"].any()) == bool(sum(counts))
    losses = method(replace(make_batch((0, 0)), totals=Totals(objects=6, most_objects=4, images=4)))
    assert not losses["denoising/class"].any()


def test_without_denoising_its_labels_are_not_trained() -> None:
    method = Method(DETECTORS["dn-dab"].build(CLASSES), Criterion(), (SetPrediction(),))
    assert method.unused_parameters == ["student.label_content.weight"]
    assert make_method(DETECTORS["dn-dab"]).unused_parameters == []


def test_without_hybrid_matching_the_further_queries_are_not_trained() -> None:
    one_stage = DETECTORS["h-deformable"].changed(mixed_selection=False, two_stage=False)
    for config, names in ((DETECTORS["h-deformable"], ["content"]), (one_stage, ["content", "position"])):
        method = Method(config.build(CLASSES), Criterion(), (SetPrediction(),))
        method(make_batch((2, 3))).total.backward()
        assert method.unused_parameters == [f"student.query_extra_{name}.weight" for name in names]
        assert method.unused_parameters == [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert make_method(config).unused_parameters == []


def test_what_an_objective_trains_without_declaring_it_is_said() -> None:
    class Silent(DNDenoising):
        embeds_labels = False

    class SilentGroup(OneToMany):
        extra_groups = ()

    for name, objective, part in (("dn-dab", Silent(groups=2), "label_content"), ("h-deformable", SilentGroup(2), "query_extra_content")):
        method = method_of(DETECTORS[name], objective)
        method(wide(make_batch((2, 3)))).total.backward()
        with pytest.raises(ValueError, match=rf"an objective trains student\.{part}\.weight without saying so: .* extra_groups"):
            method.check_unused()
        declared = make_method(DETECTORS[name])
        declared(make_batch((2, 3))).total.backward()
        declared.check_unused()


def test_training_on_keeps_what_the_detector_learns_by() -> None:
    """A detector's own objectives are those of the first recipe for it; denoising loses weights that were made for another criterion."""
    from steadydetr.checkpoints.card import DetectorCard
    from steadydetr.checkpoints.start import Start
    from steadydetr.data.transforms import ShortestSide

    for name in ("h-deformable-detr-r50-12ep", "dn-dab-deformable-detr-r50-50ep"):
        recipe = find(name)
        card = DetectorCard(recipe.detector, ("a",), (1,), ShortestSide(800, 1333))
        found = finetuned(card, Start("w"), 100)
        assert is_plain(recipe) and found.objectives == recipe.objectives
    group = find("group-dino-4scale-r50-36ep")
    assert is_plain(group) and group.objectives[1].weights == Weights(11.0, 55.0, 22.0)
    stable = find("stable-h-deformable-detr-r50-12ep")
    assert stable.objectives == find("h-deformable-detr-r50-12ep").objectives and stable.criterion.loss_weights.label == 6.0
    small = grouped(find("small-dino"), 2, "two")
    assert small.name == "two" and small.objectives == (
        SetPrediction(),
        replace(Denoising(40, box_noise=0.4), weights=Weights(4.0, 10.0, 4.0)),
        GroupMatching(2),
    )
