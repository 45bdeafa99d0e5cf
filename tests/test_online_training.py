"""Online distillation as a run: the teacher through interruptions, Stop Update, processes and micro-batches; what is logged and left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steadydetr.training.pictures
from steadydetr.checkpoints.folder import load_detector
from steadydetr.cli import main
from steadydetr.learning.teachers import EMATeacher
from steadydetr.recipes.base import Recipe
from steadydetr.runs.models import average_state
from steadydetr.tools.evaluate import measure_checkpoint
from steadydetr.training.loop import train, train_epoch
from steadydetr.training.preparation import prepare, remarks
from tests.reference import online as slow
from tests.test_train import (
    StopAfter,
    assert_close_losses,
    assert_close_weights,
    assert_equal_weights,
    records,
    tiny,
    train_in_processes,
    weights,
    without_batch_norm,
)

Whole = Callable[[str], Path]
DINO, DEFORMABLE = "small-od-dino", "small-od-deformable-detr"


def tiny_online(name: str, stop_update: bool = True, **training: object) -> Recipe:
    """Two epochs of six steps; the rate drops, and the teacher is frozen, after the first. A horizon of ten steps."""
    recipe = tiny(name, **({"schedule": "step", "drop_epochs": (1,)} | training))
    return replace(recipe, teachers=(EMATeacher(0.9, stop_update),))


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "last/training_state.pt", weights_only=True)


def teacher_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    prefix = "teachers.ema.model."
    return {name.removeprefix(prefix): value for name, value in state["method"].items() if name.startswith(prefix)}


@pytest.fixture(scope="module", autouse=True)
def without_pictures() -> Iterator[None]:
    """They would take most of the time of such short runs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_curves", "draw_first_predictions", "draw_sampling_points"):
            patch.setattr(steadydetr.training.pictures, name, lambda *_: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run of a recipe that nothing interrupted."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / name
        assert train(tiny_online(name), folder, device="cpu")["finished"]
        return folder

    return run


@pytest.mark.parametrize(
    ("name", "steps"), [(DINO, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((DINO, 6), (DINO, 9))), (DEFORMABLE, 9)]
)
def test_resumed_run_equals_an_uninterrupted_one(
    whole: Whole, name: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, before, at and after the freeze: student, teacher, evaluated average, optimiser and all that was logged."""
    recipe, parts = tiny_online(name), tmp_path / "run"
    with monkeypatch.context() as patch:
        StopAfter(steps, patch)
        assert not train(recipe, parts, device="cpu")["finished"]
    assert (state_of(parts)["average"] is None) == (steps <= 6)  # until the freeze it is the teacher
    assert train(recipe, parts, resume=True, device="cpu")["finished"]
    assert_equal_weights(whole(name) / "last", parts / "last")
    for part in ("method", "average", "optimiser"):
        torch.testing.assert_close(state_of(parts)[part], state_of(whole(name))[part], rtol=0, atol=0)
    assert records(whole(name)) == records(parts)


@pytest.mark.parametrize(
    ("training", "stop_update", "learning"),
    [
        ({"drop_epochs": (2,)}, True, 2),
        ({"drop_epochs": (2, 3)}, True, 2),
        ({"drop_epochs": (2,)}, False, 5),
        ({"schedule": "cosine"}, True, 5),
        ({"drop_epochs": (2,), "ema_decay": 0.5}, True, 2),
    ],
    ids=["stop", "first of two drops", "no stop", "no drop", "two averages"],
)
def test_teacher_stops_at_the_first_drop_and_the_average_never(
    tmp_path: Path, training: dict[str, object], stop_update: bool, learning: int
) -> None:
    """Both against the slow twin after each of five steps, every parameter and running statistic; counters are copied."""
    recipe = tiny_online(DINO, stop_update, epochs=5, **training)
    recipe = replace(recipe, data=replace(recipe.data, limit=4))  # an epoch is one step
    run = prepare(recipe, tmp_path / "run", resume=False, device="cpu")
    assert run.loader.steps_per_epoch == 1 and run.method.ema is not None and run.averages.evaluated is not None
    decay = recipe.training.ema_decay
    states = [copy.deepcopy(run.method.student.state_dict())]
    for step in range(1, 6):
        train_epoch(run, step - 1)
        states.append(copy.deepcopy(run.method.student.state_dict()))
        assert_average(run.method.ema.model, states[: min(step, learning) + 1], 0.9)
        assert_average(run.averages.evaluated.model, states[: step + 1], decay or 0.9)
        assert (run.averages.evaluated is run.method.ema) == (step <= learning and not decay)
        assert run.models["ema"] is run.averages.evaluated.model  # what is evaluated


def assert_average(model: torch.nn.Module, states: list[dict[str, Tensor]], decay: float) -> None:
    for name, found in model.state_dict().items():
        expected = states[-1][name]
        if found.is_floating_point():
            expected = slow.averaged([state[name].double() for state in states[1:]], states[0][name].double(), decay).float()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_horizon_of_a_run_is_a_share_of_its_steps(tmp_path: Path) -> None:
    run = prepare(tiny(DINO, epochs=20), tmp_path / "run", resume=False, device="cpu")
    assert run.method.ema is not None
    assert run.method.ema.decay == pytest.approx(1 - 1 / (0.028 * 120)) == slow.decay(120)


def test_an_average_that_is_far_behind_is_said(tmp_path: Path) -> None:
    """0.9996 is of the paper's 89,000 steps; a horizon above a tenth of the run is remarked on, with the one that fits."""
    recipe = tiny(DINO, epochs=20)
    assert not remarks(recipe, 120)
    (said,) = remarks(replace(recipe, teachers=(EMATeacher(0.9996),)), 120)
    assert "teachers.ema.decay = 0.9996 averages over the last 2500 steps, but the run has 120" in said and "0.7024 (None" in said
    assert not remarks(replace(recipe, teachers=(EMATeacher(0.9996),)), 89_000)
    (said,) = remarks(replace(recipe, teachers=(), training=replace(recipe.training, ema_decay=0.999)), 9_000)
    assert said.startswith("training.ema_decay = 0.999 averages")


@pytest.mark.parametrize("name", [DINO, DEFORMABLE])
def test_what_is_logged(whole: Whole, name: str) -> None:
    """Terms of all objectives and measures at every step; both weights at every evaluation, and how far they agree."""
    logged = records(whole(name))
    terms = {f"{group}/{part}" for group in ("main", "prediction", "auxiliary") for part in ("class", "l1", "giou")}
    steps = [record for record in logged if record["kind"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, 13))
    for record in steps:
        assert terms <= record["losses"].keys()
        assert record["measures"].keys() == {"main/same_query_as_teacher", "main/without_counterpart", "auxiliary/targets_outside"}
        assert all(0 <= value <= 1 for value in record["measures"].values())
        assert name == DINO or record["measures"]["main/without_counterpart"] == 0  # learned queries all have one
    assert any(0 < record["measures"]["main/same_query_as_teacher"] < 1 for record in steps)
    for kind in ("eval", "stability"):
        found = [(record["step"], record["weights"]) for record in logged if record["kind"] == kind]
        assert found == [(6, "model"), (6, "ema"), (12, "model"), (12, "ema")]


def test_what_is_left_is_the_student_with_its_average_beside(whole: Whole) -> None:
    """No word of the teacher in the weights; the average is not the teacher, which was frozen."""
    run = whole(DINO)
    loaded, state = load_detector(run / "last").detector, state_of(run)
    student = {name.removeprefix("student."): value for name, value in state["method"].items() if name.startswith("student.")}
    torch.testing.assert_close(weights(run / "last"), student, rtol=0, atol=0)
    torch.testing.assert_close(dict(loaded.state_dict()), student, rtol=0, atol=0)
    average, teacher = average_state(state), teacher_of(state)
    assert average is state["average"] and average is not None and average.keys() == teacher.keys() == student.keys()
    assert not [name for name in dict(loaded.named_parameters()) if torch.equal(average[name], teacher[name])]
    assert weights(run / "best").keys() == student.keys()
    torch.testing.assert_close(dict(load_detector(run / "ema").detector.state_dict()), average, rtol=0, atol=0)


def test_stability_of_a_run_is_what_was_logged(whole: Whole, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the average, not of the frozen teacher; also as a command."""
    run, data = whole(DINO), "shapes:size=64,images=24"
    model, average = [record for record in records(run) if record["kind"] == "stability"][-2:]
    measured = measure_checkpoint(run, data, device="cpu", workers=0)
    assert list(measured) == ["model", "ema"]
    assert measured["model"].unstable_score == model["unstable_score"] and measured["model"].consistency == model["consistency"]
    assert measured["ema"].unstable_score == average["unstable_score"] and measured["ema"].between_stages == average["between_stages"]
    main(["stability", str(run), data, "--device", "cpu", "--workers", "0"])
    shown = capsys.readouterr().out
    assert "trained" in shown and "average" in shown and f"{measured['ema'].between_stages[0]:.3f}" in shown


@pytest.mark.parametrize("name", [DINO, DEFORMABLE])
def test_micro_batches_equal_the_whole_batch(tmp_path: Path, name: str) -> None:
    recipe = two_steps(name)
    for folder, accumulation in (("whole", 1), ("parts", 2)):
        train(replace(recipe, training=replace(recipe.training, accumulation=accumulation)), tmp_path / folder, device="cpu")
    assert_close_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow  # tests/test_train.py has a shorter one
def test_two_processes_equal_one(tmp_path: Path) -> None:
    recipe = two_steps(DINO)
    train(recipe, tmp_path / "one", device="cpu")
    train_in_processes(2, recipe, tmp_path / "two")
    assert_close_runs(tmp_path / "one", tmp_path / "two")


def two_steps(name: str) -> Recipe:
    """One with a learning and one with a frozen teacher, of four images each; frozen batch norm and no dropout."""
    recipe = without_batch_norm(tiny_online(name, epochs=1, drop_epochs=(0.5,), stability_images=0))
    return replace(recipe, data=replace(recipe.data, limit=8))


def assert_close_runs(a: Path, b: Path) -> None:
    """Students, teachers and averages."""
    assert_close_losses(a, b)
    assert_close_weights(a / "last", b / "last")
    first, second = state_of(a), state_of(b)
    for found, expected in ((teacher_of(second), teacher_of(first)), (second["average"], first["average"])):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
