"""Every number of a recipe against what the configuration of the original says.

The numbers stand in recipes_of_the_papers.json, written from the originals' configs and the papers, not from our code, with the source
of each. Where a recipe of ours departs from its source, the file says so too, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from steadydetr.data.hold_out import HoldOut
from steadydetr.learning.teachers import TrainedTeacher
from steadydetr.limits import Limits
from steadydetr.objectives import AssignmentDistillation, FeatureDistillation, LogitsDistillation
from steadydetr.recipes import find, names
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.distill import distilled
from steadydetr.recipes.schedules import for_epochs
from steadydetr.recipes.stable import stable

TABLE = json.loads(Path(__file__).with_name("recipes_of_the_papers.json").read_text())
OF_PAPERS = [name for name in names() if name.endswith(("ep", "-voc"))]


def stated(name: str) -> Iterator[tuple[str, Any, str]]:
    """Field, value and source of all that the file says of a recipe."""
    for entry in TABLE["stated"]:
        if any(fnmatch(name, each) for each in entry["recipes"]) and not any(fnmatch(name, each) for each in entry.get("but", ())):
            for path, value in entry["values"].items():
                yield path, value, entry["source"]


@cache
def sources(name: str) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for path, value, source in stated(name):
        assert path not in found, f"{path} of {name} is stated twice: {found[path]} and {(value, source)}"
        found[path] = value, source
    return found


def departure(name: str, path: str) -> dict[str, Any] | None:
    fitting = (each for each in TABLE["departures"] if each["field"] == path and any(fnmatch(name, pattern) for pattern in each["recipes"]))
    return next(fitting, None)


def value_at(recipe: Recipe, path: str) -> Any:
    """`objectives.denoising.number` is that of the objective of this name; `kind` the name of the class, `names` those of all."""
    value: Any = recipe
    for part in path.split("."):
        if part == "kind":
            return type(value).__name__
        if isinstance(value, tuple):
            value = [each.name for each in value] if part == "names" else next(each for each in value if each.name == part)
        else:
            value = getattr(value, part)
    if callable(value):
        return value.__name__
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", names())
def test_a_recipe_is_what_its_source_says(name: str) -> None:
    recipe = find(name)
    for path, (value, source) in sources(name).items():
        ours, known = value_at(recipe, path), departure(name, path)
        if known is not None:
            assert ours == known["ours"] != value, f"{path} of {name} is {ours}: {source} has {value}, the departure is {known}"
        else:
            assert ours == value, f"{path} of {name} is {ours}, but {TABLE['sources'][source]} has {value}"


NEUTRAL: dict[str, Any] = {  # what there are options for, and papers do not use
    "data.decode": "exact",
    "data.group_by_shape": False,
    "data.masks": False,
    "criterion.matching": None,
    "criterion.masks": None,
    "detector.backbone.image_channels": 3,
    "training.encoder_lr_factor": 1.0,
    "training.epoch_steps": 0,
    "training.freeze": [],
    "training.patience": 0,
    "training.passes": 0,
    "training.lr_batch_size": 0,
    "data.transform.photometric": 0.0,
    "data.transform.zoom_out": 1.0,
    "data.transform.zoom": 1.0,
    "detector.backbone.mean": None,  # as timm has it: ImageNet's, for all of them
    "detector.backbone.std": None,
    "teachers.teacher.classes": [],
}


@pytest.mark.parametrize("name", OF_PAPERS)
def test_every_number_of_a_papers_recipe_has_a_source(name: str) -> None:
    """Down to the last field, save what only says how a run is logged and kept."""
    ours = {
        *(f"data.{field.name}" for field in (*fields(Limits), *fields(HoldOut))),
        *(f"training.{field}" for field in ("compile", "tf32", "eval_every", "eval_batch_size", "save_every", "log_every")),
        *(f"training.{field}" for field in ("stability_images", "stability_steps")),
        *(f"data.{field}" for field in ("workers", "timeout", "unreadable", "same_images")),
        *("detector.transformer.checkpointing", "detector.checkpointing"),
    }
    missing = {path for path in leaves(find(name)) if path not in ours | NEUTRAL.keys()} - sources(name).keys()
    assert not missing, f"{name}: the source of {sorted(missing)} is not stated"
    neutral = {path: value for path, value in NEUTRAL.items() if path in leaves(find(name)) and path not in sources(name)}
    assert all(value_at(find(name), path) == value for path, value in neutral.items())


def leaves(recipe: Recipe) -> Iterator[str]:
    """The paths of detector, criterion, data, training, top and nms, and of denoising."""
    roots = {path: getattr(recipe, path) for path in ("detector", "criterion", "data", "training", "top", "nms")}
    roots |= {f"objectives.{each.name}": each for each in recipe.objectives if each.name == "denoising"}
    roots |= {f"teachers.{each.name}": each for each in recipe.teachers}
    while roots:
        path, value = roots.popitem()
        if hasattr(value, "__dataclass_fields__"):
            roots |= {f"{path}.{field}": getattr(value, field) for field in value.__dataclass_fields__}
        else:
            yield path


def test_every_pattern_and_source_of_the_file_is_used() -> None:
    for entry in TABLE["stated"]:
        assert entry["source"] in TABLE["sources"]
        for pattern in (*entry["recipes"], *entry.get("but", ())):
            assert any(fnmatch(name, pattern) for name in names()), pattern
    for each in TABLE["departures"]:
        assert any(departure(name, each["field"]) is each for name in names()), each
        assert each["why"]


@pytest.mark.parametrize(("epochs", "drop"), [(12, 11), (24, 20), (36, 30), (50, 40)])
def test_any_recipe_in_another_length_drops_where_the_originals_do(epochs: int, drop: int) -> None:
    start = find("dab-deformable-detr-r50-12ep")
    changed = for_epochs(start, epochs, "long", "12.3")
    training = replace(start.training, epochs=epochs, drop_epochs=(drop,))
    assert changed == replace(start, name="dab-deformable-detr-r50-long", training=training, reported="12.3")
    assert for_epochs(start, epochs, "long", drop=7).training.drop_epochs == (7,) and not for_epochs(start, epochs, "long").reported


def test_any_recipe_with_a_trained_teacher() -> None:
    """DETRDistill's objectives come where nothing learns from the teacher yet, with a weight of features that does not drown detection.

    What was reported for the student alone is not reported for it. A teacher that is named replaces the one before.
    """
    start, student = find("od-dino-4scale-r50-12ep"), find("detrdistill-deformable-detr-r101-r50-50ep")
    kinds = (LogitsDistillation(), FeatureDistillation(weight=2.0), AssignmentDistillation())
    changed = distilled(start, "a")
    assert start.reported
    assert changed == replace(
        start,
        name=f"distilled-{start.name}",
        objectives=(*start.objectives, *kinds),
        teachers=(*start.teachers, TrainedTeacher("a")),
        reported="",
        notes=f"{start.notes}, with a trained teacher",
    )
    assert find("small-distill-deformable-detr").objectives[-3:] == kinds
    assert student.objectives[-3:] == (LogitsDistillation(), FeatureDistillation(weight=20.0), AssignmentDistillation())
    assert distilled(changed) == changed and distilled(changed, "b") == replace(changed, teachers=(*start.teachers, TrainedTeacher("b")))
    assert distilled(student) == student and distilled(student, "a") == replace(student, teachers=(TrainedTeacher("a"),))


def test_stable_parts_of_any_recipe() -> None:
    assert stable(find("small-dino"), "max", "1.2").reported == "1.2"
    assert [stable(find("small-dino"), "max", "", name).name for name in ("", "other")] == ["stable-small-dino", "other"]


@pytest.mark.parametrize("name", OF_PAPERS)
def test_reported_numbers_are_those_of_the_page(name: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    assert f"| `{name}` | {find(name).reported or '-'} |" in page
