"""Feature distillation: numbers by hand, slow twins, gradients, padding, micro-batches, teachers that differ, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steadydetr.cli.training_arguments import read
from steadydetr.detectors import DetectorConfig
from steadydetr.detectors.deformable import token_anchors
from steadydetr.equations import distill
from steadydetr.learning.context import StepContext
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.teachers import Average, Frozen
from steadydetr.nn.backbone import TimmBackboneConfig
from steadydetr.objectives import FGD, FGFI, FKD, MGD, FeatureDistillation, Objective, ReleasedFeatures, SetPrediction
from steadydetr.objectives.feature_levels import Level
from steadydetr.objectives.feature_peers import NonLocalBlock, random_places
from steadydetr.objectives.method import Method
from steadydetr.objectives.released_features import MOST_PAIRS
from steadydetr.structures import Batch, Losses, Memory, Totals
from tests import steps
from tests.conftest import BACKBONE, CLASSES, DETECTORS, TINY, make_batch, part_of
from tests.reference import features as slow
from tests.reference.boxes import iou_and_giou
from tests.steps import gradients, wide

assert_close = partial(steps.assert_close, rtol=1e-09, atol=1e-12)

WIDE = replace(TINY, width=24, heads=3)
TEACHER = replace(DETECTORS["refine"], transformer=WIDE, queries=9)  # another width and number of queries
VARIANTS: dict[str, FeatureDistillation] = {
    "paper": FeatureDistillation(),
    "mean": FeatureDistillation(mask="mean"),
    "ones": FeatureDistillation(mask="ones"),
    "cosine": FeatureDistillation(similarity="cosine"),
    "inputs": FeatureDistillation(source="inputs"),
    "initial": FeatureDistillation(queries="initial"),
    "every": FeatureDistillation(queries="every"),
    "best": FeatureDistillation(quality="best", gamma=0.7),
}


def make(
    objective: Objective, student: DetectorConfig = DETECTORS["deformable"], teacher: DetectorConfig = TEACHER, apart: float = 0.05
) -> Method:
    """In float64; the adapters are moved away from where they start."""
    torch.manual_seed(0)
    models = [config.build(CLASSES) for config in (student, teacher)]
    method = Method(models[0], Criterion(), (SetPrediction(), objective), {"teacher": Frozen(models[1])})
    with torch.no_grad():
        for parameter in [*method.teachers.parameters(), *method.adapters.parameters()]:
            parameter.add_(torch.randn_like(parameter) * apart)
    return method.double().eval()


def context_of(method: Method, batch: Batch) -> StepContext:
    return StepContext.of(batch, method.student, method.criterion, method.teaching, dict(method.adapters))


def own_total(losses: Losses, prefix: str = "features") -> Tensor:
    return torch.stack([values.sum() * weight for name, values, weight in losses if name.startswith(f"{prefix}/")]).sum()


def own_value(losses: Losses, prefix: str = "features") -> float:
    return float(own_total(losses, prefix).detach())


SAME_WIDTH = replace(TEACHER, transformer=TINY)
EVERY: dict[str, Any] = {**VARIANTS, "released": ReleasedFeatures()}
EVERY |= {"fgd": FGD(), "fgd without attention": FGD(focal=False), "mgd": MGD(), "fkd": FKD(), "fgfi": FGFI()}

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


# the methods that the paper compares with

PEERS: dict[str, Objective] = {"fgd": FGD(), "mgd": MGD(), "fkd": FKD(), "fgfi": FGFI()}
SIZE = (5, 7)


def level_of(student: Tensor, teacher: Tensor, size: tuple[int, int] = SIZE) -> Level:
    """Tokens [B, L, d] without padding."""
    padding = torch.zeros(student.shape[:2], dtype=torch.bool)
    return Level(student, teacher, padding, size, torch.tensor(size[::-1]).expand(len(student), 2), 0)


def peer_case(name: str) -> tuple[Any, nn.Module, Tensor, Tensor, Any]:
    """Objective, its module away from where it starts, tokens of two images and what a context says of them."""
    torch.manual_seed(1)
    objective: Any = PEERS[name]
    module = objective.module(6, 8, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    batch = wide(make_batch((3, 2)))
    student, teacher = torch.randn(2, SIZE[0] * SIZE[1], 6).double(), torch.randn(2, SIZE[0] * SIZE[1], 8).double()
    empty = torch.zeros(2, SIZE[0] * SIZE[1], dtype=torch.bool)
    memory = Memory(student, empty, (SIZE,), torch.ones(2, 1, 2), student)
    return objective, module.double(), student, teacher, SimpleNamespace(targets=batch.targets, batch=batch, memory=memory)


def test_fgd_equals_the_loops() -> None:
    objective, module, student, teacher, context = peer_case("fgd")
    found = {name: float(value.detach()) for name, (value, _) in objective.terms(module, level_of(student, teacher), context).items()}
    expected = [0.0, 0.0, 0.0]
    for b, objects in enumerate(context.targets.split()):
        mask = slow.foreground([slow.in_cells(box, SIZE[1], SIZE[0]) for box in objects.boxes.tolist()], SIZE)
        terms = slow.fgd(module["align"](student[b]).tolist(), teacher[b].tolist(), mask, objective.temperature)
        expected = [a + t for a, t in zip(expected, terms, strict=True)]
    assert [found["foreground"], found["background"], found["attention"]] == pytest.approx(expected, rel=1e-9)


def test_fkd_equals_the_loops() -> None:
    objective, module, student, teacher, context = peer_case("fkd")
    found = {name: float(value.detach()) for name, (value, _) in objective.terms(module, level_of(student, teacher), context).items()}
    terms = [slow.fkd(module["align"](s).tolist(), t.tolist(), objective.temperature) for s, t in zip(student, teacher, strict=True)]
    assert [found["feature"], found["attention"]] == pytest.approx([sum(t[k] for t in terms) for k in (0, 1)], rel=1e-9)


def test_fkd_relates_every_cell_to_every_other() -> None:
    """Without pooling: z = x + W sum_j softmax_j(theta(x) phi(x_j)) g(x_j), one cell after the other."""
    torch.manual_seed(0)
    block, level = NonLocalBlock(4, 1).double(), level_of(*(torch.randn(1, 6, 4).double(),) * 2, (2, 3))
    nn.init.normal_(block.output.weight)
    cells, empty = block(level.student, level)
    x = level.student[0]
    for i in range(6):
        weight = torch.stack([block.query(x[i]) @ block.key(x[j]) for j in range(6)]).softmax(0)
        expected = x[i] + block.output(torch.stack([weight[j] * block.value(x[j]) for j in range(6)]).sum(0))
        torch.testing.assert_close(cells[0, i], expected)
    assert not empty.any()


def test_fgfi_equals_the_loops() -> None:
    objective, module, student, teacher, context = peer_case("fgfi")
    found, weight = objective.terms(module, level_of(student, teacher), context)["imitated"]
    anchors, usable = token_anchors(context.memory)
    total = 0.0
    for b, objects in enumerate(context.targets.split()):
        near = slow.imitated(objects.boxes.tolist(), anchors[b].tolist())
        assert 0 < sum(near) < len(near) and usable.all()
        adapted = module(student[b].T.unflatten(1, SIZE)[None])[0].flatten(1).T.tolist()
        distances = [slow.squared_distance(a, t) for a, t, n in zip(adapted, teacher[b].tolist(), near, strict=True) if n]
        total += sum(distances) / (2 * len(distances))
    assert float(found.detach()) == pytest.approx(total, rel=1e-6) and weight == 0.01  # anchors are in float32


def test_mgd_leaves_out_its_share_of_the_places() -> None:
    """Places that are left out cannot be seen: what stands there changes nothing."""
    objective, module, student, teacher, context = peer_case("mgd")
    large = level_of(torch.zeros(2, 10_000, 6), torch.zeros(2, 10_000, 8), (100, 100))
    kept = random_places(context.batch, large) <= 1 - objective.masked
    assert float(kept.double().mean()) == pytest.approx(0.35, abs=0.02) and not torch.equal(kept[0], kept[1])
    left_out = random_places(context.batch, level_of(student, teacher)) > 1 - objective.masked
    other = torch.where(left_out[..., None], student + 5, student)
    values = [float(objective.terms(module, level_of(s, teacher), context)["generated"][0].detach()) for s in (student, other, student + 5)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("name", PEERS)
def test_a_padded_map_counts_as_the_image_in_it(name: str) -> None:
    """Two columns and a line of padding around the same tokens change no term."""
    objective, module, student, teacher, context = peer_case(name)
    tall = (SIZE[0] + 1, SIZE[1] + 2)

    def padded(tokens: Tensor, value: float) -> Tensor:
        maps = tokens.transpose(1, 2).unflatten(2, SIZE)
        return nn.functional.pad(maps, (0, 2, 0, 1), value=value).flatten(2).transpose(1, 2)

    padding = padded(torch.zeros(2, SIZE[0] * SIZE[1], 1), 1.0)[..., 0].bool()
    ratios = torch.tensor((SIZE[1] / tall[1], SIZE[0] / tall[0])).expand(2, 1, 2)
    plain = level_of(student, teacher)
    level = Level(padded(student, 0), padded(teacher, 0), padding, tall, plain.extent, 0)
    around = SimpleNamespace(**vars(context) | {"memory": Memory(level.student, padding, (tall,), ratios, level.student)})
    if name == "mgd":
        drawn = random_places(context.batch, plain)
        before = module(plain, (drawn < 0.35).double())
        after = module(level, padded((drawn < 0.35).double()[..., None], 1.0)[..., 0])
        torch.testing.assert_close(after[~padding], before.flatten(0, 1))
        return
    expected = objective.terms(module, plain, context)
    for part, (value, _) in objective.terms(module, level, around).items():
        torch.testing.assert_close(value, expected[part][0], rtol=1e-9, atol=0, msg=part)


def test_fgd_learns_nothing_from_oneself() -> None:
    torch.manual_seed(0)
    student = DETECTORS["refine"].build(CLASSES)
    method = Method(student, Criterion(), (SetPrediction(), FGD("ema")), {"ema": Average(student, 0.9)}).double().eval()
    assert own_value(method(wide(make_batch((2, 3)))), "fgd") == 0


def test_defaults_of_the_peers() -> None:
    """Of their papers; FGD's as in DETRDistill's code."""
    weights = {}
    for name, objective in PEERS.items():
        weights[name] = {part: w for part, _, w in make(objective)(wide(make_batch((1,)))) if part.startswith(name)}
    assert weights["fgd"] == {"fgd/foreground": 1e-3, "fgd/background": 5e-4, "fgd/attention": 5e-4, "fgd/context": 5e-6}
    assert weights["mgd"] == {"mgd/generated": 2e-5} and weights["fgfi"] == {"fgfi/imitated": 0.01}
    assert weights["fkd"] == {"fkd/feature": 7e-5, "fkd/attention": 4e-3, "fkd/relation": 7e-5}


# teachers that differ


@pytest.mark.parametrize("name", list(DETECTORS))
def test_any_detector_learns_from_any(name: str) -> None:
    """Another architecture, width, number of queries and of stages."""
    teacher = replace(DETECTORS["dino"], transformer=replace(WIDE, decoder_layers=3), queries=20)
    method = make(FeatureDistillation(), DETECTORS[name], teacher)
    assert own_value(method(wide(make_batch((2, 1))))) > 0


def test_levels_of_the_same_stride_are_compared() -> None:
    """A teacher with levels 8 to 64 and a student with 8 to 32: as if the coarsest were not there."""
    four = replace(TEACHER, transformer=replace(WIDE, levels=4))
    method = make(FeatureDistillation(mask="ones"), teacher=four)
    batch = wide(make_batch((2, 1)))
    context = context_of(method, batch)
    assert len(context.teacher_outputs["teacher"].memory.levels) == 4 and len(context.memory.levels) == 3
    cut = sum(h * w for h, w in context.memory.levels)
    teacher_output = context.teacher_outputs["teacher"]
    memory = replace(teacher_output.memory, tokens=teacher_output.memory.tokens[:, :cut])
    context.teacher_outputs["teacher"] = replace(teacher_output, memory=memory)
    found = float(method(batch)["features/error"].detach().sum())
    with torch.no_grad():
        assert found == pytest.approx(expected(FeatureDistillation(mask="ones"), method, context, torch_twin=False), rel=1e-9)


class Stride(nn.Module):
    """A detector's strides and the sizes of its maps, without weights."""

    def __init__(self, *strides: int, width: int = 16, rounds: Callable[[float], int] = math.ceil) -> None:
        super().__init__()
        self.strides, self.width, self.rounds = strides, width, rounds
        self.register_buffer("mean", torch.zeros(3, 1, 1))

    def encode(self, images: Tensor, padding: Tensor) -> Any:
        assert images.shape[-2:] == padding.shape[-2:]
        return SimpleNamespace(levels=tuple(tuple(self.rounds(n / s) for n in images.shape[-2:]) for s in self.strides))


def first_layer_up(cells: float) -> int:
    """As floor, but not where a side is one pixel short of a multiple of 8, which the first layer has rounded up."""
    return math.floor(cells + 1 / 8)


@pytest.mark.parametrize("objective", [FeatureDistillation(), ReleasedFeatures(), *PEERS.values()], ids=lambda o: o.name)
def test_maps_that_would_differ_in_size_are_refused(objective: Objective) -> None:
    """Whatever the image: which side it is on, and from which layer on. Only levels that both have count."""
    up, down = Stride(8, 16, 32), Stride(8, 32, 64, rounds=math.floor)
    said = r"maps of other sizes.* of 129 x 127 pixels at stride 8: \(17, 16\) and \(16, 15\); stride 32: \(5, 4\) and \(4, 3\)\)"
    with pytest.raises(ValueError, match=f"{said}.*--objectives.{objective.name} none"):
        objective.check(up, {"teacher": down})  # type: ignore[arg-type, dict-item]
    with pytest.raises(ValueError, match=r"stride 8: \(2, 1\) and \(2, 2\)"):
        objective.check(Stride(8, rounds=math.floor), {"teacher": Stride(8, rounds=first_layer_up)})  # type: ignore[arg-type, dict-item]
    objective.check(down, {"teacher": Stride(8, 16, 32, rounds=math.floor)})  # type: ignore[arg-type, dict-item]


def test_a_backbone_that_rounds_down_is_refused_beside_one_that_rounds_up() -> None:
    """ConvNeXt's patches, at every level; two of its kind teach each other."""
    patches = replace(TEACHER, backbone=TimmBackboneConfig("convnext_atto", (1, 2, 3), "none", frozen_stages=0))
    with pytest.raises(ValueError, match=r"stride 8: \(9, 8\) and \(8, 7\); stride 16: \(5, 4\) and \(4, 3\); stride 32: \(3, 2\) and"):
        make(FeatureDistillation(), teacher=patches)
    make(FeatureDistillation(), student=patches, teacher=patches)


def test_the_look_at_sizes_leaves_no_trace() -> None:
    """Neither in running statistics nor in random numbers."""
    student, teacher = DETECTORS["dino"].build(CLASSES), TEACHER.build(CLASSES).eval()
    before, state = {name: tensor.clone() for name, tensor in student.state_dict().items()}, torch.get_rng_state()
    FeatureDistillation().check(student, {"teacher": teacher})
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in student.modules()) and not any(module.training for module in teacher.modules())


def test_pairs_that_cannot_work_are_refused_with_the_reason() -> None:
    objective = FeatureDistillation()
    with pytest.raises(ValueError, match=r"strides are \[32\] and those of 'teacher' \[8, 16\]"):
        objective.check(Stride(32), {"teacher": Stride(8, 16)})  # type: ignore[arg-type, dict-item]
    with pytest.raises(ValueError, match="called 'teacher', but the recipe has none"):
        objective.check(Stride(32), {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the student has 16, the teacher 24"):
        ReleasedFeatures().check(Stride(8), {"teacher": Stride(8, width=24)})  # type: ignore[arg-type, dict-item]


def test_every_row_of_the_tables_is_one_override() -> None:
    for words, objective in (
        ("--objectives.features.mask mean", FeatureDistillation(mask="mean")),
        ("--objectives.features.mask ones", FeatureDistillation(mask="ones")),
        ("--objectives.features.similarity cosine", FeatureDistillation(similarity="cosine")),
        ("--objectives.features released-features", ReleasedFeatures()),
    ):
        recipe, _ = read("small-dino", ["--objectives.features", "feature-distillation", *words.split()])
        assert objective in recipe.objectives
    for name, peer in PEERS.items():
        assert peer in read("small-dino", [f"--objectives.{name}", name])[0].objectives


def test_defaults_are_the_papers() -> None:
    method = make(FeatureDistillation())
    losses = {name: weight for name, _, weight in method(wide(make_batch((1,))))}
    assert losses["features/error"] == 20 and MOST_PAIRS == 100 and FeatureDistillation().gamma == 0.5
    phi = method.adapters["features"]
    assert isinstance(phi, nn.Linear) and (phi.in_features, phi.out_features) == (16, 24)


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
