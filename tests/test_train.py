"""Runs: learning, resuming to the bit, stopping by a signal, micro-batches and processes that equal one large batch."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
from accelerate import Accelerator
from safetensors.torch import load_file

import steadydetr.training.log
import steadydetr.training.loop
from steadydetr.config import to_plain
from steadydetr.data import DataConfig, FixedSize, FixedSizeTransform
from steadydetr.files import write_json
from steadydetr.learning.teachers import EMATeacher
from steadydetr.recipes import find
from steadydetr.recipes.base import Recipe
from steadydetr.runs.training_config import TrainingConfig
from steadydetr.training.loop import train
from steadydetr.training.not_finite import replay
from steadydetr.training.optimiser import first_drop, rate_factor
from steadydetr.training.preparation import build_method
from tests.conftest import BACKBONE, TINY


def tiny(name: str = "small-stable-dino", **training: object) -> Recipe:
    """A recipe with some thousand parameters on 24 images: an epoch is 6 steps."""
    start = find(name)
    return replace(
        start,
        name="tiny",
        detector=replace(start.detector, backbone=BACKBONE, transformer=replace(TINY, dropout=0.1), queries=14),
        data=DataConfig("shapes:size=64,images=24", transform=FixedSizeTransform(64, 64), resize=FixedSize(64, 64), workers=0),
        training=replace(start.training, **({"epochs": 2, "batch_size": 4, "log_every": 1, "warmup_steps": 2} | training)),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


class StopAfter:
    """Asks the run to stop after some steps, as SIGTERM does."""

    def __init__(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        original = steadydetr.training.loop.train_step

        def step(run, batches):  # type: ignore[no-untyped-def]
            result = original(run, batches)
            if run.state.step + 1 == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        monkeypatch.setattr(steadydetr.training.loop, "train_step", step)


def test_the_peak_of_memory_is_told_on_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("psutil")  # which itself wants it where this test runs
    monkeypatch.setitem(sys.modules, "resource", None)  # which Windows does not have
    assert importlib.reload(steadydetr.training.log).peak_memory(torch.device("cpu")) > 2**20


def test_layers_are_compiled_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each encoder and decoder layer by itself, of the teachers too; torch.compile itself is not run here."""
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 8)
    for asked, teachers in ((False, (EMATeacher(),)), (True, ()), (True, (EMATeacher(),))):
        compiled.clear()
        recipe = replace(tiny(compile=asked), teachers=teachers)
        method = build_method(recipe, ("a", "b"), 10, Accelerator(cpu=True), recipe.build_student(2))
        detectors = (method.student, *method.teaching.values()) if asked else ()
        layers = [layer for one in detectors for layer in (*one.encoder.layers, *one.decoder.layers)]  # type: ignore[misc, union-attr]
        assert list(map(id, compiled)) == list(map(id, layers))
        assert len(method.teaching) == len(teachers)
        assert (torch._dynamo.config.cache_size_limit > 8) == asked  # graphs of a second model and of evaluations have room


@pytest.mark.parametrize("steps", [2, pytest.param(6, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """In the middle of an epoch and at its end, EMA and optimiser included, to the bit."""
    recipe = tiny(ema_decay=0.9)
    train(recipe, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patch:
        StopAfter(steps, patch)
        assert not train(recipe, tmp_path / "parts", device="cpu")["finished"] or steps == 12
    summary = train(recipe, tmp_path / "parts", resume=True, device="cpu")
    assert summary["finished"] and summary["images_seen"] == 48
    assert_equal_weights(tmp_path / "whole/last", tmp_path / "parts/last")
    whole, parts = (torch.load(tmp_path / n / "last/training_state.pt", weights_only=True) for n in ("whole", "parts"))
    for name, tensor in whole["average"].items():
        assert torch.equal(tensor, parts["average"][name])
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def records(run: Path) -> list[dict[str, object]]:
    """What was logged, less what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "memory_gib")} for line in lines]


@pytest.mark.slow
def test_resume_from_best(tmp_path: Path) -> None:
    """Any checkpoint of the run will do: best alone is enough."""
    recipe = tiny(epochs=1)
    train(recipe, tmp_path / "run", device="cpu")
    (tmp_path / "run/last").rename(tmp_path / "gone")
    assert train(recipe, tmp_path / "run", resume=True, device="cpu")["finished"]


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    recipe = tiny(epochs=1)
    train(recipe, tmp_path / "run", device="cpu")
    before = weights(tmp_path / "run/last")
    config = json.loads((tmp_path / "run/config.json").read_text())
    del config["recipe"]["teachers"]  # as an earlier version wrote it
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    assert train(recipe, tmp_path / "run", resume=True, device="cpu")["finished"]
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(recipe, tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match=r"recipe\.training\.lr: 0\.001 -> 0\.1"):
        train(tiny(epochs=1, lr=0.1), tmp_path / "run", resume=True, device="cpu")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "run/last").items())


def test_what_a_run_leaves(tmp_path: Path) -> None:
    summary = train(tiny(epochs=1), tmp_path / "run", device="cpu")
    for name in ("config.json", "metrics.jsonl", "summary.json", "curves.png", "predictions.png", "best/model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert {"ap", "ap50", "seconds", "images_seen"} <= summary.keys()


def test_micro_batches_equal_the_whole_batch(tmp_path: Path) -> None:
    """Frozen statistics are needed: batch norm sees micro-batches. Two steps, uneven object counts."""
    recipe = without_batch_norm(tiny(epochs=1))
    recipe = replace(recipe, data=replace(recipe.data, limit=8), training=replace(recipe.training, batch_size=4))
    for name, accumulation in (("whole", 1), ("parts", 2)):
        part = replace(recipe, training=replace(recipe.training, accumulation=accumulation))
        train(part, tmp_path / name, device="cpu")
    assert_close_weights(tmp_path / "whole/last", tmp_path / "parts/last")
    assert_close_losses(tmp_path / "whole", tmp_path / "parts")


def without_batch_norm(recipe: Recipe) -> Recipe:
    """A timm backbone with frozen batch norm, small enough, and no dropout."""
    from steadydetr.nn.configs import TimmBackboneConfig

    backbone = TimmBackboneConfig("test_resnet", out_indices=(2, 3, 4), weights="none", frozen_stages=0)
    transformer = replace(recipe.detector.transformer, dropout=0.0)
    return replace(recipe, detector=replace(recipe.detector, backbone=backbone, transformer=transformer))


def assert_close_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def assert_close_losses(a: Path, b: Path) -> None:
    pairs = list(zip(records(a), records(b), strict=True))
    for x, y in pairs:
        if x["kind"] == "train":
            assert x["loss"] == pytest.approx(y["loss"], rel=2e-4)
            assert x["gradient_norm"] == pytest.approx(y["gradient_norm"], rel=2e-3)


@pytest.mark.slow  # tests/test_processes.py has a shorter one
@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_equal_one(tmp_path: Path, empty: bool) -> None:
    """Also where one process gets images without objects only."""
    recipe = without_batch_norm(tiny(epochs=1))
    recipe = replace(recipe, data=replace(recipe.data, limit=8), training=replace(recipe.training, batch_size=2 if empty else 4))
    for name, count in (("one", 1), ("two", 2)):
        train_in_processes(count, recipe, tmp_path / name, empty)
    assert_close_weights(tmp_path / "one/last", tmp_path / "two/last")
    assert_close_losses(tmp_path / "one", tmp_path / "two")


def train_in_processes(count: int, recipe: Recipe, output: Path, empty: bool = False) -> None:
    """torchrun on the CPU. `empty`: images of odd numbers lose their objects, so that a process with one image may have none."""
    script, saved = output.with_suffix(".py"), output.with_suffix(".json")
    script.write_text(SCRIPT)
    write_json(saved, to_plain(recipe))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run(
        [*command, str(script), str(saved), str(output), str(int(empty))], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


SCRIPT = """
import json
import sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
import steadydetr.data.loading as loading
from steadydetr.config import from_plain
from steadydetr.training.loop import train

recipe, output, empty = from_plain(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]), int(sys.argv[3])
if empty:
    prepare = loading.Samples.__getitem__
    def emptied(self, key):
        loaded = prepare(self, key)
        if loaded.image_id % 2:
            sample = replace(loaded.sample, boxes_xyxy=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
            loaded = replace(loaded, sample=sample)
        return loaded
    loading.Samples.__getitem__ = emptied
train(recipe, output, device="cpu")
"""


def test_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """A rate far too high: what fails first, a loss, the gradient or the matching, fails in the replayed step too."""
    with pytest.raises(FloatingPointError, match=r"^step 2: .* not finite"):
        train(tiny(epochs=1, lr=1e6, warmup_steps=0, clip=0.0), tmp_path / "run", device="cpu")
    saved = next((tmp_path / "run").glob("not-finite-*.pt"))
    with contextlib.suppress(FloatingPointError):
        assert not all(map(math.isfinite, replay(tmp_path / "run", saved).values()))


def test_data_and_batch_problems_are_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.batch_size = 100"):
        train(tiny(batch_size=100), tmp_path / "a", device="cpu")
    with pytest.raises(ValueError, match="does not divide"):
        train(tiny(accumulation=3), tmp_path / "b", device="cpu")
    with pytest.raises(ValueError, match="no such folder"):
        train(replace(tiny(), data=DataConfig("nowhere")), tmp_path / "c", device="cpu")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("training", "factors", "first"),
    [
        ({"drop_epochs": (11, 8)}, [1, 1, 0.1, 0.01], 80),
        ({"drop_epochs": (0.75,)}, [1, 1, 0.1, 0.1], 90),
        ({"drop_epochs": (12,)}, [1, 1, 1, 1], 120),
        ({"drop_epochs": ()}, [1, 1, 1, 1], None),
        ({"schedule": "cosine", "drop_epochs": (2,)}, [0.853553, 0.370590, 0.146447, 0.017037], None),
        ({"warmup_steps": 80, "drop_epochs": (8,)}, [31 / 80, 71 / 80, 0.1, 0.1], 80),
    ],
    ids=["epochs", "share", "behind the end", "none", "cosine", "warm-up"],
)
def test_learning_rate_by_schedule(training: dict[str, object], factors: list[float], first: int | None) -> None:
    """At steps 30, 70, 90 and 110 of 12 epochs of 10 steps, and the first step after a drop."""
    config = TrainingConfig(**({"epochs": 12} | training))  # type: ignore[arg-type]
    assert [rate_factor(step, 10, config) for step in (30, 70, 90, 110)] == pytest.approx(factors, abs=1e-6)
    assert first_drop(10, config) == first


def test_a_rate_that_never_drops_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(epochs=1, drop_epochs=(3,)), tmp_path / "run", device="cpu")
    assert "never drops" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match=r"training\.drop_epochs"):
        TrainingConfig(drop_epochs=(0,))


def test_a_small_run_learns(tmp_path: Path) -> None:
    train(tiny(epochs=16, lr=3e-3), tmp_path / "run", device="cpu")
    losses = [record["loss"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
