"""Online distillation as a whole step: against the slow twin, its groups, its teacher, empty batches, what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor

from steadydetr.detectors import DeformableDETRConfig, DetectorConfig, DINOConfig
from steadydetr.learning.class_terms import QualityTarget
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Average, Frozen
from steadydetr.objectives import (
    AssignmentDistillation,
    AuxiliaryGroups,
    Denoising,
    JoinedMatches,
    MatchingDistillation,
    NaivePrediction,
    Objective,
    PredictionDistillation,
    SetPrediction,
)
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Losses, QueryGroup
from tests.conftest import CLASSES, DETECTORS, make_batch
from tests.reference import online as slow
from tests.reference.boxes import iou_and_giou
from tests.steps import assert_close, assert_parts_sum_to_the_whole, gradients, terms, wide

FAMILIES = ("refine", "dab", "dino", "conditional")
HALF = MatchingDistillation(box_weight=0.5)  # exact in float32, which weights of matches are
ALL: tuple[Objective, ...] = (
    SetPrediction(HALF),
    PredictionDistillation(),
    AuxiliaryGroups(distillation=HALF),
    AssignmentDistillation("ema"),
)


def perturb(model: torch.nn.Module, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def make_online(
    config: DetectorConfig, objectives: Sequence[Objective] = ALL, criterion: Criterion | None = None, apart: float = 0.05
) -> Method:
    """In float64 and evaluation mode; the teacher is the student with its weights moved by `apart`. DINO denoises besides."""
    torch.manual_seed(0)
    student = config.build(CLASSES)
    perturb(student, 0.05, 1)
    teacher = Average(student, 0.9)
    perturb(teacher, apart, 2)
    objectives = tuple(o for o in objectives if student.takes_boxes or not isinstance(o, AuxiliaryGroups))
    if isinstance(config, DINOConfig) and SetPrediction in map(type, objectives):
        objectives += (Denoising(number=4, box_noise=0.4),)
    return Method(student, criterion or Criterion(class_target=QualityTarget(), alpha=None), objectives, {"ema": teacher}).double().eval()


def by_stage(losses: Losses, stages: int) -> dict[str, Tensor]:
    """[S] every term, those of auxiliary groups summed over the groups; the proposals have one stage."""
    return {name: v.view(min(stages, len(v)), -1).sum(1) for name, v, _ in losses}


def assert_equals_twin(method: Method, batch: Batch) -> Losses:
    losses = method(batch)
    context = StepContext.of(batch, method.student, method.criterion, method.teaching)
    values, measures = slow.step(method.student, method.teaching["ema"], batch, method.objectives, context)
    assert {name: float(value) for name, value in losses.measures.items()} == pytest.approx(measures)
    found = by_stage(losses, method.student.stages)
    assert_close(found, {name: torch.stack(stages)[: 1 if name.startswith("proposals/") else None] for name, stages in values.items()})
    assert_close(gradients(method, losses.total), gradients(method, slow.total(values)))
    return losses


@pytest.mark.parametrize("name", [*FAMILIES, "two-stage"])
def test_step_and_its_gradients_equal_the_slow_twin(name: str) -> None:
    """Repeated classes, an image without objects, a padded one; the teacher differs enough to be worth listening to."""
    method = make_online(DETECTORS[name])
    losses = assert_equals_twin(method, wide(make_batch((2, 0, 3), seed=2), classes=2))
    assert losses.measures["main/same_query_as_teacher"] < 1
    assert name != "dino" or losses.measures["main/without_counterpart"] > 0
    assert losses["prediction/l1"].detach().sum() > 0


VARIANTS: dict[str, tuple[Objective, ...]] = {
    "class weight": (SetPrediction(MatchingDistillation(class_weight=0.5, box_weight=0.5)),),
    "conditional": (SetPrediction(MatchingDistillation(classes="conditional", boxes=False)),),
    "auxiliary own": (AuxiliaryGroups(matching="own"),),
    "auxiliary teacher": (AuxiliaryGroups(matching="teacher"),),
    "auxiliary sum": (AuxiliaryGroups(reduction="sum", distillation=JoinedMatches(class_weight=0.5, box_weight=0.5)),),
    "naive": (NaivePrediction(),),
    "naive by objects": (NaivePrediction(divisor="objects"),),
    "without listening": (PredictionDistillation(listen=False),),
    "assignment own": (AssignmentDistillation("ema", matching="own"),),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_slow_twin(variant: str) -> None:
    """Table 6, Table 5's naive row and that without Listen2stu, the supplement's Teacher Group, and weights of Table 4."""
    assert_equals_twin(make_online(DETECTORS["refine"], VARIANTS[variant]), wide(make_batch((3, 2)), classes=2))


def test_more_objects_than_queries_equal_the_slow_twin() -> None:
    """Some targets have no query by either match: nobody learns them, and a group then holds all queries."""
    method = make_online(replace(DETECTORS["refine"], queries=3))
    losses = assert_equals_twin(method, wide(make_batch((5, 2))))
    assert losses.measures["main/without_counterpart"] == pytest.approx(2 / 7)


@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_gets_no_gradient_and_stays_in_evaluation_mode(name: str) -> None:
    method = make_online(DETECTORS[name]).train()
    before = {n: t.clone() for n, t in method.teachers.state_dict().items()}
    method(wide(make_batch((2, 3)))).total.backward()
    assert not [n for n, p in method.teachers.named_parameters() if p.grad is not None or p.requires_grad]
    assert method.student.training and not any(module.training for module in method.teachers["ema"].modules())
    assert all(torch.equal(before[n], t) for n, t in method.teachers.state_dict().items())


@pytest.mark.parametrize("counts", [(2, 3), (0, 0), (0, 4), (15,)])
def test_every_parameter_gets_a_finite_gradient(detector_config: DetectorConfig, counts: tuple[int, ...]) -> None:
    """Without objects too, and with more objects than queries."""
    method = make_online(detector_config)
    losses = method(wide(make_batch(counts)))
    losses.total.backward()
    for name, parameter in method.student.named_parameters():
        if parameter.requires_grad and f"student.{name}" not in method.unused_parameters:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(torch.isfinite(value).all() for value in (*terms(losses).values(), *losses.measures.values()))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_objective_takes_its_own_terms_away_and_no_others(name: str) -> None:
    """One pass equals separate passes: what else is learned does not see it."""
    batch = wide(make_batch((2, 0, 3)))
    whole = terms(make_online(DETECTORS[name])(batch))
    for left_out in ALL:
        rest = terms(make_online(DETECTORS[name], [o for o in ALL if o is not left_out])(batch))
        gone = {"main", "proposals", "denoising"} if left_out.name == "main" else {left_out.name}
        assert_close(rest, {n: v for n, v in whole.items() if n.partition("/")[0] not in gone})


def test_a_guide_changes_the_main_terms_alone() -> None:
    batch = wide(make_batch((2, 3), seed=2))
    guided, alone = (
        terms(make_online(DETECTORS["dino"], (SetPrediction(teacher_match), *ALL[1:]))(batch)) for teacher_match in (HALF, None)
    )
    for name, value in guided.items():
        assert torch.allclose(value, alone[name], atol=1e-12) == (name.partition("/")[0] != "main"), name


@pytest.mark.parametrize("name", [*FAMILIES, "two-stage"])
@pytest.mark.parametrize("kind", [PredictionDistillation, NaivePrediction])
def test_parts_sum_to_the_whole(name: str, kind: type[Objective]) -> None:
    assert_parts_sum_to_the_whole(make_online(DETECTORS[name], (ALL[0], kind(), *ALL[2:])))


def test_a_query_outside_its_group_teaches_nobody() -> None:
    """Eight targets share their cheapest queries, so some of those that the teacher matched are none of them."""
    method = make_online(DETECTORS["refine"], (AuxiliaryGroups(distillation=HALF),))
    losses = assert_equals_twin(method, wide(make_batch((8, 3))))
    assert losses.measures["auxiliary/targets_outside"] > 0


class Spoiled(AuxiliaryGroups):
    """With garbage wherever a slot holds no query."""

    def query_groups(self, context: StepContext) -> list[QueryGroup]:
        (group,) = super().query_groups(context)
        queries = group.queries
        assert queries.valid is not None and not queries.valid.all()

        def spoil(tensor: Tensor) -> Tensor:
            return torch.where(queries.valid[..., None], tensor, torch.nan)

        position = None if queries.position is None else spoil(queries.position)
        spoiled = replace(queries, content=spoil(queries.content), reference=spoil(queries.reference), position=position)
        return [replace(group, queries=spoiled)]


@pytest.mark.parametrize("counts", [(1, 4), (0, 2), (0, 0)])
@pytest.mark.parametrize("name", FAMILIES)
def test_garbage_in_empty_slots_changes_nothing(name: str, counts: tuple[int, ...]) -> None:
    batch = wide(make_batch(counts))
    clean, spoiled = (make_online(DETECTORS[name], (ALL[0], kind())) for kind in (AuxiliaryGroups, Spoiled))
    a, b = clean(batch), spoiled(batch)
    assert_close(terms(b), terms(a))
    assert_close(gradients(spoiled, b.total), gradients(clean, a.total))


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_auxiliary_groups_are_blind_to_each_other_and_to_main(name: str) -> None:
    method, batch = make_online(DETECTORS[name]), wide(make_batch((2, 3)))
    context = StepContext.of(batch, method.student, method.criterion, method.teaching)
    (group,) = AuxiliaryGroups().query_groups(context)
    assert group.blocks is not None and group.queries.content.shape[1] == 2 * 6  # slots for two queries of every object
    assert group.blocks.tolist() == [0] * 6 + [1] * 6 and not group.sees
    main = QueryGroup("main", context.queries["main"])
    other = replace(group, queries=replace(group.queries, content=group.queries.content + (group.blocks == 0)[:, None]))
    elsewhere = replace(main, queries=replace(main.queries, content=main.queries.content + 1))
    with torch.no_grad():
        before, moved = (method.student.decode(context.memory, [main, g]) for g in (group, other))
        beside = method.student.decode(context.memory, [elsewhere, group])
    torch.testing.assert_close(moved["main"].logits, before["main"].logits)
    torch.testing.assert_close(moved["auxiliary"].logits[:, :, 6:], before["auxiliary"].logits[:, :, 6:])
    assert not torch.allclose(moved["auxiliary"].logits[:, :, :6], before["auxiliary"].logits[:, :, :6])
    torch.testing.assert_close(beside["auxiliary"].logits, before["auxiliary"].logits)


@pytest.mark.parametrize("name", ["refine", "two-stage", "dab", "dino"])
def test_auxiliary_queries_are_those_that_the_teachers_stage_gave(name: str) -> None:
    """Updated content, boxes as 4-d anchors and, where queries have one, their own position vector."""
    method, batch = make_online(DETECTORS[name]), wide(make_batch((2, 3)))
    context = StepContext.of(batch, method.student, method.criterion, method.teaching)
    teacher_output, (group,) = context.teacher_outputs["ema"], AuxiliaryGroups().query_groups(context)
    first = (0, 2)
    for t in range(2):
        for b, count in enumerate(batch.targets.counts):
            start = t * sum(batch.targets.counts) + first[b]
            chosen = slow.cheapest(teacher_output.matched.cost[start : start + count].tolist())
            rows = slice(6 * t, 6 * t + len(chosen))
            assert group.queries.valid is not None and group.queries.valid[b, 6 * t : 6 * t + 6].sum() == len(chosen)
            assert torch.equal(group.queries.content[b, rows], teacher_output.stages.content[t, b, chosen])
            assert torch.equal(group.queries.reference[b, rows], teacher_output.stages.boxes[t, b, chosen])
            if teacher_output.queries.position is not None:
                assert group.queries.position is not None
                assert torch.equal(group.queries.position[b, rows], teacher_output.queries.position[b, chosen])
    assert group.queries.sized and not any(t.requires_grad for t in (group.queries.content, group.queries.reference))
    assert (group.queries.position is None) == (name in ("dab", "dino"))


@pytest.mark.parametrize("name", [*FAMILIES, "two-stage"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_naively(name: str) -> None:
    method = make_online(DETECTORS[name], (NaivePrediction(),), apart=0.0)
    losses = method(wide(make_batch((2, 3))))
    assert losses.total.item() == pytest.approx(0, abs=1e-12)
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients(method, losses.total).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_equal_to_its_teacher_learns_matched_scores_only(name: str) -> None:
    """The TOOD weight is no score of its own; boxes are not strictly better."""
    method, batch = make_online(DETECTORS[name], (PredictionDistillation(),), apart=0.0), wide(make_batch((2, 3)))
    context = StepContext.of(batch, method.student, method.criterion, method.teaching)
    teacher_output = context.teacher_outputs["ema"]
    losses = method(batch)
    assert losses["prediction/l1"].abs().max() == losses["prediction/giou"].abs().max() == 0
    expected = torch.zeros(2, dtype=torch.float64)
    match, boxes = teacher_output.matched.match, batch.targets.repeat_batch(2)
    for image, query, target in zip(match.image.tolist(), match.query.tolist(), match.target.tolist(), strict=True):
        p = float(teacher_output.stages.flat[0][image, query, boxes.labels[target]].sigmoid())
        iou = iou_and_giou(teacher_output.stages.flat[1][image, query].tolist(), boxes.boxes[target].tolist())[0]
        expected[image // 2] += slow.quality_focal(p, slow.task_weight(p, iou)) / 5
    torch.testing.assert_close(losses["prediction/class"].detach(), expected, rtol=1e-9, atol=1e-12)


def test_position_of_prediction_queries() -> None:
    """The teacher's by default; the student's as the letter of the text, which then learns. Without position vectors there is no choice."""
    for name, taken in (("refine", True), ("dab", False)):
        method, batch = make_online(DETECTORS[name]), wide(make_batch((2, 3)))
        context = StepContext.of(batch, method.student, method.criterion, method.teaching)
        (theirs,), (mine,) = (PredictionDistillation(position=p).query_groups(context) for p in ("teacher", "student"))
        assert torch.equal(mine.queries.content, context.teacher_outputs["ema"].queries.content)
        assert theirs.queries is context.teacher_outputs["ema"].queries
        assert (mine.queries.position is not None) == taken
        if taken:
            assert mine.queries.position is context.queries["main"].position and mine.queries.position.requires_grad


def test_measures_of_a_student_equal_to_its_teacher() -> None:
    """Both hold the same; a target without any query, where objects outnumber queries, is not shared."""
    method = make_online(DETECTORS["dino"], (SetPrediction(HALF),), apart=0.0)
    for count, alone in ((11, 0), (15, 3)):
        measures = method(wide(make_batch((count,)))).measures
        assert measures["main/same_query_as_teacher"] == pytest.approx(1 - alone / count)
        assert measures["main/without_counterpart"] == pytest.approx(alone / count)


@pytest.mark.parametrize(
    "objective",
    [
        SetPrediction(MatchingDistillation(teacher="big")),
        *(k("big") for k in (PredictionDistillation, AuxiliaryGroups, AssignmentDistillation)),
    ],
)
def test_a_teacher_that_is_not_there_is_named(objective: Objective) -> None:
    with pytest.raises(ValueError, match=rf"objective {objective.name} learns from a teacher called 'big', but the recipe has ema"):
        make_online(DETECTORS["refine"], (objective,))
    with pytest.raises(ValueError, match="has none"):
        Method(DETECTORS["refine"].build(CLASSES), Criterion(), (objective,))


def taught_by(config: DetectorConfig, objective: Objective) -> Method:
    """The small refined detector with another, trained one as its teacher."""
    student, teacher = DETECTORS["refine"].build(CLASSES), config.build(CLASSES)
    return Method(
        student, Criterion(), (SetPrediction(), objective) if objective.name != "main" else (objective,), {"big": Frozen(teacher)}
    )


@pytest.mark.parametrize(
    ("objective", "attribute"),
    [
        (SetPrediction(MatchingDistillation(teacher="big")), "stages"),
        (PredictionDistillation("big"), "stages"),
        (AuxiliaryGroups("big"), "width"),
    ],
    ids=["matching", "prediction", "auxiliary"],
)
def test_teachers_that_do_not_fit_are_refused_at_start(objective: Objective, attribute: str) -> None:
    refine = DETECTORS["refine"]
    assert isinstance(refine, DeformableDETRConfig)
    other = {"stages": replace(refine.transformer, decoder_layers=3), "width": replace(refine.transformer, width=32)}[attribute]
    with pytest.raises(
        ValueError, match=rf"objective {objective.name} compares .* {attribute} = \d+, the teacher 'big' \(DeformableDETR\) \d+"
    ):
        taught_by(replace(refine, transformer=other), objective)
    taught_by(refine, objective)
    with pytest.raises(ValueError, match="architecture = DeformableDETR" if objective.name == "main" else "positioned = True"):
        taught_by(DETECTORS["dab"], objective)


def test_the_students_position_vectors_are_learned_ones() -> None:
    with pytest.raises(ValueError, match="position student needs learned queries"):
        make_online(DETECTORS["two-stage"], (SetPrediction(), PredictionDistillation(position="student")))


def test_objectives_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names of their own, got \['main', 'prediction', 'prediction'\]"):
        make_online(DETECTORS["refine"], (SetPrediction(), PredictionDistillation(), NaivePrediction()))


def test_what_a_step_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fetches and one decoder pass of the student; 6 + 1 + 36 assignments of the student's an image and 6 of the teacher's."""
    config = replace(DETECTORS["dino"], transformer=replace(DETECTORS["dino"].transformer, decoder_layers=6))
    method, batch = make_online(config, (SetPrediction(HALF), PredictionDistillation(), AuxiliaryGroups())), wide(make_batch((2, 0, 3)))
    calls: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(torch.Tensor, "cpu")
    count(scipy.optimize, "linear_sum_assignment")
    count(method.student, "decode")
    count(method.student, "encode")
    count(method.teaching["ema"], "decode")
    method(batch)
    assert calls == {"cpu": 2, "linear_sum_assignment": 2 * (6 + 1 + 36 + 6), "decode": 1 + 1, "encode": 1}


def test_bfloat16_step_is_close() -> None:
    method, batch = make_online(DETECTORS["dino"]).float(), make_batch((2, 3))
    exact = method(batch).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = method(batch).total
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.1)
