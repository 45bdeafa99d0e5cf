"""FGD, MGD, FKD and FGFI, which DETRDistill is compared with: loops, padding, defaults."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadydetr.detectors.deformable import token_anchors
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.frozen import Average
from steadydetr.objectives import FGD, SetPrediction
from steadydetr.objectives.adapters import NonLocalBlock
from steadydetr.objectives.feature_levels import Level
from steadydetr.objectives.method import Method
from steadydetr.objectives.mgd import random_by_token
from steadydetr.structures import Memory
from tests.conftest import CLASSES, DETECTORS, make_batch
from tests.feature_steps import BY_LEVEL, make, own_value
from tests.reference import features as slow
from tests.steps import wide

SIZE = (5, 7)


def level_of(student: Tensor, teacher: Tensor, size: tuple[int, int] = SIZE) -> Level:
    """Tokens [B, L, d] without padding."""
    padding = torch.zeros(student.shape[:2], dtype=torch.bool)
    return Level(student, teacher, padding, size, torch.tensor(size[::-1]).expand(len(student), 2), 0)


def case_of(name: str) -> tuple[Any, nn.Module, Tensor, Tensor, Any]:
    """Objective, its module away from where it starts, tokens of two images and what a context says of them."""
    torch.manual_seed(1)
    objective: Any = BY_LEVEL[name]
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
    objective, module, student, teacher, context = case_of("fgd")
    found = {name: float(value.detach()) for name, (value, _) in objective.terms(module, level_of(student, teacher), context).items()}
    expected = [0.0, 0.0, 0.0]
    for b, objects in enumerate(context.targets.split()):
        mask = slow.foreground([slow.in_cells(box, SIZE[1], SIZE[0]) for box in objects.boxes.tolist()], SIZE)
        terms = slow.fgd(module["align"](student[b]).tolist(), teacher[b].tolist(), mask, objective.temperature)
        expected = [a + t for a, t in zip(expected, terms, strict=True)]
    assert [found["foreground"], found["background"], found["attention"]] == pytest.approx(expected, rel=1e-9)


def test_fkd_equals_the_loops() -> None:
    objective, module, student, teacher, context = case_of("fkd")
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
    objective, module, student, teacher, context = case_of("fgfi")
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
    objective, module, student, teacher, context = case_of("mgd")
    large = level_of(torch.zeros(2, 10_000, 6), torch.zeros(2, 10_000, 8), (100, 100))
    kept = random_by_token(context.batch, large) <= 1 - objective.masked
    assert float(kept.double().mean()) == pytest.approx(0.35, abs=0.02) and not torch.equal(kept[0], kept[1])
    left_out = random_by_token(context.batch, level_of(student, teacher)) > 1 - objective.masked
    other = torch.where(left_out[..., None], student + 5, student)
    values = [float(objective.terms(module, level_of(s, teacher), context)["generated"][0].detach()) for s in (student, other, student + 5)]
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("name", BY_LEVEL)
def test_a_padded_map_counts_as_the_image_in_it(name: str) -> None:
    """Two columns and a line of padding around the same tokens change no term."""
    objective, module, student, teacher, context = case_of(name)
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
        drawn = random_by_token(context.batch, plain)
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


def test_defaults_are_those_of_the_papers() -> None:
    """Of their papers; FGD's as in DETRDistill's code."""
    weights = {}
    for name, objective in BY_LEVEL.items():
        weights[name] = {part: w for part, _, w in make(objective)(wide(make_batch((1,)))) if part.startswith(name)}
    assert weights["fgd"] == {"fgd/foreground": 1e-3, "fgd/background": 5e-4, "fgd/attention": 5e-4, "fgd/context": 5e-6}
    assert weights["mgd"] == {"mgd/generated": 2e-5} and weights["fgfi"] == {"fgfi/imitated": 0.01}
    assert weights["fkd"] == {"fkd/feature": 7e-5, "fkd/attention": 4e-3, "fkd/relation": 7e-5}
