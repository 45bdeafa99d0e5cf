"""Offline distillation as a run: interruptions, processes, what is saved and what is refused, and the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import load_detector, save_detector
from steadydetr.cli import main
from steadydetr.config import to_plain
from steadydetr.data import DataConfig, FixedSize, FixedSizeTransform, open_data
from steadydetr.detectors import DetectorConfig, TransformerConfig
from steadydetr.learning.criterion import Weights
from steadydetr.learning.teachers import EMATeacher, TrainedTeacher
from steadydetr.objectives import FeatureDistillation, SetPrediction, TeacherInit
from steadydetr.recipes import find
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.distill import distilled
from steadydetr.runs.folder import RunConfig, RunFolder
from steadydetr.training.loop import train
from tests.conftest import BACKBONE, DETECTORS, TINY
from tests.test_train import (
    StopAfter,
    assert_close_losses,
    assert_close_weights,
    assert_equal_weights,
    records,
    weights,
    without_batch_norm,
)

SHAPES = "shapes:size=64,images=16"
WIDER = replace(TINY, width=24, heads=3, decoder_layers=3)
NAMES = open_data(SHAPES, "val").index.classes


def save_teacher(folder: Path, config: DetectorConfig, classes: tuple[str, ...] = NAMES, seed: int = 1) -> str:
    """A detector that nobody has trained; its scores differ from query to query."""
    torch.manual_seed(seed)
    detector = config.build(len(classes))
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_detector(folder, detector.state_dict(), DetectorCard(config, classes, tuple(range(len(classes)))))
    return str(folder)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return save_teacher(tmp_path / "teacher", replace(DETECTORS["refine"], queries=9, transformer=WIDER))


def tiny_distilled(teacher: str, **training: Any) -> Recipe:
    """Two epochs of four steps, of a student with more queries, fewer stages and less width than its teacher."""
    start = find("small-distill-deformable-detr")
    recipe = replace(
        start,
        detector=replace(start.detector, backbone=BACKBONE, transformer=replace(TINY, dropout=0.1), queries=12),
        data=DataConfig(SHAPES, transform=FixedSizeTransform(64, 64), resize=FixedSize(64, 64), workers=0),
        training=replace(start.training, **({"epochs": 2, "batch_size": 4, "log_every": 1, "warmup_steps": 2} | training)),
    )
    return distilled(recipe, teacher)


def state_of(run: Path) -> dict[str, Any]:
    return torch.load(run / "last/training_state.pt", weights_only=True)


def adapters_of(run: Path) -> dict[str, Tensor]:
    return {name: value for name, value in state_of(run)["method"].items() if name.startswith("adapters.")}


def test_resumed_run_equals_an_uninterrupted_one(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, adapters and optimiser included. Neither they nor the teacher are in the student's checkpoint."""
    recipe, whole, parts = tiny_distilled(teacher), tmp_path / "whole", tmp_path / "parts"
    train(recipe, whole, device="cpu")
    with monkeypatch.context() as patch:
        StopAfter(3, patch)
        assert not train(recipe, parts, device="cpu")["finished"]
    started = adapters_of(parts)
    assert train(recipe, parts, resume=True, device="cpu")["finished"]
    assert_equal_weights(whole / "last", parts / "last")
    for part in ("method", "optimiser"):
        torch.testing.assert_close(state_of(parts)[part], state_of(whole)[part], rtol=0, atol=0)
    assert records(whole) == records(parts)
    assert started and not any(torch.equal(value, started[name]) for name, value in adapters_of(parts).items())
    assert not [name for name in state_of(parts)["method"] if not name.startswith(("student.", "adapters."))]
    assert weights(parts / "best").keys() == load_detector(parts).detector.state_dict().keys()
    logged = [record["losses"] for record in records(parts) if record["kind"] == "train"]
    assert all({"main/l1", "logits/positive_class", "logits/negative_giou", "assignment/class"} <= losses.keys() for losses in logged)


def interrupted(recipe: Recipe, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two steps, with a step logged that the checkpoint has not, as where a run was killed."""
    with monkeypatch.context() as patch:
        StopAfter(2, patch)
        train(recipe, output, device="cpu")
    folder = RunFolder(output)
    folder.append_record(list(folder.read_records())[-1] | {"step": 3})


@pytest.mark.parametrize("width", [WIDER, TINY], ids=["as wide", "of another width"])
@pytest.mark.parametrize("place", ["teacher", "other"])
def test_another_teacher_is_refused_at_resume(
    place: str, width: TransformerConfig, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the place of the first or elsewhere, also where what the objectives train would not fit it. The run stays as it was."""
    recipe, output = tiny_distilled(teacher), tmp_path / "run"
    interrupted(recipe, output, monkeypatch)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    other = save_teacher(tmp_path / place, replace(DETECTORS["refine"], queries=9, transformer=width), seed=2)
    with pytest.raises(ValueError, match=r"run/last was taught by another teacher: the weights .* differ.*name it by --teacher"):
        train(distilled(recipe, other), output, resume=True, device="cpu")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_teacher_may_be_moved_before_resuming(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But nothing else of the recipe may change with it."""
    recipe, output = tiny_distilled(teacher), tmp_path / "run"
    interrupted(recipe, output, monkeypatch)
    moved = distilled(recipe, str(Path(teacher).rename(tmp_path / "moved")))
    with pytest.raises(ValueError, match=r"recipe\.top: \d+ -> 7$"):
        train(replace(moved, top=7), output, resume=True, device="cpu")
    assert train(moved, output, resume=True, device="cpu")["finished"]


@pytest.mark.slow
def test_an_objective_that_drowns_detection_is_named_once(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the first epoch in which it takes more than half of the gradient on average, and not again."""
    for weight in (1e-3, 1e5):
        recipe = tiny_distilled(teacher)
        objectives = tuple(replace(o, weight=weight) if isinstance(o, FeatureDistillation) else o for o in recipe.objectives)
        train(replace(recipe, objectives=objectives), tmp_path / f"{weight}", device="cpu")
        said = " ".join(capsys.readouterr().out.split())
        shares = [record["measures"]["features/gradient_share"] for record in records(tmp_path / f"{weight}") if record["kind"] == "train"]
        loud = sum(shares[:4]) / 4 > 0.5
        assert loud == (weight > 1)
        assert said.count("objective features took") == loud
        assert not loud or (
            "at the features that it compares, on average over epoch 1, so that" in said and "--objectives.features." in said
        )


def test_a_teachers_run_says_what_it_is_matched_by(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its cost is another one than the student's, a run goes on only with a teacher of that cost."""
    student = tiny_distilled(teacher)
    run = tmp_path / "taught"
    for cost in (student.criterion.cost_weights, Weights(9.0, 1.0, 1.0)):
        theirs = replace(student, name="theirs", criterion=replace(student.criterion, cost_weights=cost, alpha=None))
        folder = RunFolder(tmp_path / f"theirs-{cost.label}")
        folder.path.mkdir()
        folder.write_config(RunConfig(to_plain(theirs, "recipe"), NAMES, tuple(range(len(NAMES))), {}))
        shutil.copytree(teacher, folder.path / "best")
    same, different = (distilled(student, str(tmp_path / f"theirs-{label}")) for label in (2.0, 9.0))
    assert same.build(NAMES).criteria == {} and student.build(NAMES).criteria == {}
    assert different.build(NAMES).criteria["teacher"].cost_weights == Weights(9.0, 1.0, 1.0)
    interrupted(different, run, monkeypatch)
    with pytest.raises(ValueError, match=r"was taught by another teacher: the weights .*, or the matching cost of its run, differ"):
        train(same, run, resume=True, device="cpu")
    assert train(different, run, resume=True, device="cpu")["finished"]


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from steadydetr.training.loop import train
from tests.test_distill_training import one_epoch
train(one_epoch(sys.argv[2], int(sys.argv[3])), Path(sys.argv[1]), device="cpu")
"""


def one_epoch(teacher: str, accumulation: int = 1) -> Recipe:
    """Two steps without dropout and with frozen batch norm."""
    recipe = without_batch_norm(tiny_distilled(teacher, epochs=1, accumulation=accumulation, stability_images=0))
    return replace(recipe, data=replace(recipe.data, limit=8))


@pytest.mark.slow  # tests/test_train.py has a shorter one
def test_processes_and_micro_batches_equal_one(teacher: str, tmp_path: Path) -> None:
    """Student and adapters."""
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    train(one_epoch(teacher), tmp_path / "one", device="cpu")
    train(one_epoch(teacher, accumulation=2), tmp_path / "parts", device="cpu")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    words = [str(tmp_path / "two"), teacher, "1"]
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("parts", "two"):
        assert_close_losses(tmp_path / "one", tmp_path / name)
        assert_close_weights(tmp_path / "one/last", tmp_path / name / "last")
        torch.testing.assert_close(adapters_of(tmp_path / name), adapters_of(tmp_path / "one"), rtol=1e-3, atol=2e-4)


def command_of(recipe: str, teacher: str, output: Path, *more: str) -> list[str]:
    sizes = [word for part in ("transform", "resize") for side in ("height", "width") for word in (f"--data.{part}.{side}", "64")]
    rest = ["--data.workers", "0", "--data.limit", "8", "--device", "cpu", "--training.epochs", "1", "--training.batch-size", "4"]
    return ["distill", recipe, "--teacher", teacher, "--data", SHAPES, "--output", str(output), *sizes, *rest, *more]


def test_distill_command(teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe of another detector, whose options go by flags; going on with it takes the same command."""
    words = command_of("small-dino", teacher, tmp_path / "run", "--objectives.logits.candidates", "5", "--detector.queries", "14")
    main(words)
    assert "building distilled-small-dino on cpu" in capsys.readouterr().out
    recipe = RunFolder(tmp_path / "run").read_config().recipe()
    assert recipe.teachers == (TrainedTeacher(teacher),)
    assert {objective.name for objective in recipe.objectives} >= {"main", "denoising", "logits", "assignment"}
    (tmp_path / "run/summary.json").unlink()
    main([*words, "--resume"])
    assert (tmp_path / "run/summary.json").exists()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    return capsys.readouterr().err


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line, and nothing is left behind."""
    output = tmp_path / "run"
    assert "the teacher: " in (text := refused(command_of("small-dino", "nowhere", output), capsys)) and "no file or folder nowhere" in text
    strangers = save_teacher(tmp_path / "strangers", DETECTORS["refine"], ("cat", "dog", *NAMES[1:]))
    text = refused(command_of("small-dino", strangers, output), capsys)
    assert f"but not {[NAMES[0]]} of the data" in text
    of_other_queries = save_teacher(tmp_path / "dab", DETECTORS["dab"])
    text = refused(command_of("small-refine-deformable-detr", of_other_queries, output, "--objectives.assignment", "teacher-init"), capsys)
    assert "Teacher Init needs learned queries of equal number and width" in text and "--objectives.assignment assignment" in text
    words = command_of("small-dino", "x", output)
    assert "no teacher is named" in refused([word for word in words if word not in ("--teacher", "x")], capsys)
    assert "names no checkpoint" in refused(["distill", "small-dino", "--teacher"], capsys)
    assert "names no checkpoint" in refused(["distill", "small-dino", "--teacher=", "--data", SHAPES], capsys)
    assert "names no checkpoint, but --data follows it" in refused(["distill", "small-dino", "--teacher", "--data", SHAPES], capsys)
    (tmp_path / "r50.pth").write_bytes(b"weights")
    text = refused(command_of("small-dino", str(tmp_path / "r50.pth"), output), capsys)
    assert "r50.pth" in text and len(text.splitlines()) == 1
    assert "name a recipe first" in refused(["distill", "--teacher", "x"], capsys)
    assert not output.exists()


def test_help_of_a_recipe_shows_the_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    for words, shown in ((["distill"], True), (["train"], False)):
        with pytest.raises(SystemExit):
            main([*words, "small-distill-deformable-detr", "--help"])
        assert ("--teacher CHECKPOINT" in capsys.readouterr().out) == shown


def test_a_teacher_may_know_more_classes(tmp_path: Path) -> None:
    """Whatever their order; COCO's raw ids are such a case."""
    more = ("spare", *reversed(NAMES), "other")
    folder = save_teacher(tmp_path / "more", DETECTORS["dab"], more)
    original = load_detector(folder).detector.decoder.class_heads[0].weight
    taught = TrainedTeacher(folder).build(DETECTORS["dab"].build(len(NAMES)), NAMES, None)
    assert torch.equal(taught.model.decoder.class_heads[0].weight, original[[more.index(name) for name in NAMES]])
    assert not any(parameter.requires_grad for parameter in taught.parameters())
    called = TrainedTeacher(save_teacher(tmp_path / "called", DETECTORS["dab"], ("SQUARE", "plate", *NAMES[2:])), ("plate=disc",))
    own = load_detector(called.checkpoint).detector.decoder.class_heads[0].weight
    taught = called.build(DETECTORS["dab"].build(len(NAMES)), NAMES, None)
    assert torch.equal(taught.model.decoder.class_heads[0].weight, own[[1, 0, *range(2, len(NAMES))]])
    with pytest.raises(ValueError, match="has 6 classes, the student 5"):
        TrainedTeacher(folder).build(DETECTORS["dab"].build(5), 6, None)


def test_averages_start_where_the_student_does(tmp_path: Path) -> None:
    """Teacher Init moves the student after the average was made of it."""
    folder = save_teacher(tmp_path / "teacher", DETECTORS["dab"])
    start = tiny_distilled(folder)
    objectives = (SetPrediction(), TeacherInit())
    recipe = replace(start, detector=DETECTORS["dab"], objectives=objectives, teachers=(EMATeacher(0.9), TrainedTeacher(folder)))
    method = recipe.build(NAMES, 10)
    assert method.ema is not None
    torch.testing.assert_close(dict(method.ema.model.state_dict()), dict(method.student.state_dict()), rtol=0, atol=0)
    assert torch.equal(method.student.query_anchor.weight, load_detector(folder).detector.query_anchor.weight)
