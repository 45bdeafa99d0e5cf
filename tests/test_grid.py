"""Every detector with every method: a training step, or a reason before the first step. docs/grid.md shows it."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from steadydetr import kinds
from steadydetr.detectors import DetectorConfig
from steadydetr.learning.class_terms import ClassCost, ClassTarget
from steadydetr.nn.configs import FusionKind
from steadydetr.objectives import Objective, TeacherInit
from tests.conftest import DETECTORS, make_batch
from tests.write_grid_page import COLUMNS, PAGE, PEERS, ROWS, Row, flagged, page, reason, recipe_of, refusal, start

VARIANTS = ("dab-two-stage", "dino-shared-decoder")
RELATIVES = ("refine", "two-stage", "dab", "dn-dab", "h-deformable")  # of Deformable DETR and DINO
BY_NAME = {row.name: row for row in ROWS}


def is_slow(detector: str, row: Row) -> bool:
    """What differs little from other cells: variants of detectors, and of relatives all but every fifth row, in turn."""
    relative = detector in RELATIVES and ROWS.index(row) % len(RELATIVES) != RELATIVES.index(detector)
    part = row.name in ("simple memory fusion", "matching distillation", "prediction distillation") and detector != "dino"
    whole = row.name == "the three, without fusion" and refusal(detector, BY_NAME["the three together"]) is None
    peer = row.name.partition(", ")[2] in PEERS and detector == "dino"
    return detector in VARIANTS or relative or part or whole or peer


CELLS = [
    pytest.param(detector, row, id=f"{detector}-{row.name}".replace(" ", "-"), marks=[pytest.mark.slow] * is_slow(detector, row))
    for row in ROWS
    for detector in DETECTORS
]


@pytest.mark.parametrize(("detector", "row"), CELLS)
def test_cell(detector: str, row: Row) -> None:
    """All objectives of the recipe have losses, and all that they train gets a finite gradient; or the reason says what to do."""
    if refused := refusal(detector, row):
        assert re.search(refused[1], reason(detector, row))
        return
    recipe = recipe_of(detector, row)
    method = start(recipe)
    losses = method(make_batch((2, 3), masks=recipe.criterion.masks is not None))
    losses.total.backward()
    names = {name.partition("/")[0] for name, _, _ in losses}
    own = {objective.name for objective in recipe.objectives if not isinstance(objective, TeacherInit)}
    assert own <= names <= own | {"proposals"}
    assert any(name.endswith("/mask") for name, _, _ in losses) == (recipe.criterion.masks is not None)
    trained = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
    assert [name for name, grad in trained.items() if grad is None] == method.unused_parameters
    assert not [name for name, grad in trained.items() if grad is not None and not grad.isfinite().all()]


def test_the_page_shows_the_grid() -> None:
    """Printed with -s."""
    text = page()
    print("\n", text)
    assert PAGE.read_text(encoding="utf-8") == text, "python -m tests.write_grid_page"


def test_nothing_is_forgotten() -> None:
    """Every detector has a column and a name; every objective, class target and cost, and every fusion is in a row."""

    def ours(role: type) -> set[type]:
        return {part for part in kinds.options(role).values() if part.__module__.startswith("steadydetr.")}

    assert {type(config) for config in DETECTORS.values()} >= ours(DetectorConfig) and set(COLUMNS) >= set(DETECTORS)
    recipes = [flagged("dino", row) for row in ROWS]
    assert {type(o) for recipe in recipes for o in recipe.objectives} >= ours(Objective)
    assert {type(recipe.criterion.class_target) for recipe in recipes} >= ours(ClassTarget)
    assert {type(recipe.criterion.class_cost) for recipe in recipes} >= ours(ClassCost)
    assert {recipe.detector.transformer.fusion for recipe in recipes} == set(get_args(FusionKind))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["denoising of DINO", "matching distillation", "DETRDistill, FGD", "DETRDistill, Teacher Init"])
def test_flags_mean_the_same_for_every_detector(name: str) -> None:
    """So that they are read once."""
    for detector in ("conditional", "h-deformable"):
        assert recipe_of(detector, BY_NAME[name]) == flagged(detector, BY_NAME[name])
