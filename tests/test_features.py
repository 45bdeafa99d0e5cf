"""Feature distillation: numbers by hand, slow twins, gradients, padding, micro-batches, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steadydetr.equations import distill
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Average
from steadydetr.objectives import FeatureDistillation, ReleasedFeatures, SetPrediction
from steadydetr.objectives.method import Method
from steadydetr.structures import Batch, Losses, Totals
from tests.conftest import BACKBONE, CLASSES, DETECTORS, make_batch, part_of
from tests.feature_steps import EVERY, SAME_WIDTH, VARIANTS, assert_close, context_of, make, own_total, own_value
from tests.reference import features as slow
from tests.reference.boxes import iou_and_giou
from tests.steps import gradients, wide

# by hand (2 positions, d = 2)

FT, FS = torch.tensor([[[1.0, 0], [0, 2]]]), torch.tensor([[[0.0, 0], [1, 1]]])
Q, QUALITY = torch.tensor([[[1.0, 1], [2, 0]]]), torch.tensor([[0.72, 0.25]])
NO_PADDING = torch.zeros(1, 2, dtype=torch.bool)


def test_quality_by_hand() -> None:
    assert float(distill.quality_score(torch.tensor(0.64), torch.tensor(0.81))) == pytest.approx(0.72)  # .8 x .9
    assert float(distill.quality_score(torch.tensor(0.64), torch.tensor(0.0))) == 0


def test_losses_by_hand() -> None:
    """Masks (1, 2) and (2, 0); squared differences 1 and 2; 1 / (M d HW) = 1/8."""
    error = distill.token_error(FS, FT, NO_PADDING)
    assert error.tolist() == [[0.5, 1.0]]  # 1 / d of 1 and 2
    assert distill.query_masks(FT, Q).tolist() == [[[1, 2], [2, 0]]]
    weighted = distill.weighted_squares(FT, Q, QUALITY)  # .72 x (1, 4) + .25 x (4, 0)
    assert weighted.tolist() == [[pytest.approx(1.72), pytest.approx(2.88)]]
    eq8 = float(distill.over_tokens(weighted / 2 * error, NO_PADDING))
    assert eq8 == pytest.approx(0.935) and eq8 != pytest.approx(1.4089)  # the latter: the sum over queries inside the square
    mean = (FT @ Q.mean(1)[..., None])[..., 0].square()
    assert float(distill.over_tokens(mean * error, NO_PADDING)) == pytest.approx(1.0625)  # Eq. 6
    assert float(distill.over_tokens(error, NO_PADDING)) == pytest.approx(0.75)  # FitNet


# slow twins


@pytest.mark.parametrize("count", [0, 1, 5, 40])
def test_both_ways_to_sum_masks_equal_the_loops(count: int) -> None:
    """With 5 queries by their masks, with 40 by one matrix; none is 0."""
    torch.manual_seed(count)
    features, queries, weight = torch.randn(2, 30, 6).double(), torch.randn(2, count, 6).double(), torch.rand(2, count).double()
    found = distill.weighted_squares(features, queries, weight)
    for b in range(2):
        for token in range(30):
            terms = (
                w * slow.dot(features[b, token].tolist(), q) ** 2 for q, w in zip(queries[b].tolist(), weight[b].tolist(), strict=True)
            )
            assert float(found[b, token]) == pytest.approx(sum(terms), rel=1e-9)


def expected(objective: FeatureDistillation, method: Method, context: StepContext, torch_twin: bool) -> Any:
    """The loss of the whole batch, level by level and image by image; by plain loops, or with gradients by whole masks."""
    teacher_output, batch, phi = context.teacher_outputs["teacher"], context.batch, method.adapters["features"]
    stage_count = len(teacher_output.stages.logits)
    chosen = range(stage_count) if objective.queries == "every" else [stage_count - 1]
    which = "tokens" if objective.source == "encoder" else "inputs"
    total: Any = 0.0
    for stage in chosen:
        for b, objects in enumerate(batch.targets.split()):
            queries = teacher_output.queries.content[b] if objective.queries == "initial" else teacher_output.stages.content[stage, b]
            weights = quality_of(objective, teacher_output, stage, b, objects, batch)
            start = 0
            for height, width in context.memory.levels:
                part = slice(start, start + height * width)
                start += height * width
                valid = ~context.memory.padding[b, part]
                teacher = getattr(teacher_output.memory, which)[b, part][valid]
                student = phi(getattr(context.memory, which)[b, part][valid])
                value = (
                    literal(objective, teacher, student, queries, weights)
                    if torch_twin
                    else loops(objective, teacher, student, queries, weights)
                )
                total = total + value / (len(context.memory.levels) * len(batch.targets.counts) * len(chosen))
    return total


def quality_of(objective: FeatureDistillation, teacher_output: Any, stage: int, b: int, objects: Any, batch: Batch) -> list[float]:
    """One query at a time; the match is the teacher's."""
    scores, boxes = teacher_output.stages.logits[stage, b].sigmoid(), teacher_output.stages.boxes[stage, b].tolist()
    match, images, total = teacher_output.matched.match, len(batch.targets.counts), len(batch.targets.labels)
    weights = [0.0] * len(boxes)
    if objective.quality == "best":
        for q, box in enumerate(boxes):
            iou = max((iou_and_giou(box, target)[0] for target in objects.boxes.tolist()), default=0.0)
            weights[q] = slow.quality(float(scores[q].max()), iou, objective.gamma)
        return weights
    for image, q, target in zip(match.image.tolist(), match.query.tolist(), match.target.tolist(), strict=True):
        if image == stage * images + b:
            target -= stage * total
            iou = iou_and_giou(boxes[q], batch.targets.boxes[target].tolist())[0]
            weights[q] = slow.quality(float(scores[q, batch.targets.labels[target]]), iou, objective.gamma)
    return weights


def loops(objective: FeatureDistillation, teacher: Tensor, student: Tensor, queries: Tensor, weights: list[float]) -> float:
    t, s, q = teacher.tolist(), student.tolist(), queries.tolist()
    if objective.mask == "ones":
        return slow.fitnet(t, s)
    if objective.mask == "mean":
        return slow.mean_mask(t, s, q)
    return slow.target_aware(t, s, q, weights, objective.similarity == "cosine")


def literal(objective: FeatureDistillation, teacher: Tensor, student: Tensor, queries: Tensor, weights: list[float]) -> Tensor:
    """Eq. 8 as it is written, a mask after the other."""
    assert objective.mask == "target-aware" and objective.similarity == "dot"
    parts = [w * ((teacher @ q)[:, None] * (teacher - student)).square().sum() for q, w in zip(queries, weights, strict=True)]
    return torch.stack(parts).sum() / (len(queries) * teacher.numel())


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_the_loops(variant: str) -> None:
    """Three images: a repeated class, none, and one that is padded; teacher and student of other widths."""
    objective = VARIANTS[variant]
    method, batch = make(objective), wide(make_batch((2, 0, 1)))
    found = float(method(batch)["features/error"].detach().sum())
    assert found > 0
    with torch.no_grad():
        assert found == pytest.approx(expected(objective, method, context_of(method, batch), torch_twin=False), rel=1e-9)


@pytest.mark.parametrize("student", ["deformable", "dino"])
def test_gradients_equal_those_of_the_equation_as_written(student: str) -> None:
    """To the backbone, through the encoder and phi; none to the decoder, whose predictions are not looked at."""
    objective = FeatureDistillation()
    method, batch = make(objective, DETECTORS[student]), wide(make_batch((3, 2)))
    losses = method(batch)
    found = gradients(method, own_total(losses))
    counterpart = gradients(method, 20 * expected(objective, method, context_of(method, batch), torch_twin=True))
    assert_close(found, counterpart)
    assert not any(g.any() for n, g in found.items() if "decoder" in n or "query" in n)
    assert all(g.any() for n, g in found.items() if "encoder" in n or n.startswith("adapters"))


# properties


@pytest.mark.parametrize("variant", EVERY)
def test_no_gradient_to_the_teacher(variant: str) -> None:
    """The student and what the objective trains get one."""
    objective = EVERY[variant]
    method = make(objective, teacher=SAME_WIDTH).train()
    before = {n: t.clone() for n, t in method.teachers.state_dict().items()}
    losses = method(wide(make_batch((2, 3))))
    own_total(losses, objective.name).backward()
    assert own_value(losses, objective.name) > 0
    encoder = [p for n, p in method.student.named_parameters() if "neck" in n]
    assert all(p.grad is not None and p.grad.any() for p in encoder)
    trained = [n for n, p in method.adapters.named_parameters() if p.grad is None or not p.grad.any()]
    # the softmax takes a bias out, and at 64 px FKD's maps are pooled to one cell, which takes from itself alone
    assert not [n for n in trained if not any(part in n for part in (".query.", ".key.", ".where.bias"))]
    assert not [n for n, p in method.teachers.named_parameters() if p.grad is not None or p.requires_grad]
    assert all(torch.equal(before[n], t) for n, t in method.teachers.state_dict().items())


@pytest.mark.parametrize("variant", [*VARIANTS, "released"])
def test_nothing_to_learn_from_oneself(variant: str) -> None:
    """Teacher = student; phi starts as the identity because the widths are equal."""
    torch.manual_seed(0)
    student = DETECTORS["refine"].build(CLASSES)
    objective = VARIANTS.get(variant, ReleasedFeatures())
    objective = replace(objective, teacher="ema")
    method = Method(student, Criterion(), (SetPrediction(), objective), {"ema": Average(student, 0.9)}).double().eval()
    losses = method(wide(make_batch((2, 3))))
    assert own_value(losses) == 0
    assert not any(g.any() for g in gradients(method, own_total(losses)).values())


@pytest.mark.parametrize("variant", EVERY)
def test_micro_batches_sum_to_the_whole(variant: str) -> None:
    name = EVERY[variant].name
    method = make(EVERY[variant], teacher=SAME_WIDTH)
    batch = wide(make_batch((2, 0, 3)))
    totals = Totals(5, 3, 3)
    parts = [replace(part_of(batch, images), totals=totals) for images in ([0, 1], [2])]
    whole = gradients(method, own_total(method(batch), name))
    halves = [gradients(method, own_total(method(part), name)) for part in parts]
    assert_close({n: halves[0][n] + halves[1][n] for n in whole}, whole)


@pytest.mark.parametrize("variant", [name for name in EVERY if name not in ("released", "inputs")])
def test_garbage_in_the_padding_changes_nothing(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even NaN, neither the loss nor a gradient. The released code counts its padding."""
    name = EVERY[variant].name
    method, batch = make(EVERY[variant]), wide(make_batch((2, 3)))
    clean = method(batch)
    expected_gradients = gradients(method, own_total(clean, name))
    for detector in (method.student, method.teaching["teacher"]):
        encode = detector.encode

        def soiled(images: Tensor, padding: Tensor, encode: Any = encode) -> Any:
            memory = encode(images, padding)
            soil = torch.where(memory.padding[..., None], torch.nan, 0.0)
            return replace(memory, tokens=memory.tokens + soil)

        monkeypatch.setattr(detector, "encode", soiled)
    monkeypatch.setattr(method.student, "decode", lambda memory, groups, d=method.student.decode: d(scene_memory(memory), groups))
    teacher = method.teaching["teacher"]
    monkeypatch.setattr(teacher, "decode", lambda memory, groups, d=teacher.decode: d(scene_memory(memory), groups))
    soiled_losses = method(batch)
    assert own_value(soiled_losses, name) == pytest.approx(own_value(clean, name), rel=1e-12)
    assert_close(gradients(method, own_total(soiled_losses, name)), expected_gradients)


def scene_memory(memory: Any) -> Any:
    return replace(memory, tokens=torch.nan_to_num(memory.tokens))


@pytest.mark.parametrize("variant", EVERY)
def test_images_without_objects_keep_every_parameter(variant: str) -> None:
    """What looks near objects then teaches nothing."""
    objective = EVERY[variant]
    method = make(objective, teacher=SAME_WIDTH)
    losses = method(wide(make_batch((0, 0))))
    assert (own_value(losses, objective.name) == 0) == (variant in ("paper", "cosine", "inputs", "initial", "every", "best", "fgfi"))
    losses.total.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in missing if "adapters" in n or "encoder" in n or "backbone" in n]
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_share_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What backward notes in passing is what two backward passes give."""
    method, batch = make(FeatureDistillation()), wide(make_batch((3, 2)))
    losses = method(batch)
    share = losses.measures["features/gradient_share"]
    assert float(share) == 0
    losses.total.backward()
    kept: list[Tensor] = []
    encode = method.student.encode
    monkeypatch.setattr(method.student, "encode", lambda *a: (kept.append(m.tokens) or m) if (m := encode(*a)) else m)
    again = method(batch)
    own = torch.autograd.grad(own_total(again), kept[0], retain_graph=True)[0]
    rest = torch.autograd.grad(own_total(again, "main"), kept[0])[0]
    assert float(share) == pytest.approx(float(own.norm() / (own.norm() + rest.norm())), rel=1e-5)


# memory


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


@pytest.mark.parametrize("count", [7, 100, 900])
def test_masks_of_many_queries_never_take_more_room_than_the_features(count: int) -> None:
    """The finest level of 800 x 1333 has 16,700 tokens of 256 channels; with 900 queries their masks would be 15 million numbers."""
    tokens, width = 16_700, 256
    features, queries, weight = torch.zeros(1, tokens, width), torch.zeros(1, count, width), torch.zeros(1, count)
    with Largest() as largest:
        distill.weighted_squares(features, queries, weight)
    assert largest.entries <= width * (tokens + count) < count * tokens * width


@pytest.mark.parametrize("variant", ["paper", "best", "mean", "cosine"])
def test_the_whole_objective_never_holds_a_mask_of_every_channel(variant: str) -> None:
    """Forward and backward, with more queries than tokens have channels."""
    many = replace(DETECTORS["deformable"], backbone=BACKBONE, queries=120)
    objective = VARIANTS[variant]
    method, batch = make(objective, teacher=many), wide(make_batch((3, 2)))
    context = context_of(method, batch)
    tokens, width = context.memory.tokens.shape[1:]
    losses = Losses()
    with Largest() as largest:
        objective.add_losses(losses, context, {}, {})
        torch.autograd.grad(own_total(losses), context.memory.tokens)
    assert 2 * tokens * width <= largest.entries <= 2 * width * (tokens + 120) < 2 * 120 * tokens * width
