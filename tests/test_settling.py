"""What recipes leave open: precision, batch, number of steps, average and pixels, as a run finds and keeps them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steadydetr.checkpoints.folder import load_detector
from steadydetr.checkpoints.start import Start
from steadydetr.cli.training_arguments import override, read_training_arguments
from steadydetr.data import open_data
from steadydetr.data.transforms import DetrTransform, FixedSizeTransform, Sample, apply, seeded
from steadydetr.nn.configs import IMAGENET_MEAN, TimmBackboneConfig
from steadydetr.recipes import find
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.finetuning import finetuned
from steadydetr.runs.training_config import TrainingConfig
from steadydetr.training import batch_fit, preparation
from steadydetr.training.averages import make_averages
from steadydetr.training.loop import train
from steadydetr.training.precision import precision_of, precision_remarks, tf32_on_gpus
from steadydetr.training.settling import settle, settle_schedule, with_batch, with_passes
from tests.test_finetune import card
from tests.test_train import tiny

SMALL = TimmBackboneConfig("test_resnet", (2, 3, 4), "none", frozen_stages=0, freeze_norm=False)  # trained on (x - 0.5) / 0.5
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def plain_recipe(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["recipe"]


# a whole run


def left_open() -> Recipe:
    """A recipe that leaves everything open that can be."""
    recipe = tiny(epochs=1, batch_size="auto", lr_batch_size=16, precision="auto", ema_decay=None, passes=2, stability_images=0)
    return replace(recipe, detector=recipe.detector.changed(backbone=SMALL))


def test_a_run_that_goes_on_takes_what_it_was_started_with() -> None:
    """Whatever another machine would find."""
    recipe = left_open()
    found = replace(recipe.training, batch_size=2, lr=3e-4, precision="bf16")
    backbone = replace(SMALL, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    before = replace(recipe, training=found, detector=recipe.detector.changed(backbone=backbone))
    assert settle(recipe, CPU, before) == before


@pytest.mark.slow
def test_a_run_saves_what_it_found_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where another machine would find other values, and where timm trains the backbone otherwise by now."""
    recipe, run = left_open(), tmp_path / "run"
    train(recipe, run, device="cpu")
    assert "training.batch_size = auto is 4 on cpu" in capsys.readouterr().out
    found = plain_recipe(run)["training"]
    assert {name: found[name] for name in ("batch_size", "precision", "epoch_steps")} == {
        "batch_size": 4,
        "precision": "no",
        "epoch_steps": 12,
    }
    assert found["lr"] == pytest.approx(recipe.training.lr / 2)  # 4 images instead of 16
    loaded = load_detector(run / "best")
    assert loaded.card.detector.backbone.mean == (0.5,) * 3  # type: ignore[attr-defined]
    assert loaded.detector.mean.flatten().tolist() == [0.5] * 3

    def not_again(*_: object) -> int:
        raise AssertionError

    monkeypatch.setattr("steadydetr.training.settling.find_batch", not_again)
    monkeypatch.setattr("steadydetr.training.settling.precision_of", lambda device: "bf16")
    monkeypatch.setattr("steadydetr.nn.backbone.trained_statistics", lambda name: ((0.1,) * 3, (0.1,) * 3))
    assert train(recipe, run, resume=True, device="cpu")["step"] == 12


def test_weights_that_a_run_starts_from_go_on_seeing_pixels_as_they_did() -> None:
    """Where the recipe leaves it open, and has the same backbone."""
    recipe = tiny()
    old = recipe.detector.changed(backbone=replace(SMALL, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)))
    new = replace(recipe, detector=recipe.detector.changed(backbone=SMALL))
    assert settle(new, CPU, start=old).detector == old
    given = replace(new, detector=recipe.detector.changed(backbone=replace(SMALL, mean=(0.4,) * 3)))
    assert settle(given, CPU, start=old).detector.backbone.mean == (0.4,) * 3  # type: ignore[attr-defined]
    other = replace(new, detector=recipe.detector.changed(backbone=replace(SMALL, name="test_efficientnet")))
    assert settle(other, CPU, start=old).detector.backbone.mean == IMAGENET_MEAN  # type: ignore[attr-defined]


def test_pixels_reach_the_backbone_as_it_was_trained() -> None:
    detector = left_open().detector.build(2)
    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    assert detector.normalise(images, torch.zeros(1, 32, 32, dtype=torch.bool)).unique().tolist() == [1.0]  # (1 - 0.5) / 0.5


# precision


@pytest.mark.parametrize(("has_it", "device", "expected"), [(True, GPU, "bf16"), (False, GPU, "no"), (True, torch.device("cpu"), "no")])
def test_bf16_is_taken_where_the_gpu_has_it(has_it: bool, device: torch.device, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_it or including_emulation)
    assert precision_of(device) == expected


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_allowed_or_not_while_a_run_trains(allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And afterwards as it was before."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    seen = []

    def prepare(*_: object) -> None:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        raise KeyError

    monkeypatch.setattr(preparation, "_prepare", prepare)
    with pytest.raises(KeyError):
        train(tiny(tf32=allowed), tmp_path / "run", device="cpu")
    assert seen == [(allowed, allowed)] and (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
    with pytest.raises(KeyError), tf32_on_gpus(not before[0]):
        raise KeyError
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_what_a_gpu_computes_less_exactly_is_said() -> None:
    training = TrainingConfig(precision="bf16")
    bf16, tf32 = precision_remarks(training, GPU)
    assert "bfloat16" in bf16 and "TF32; --training.no-tf32" in tf32
    assert precision_remarks(replace(training, precision="no", tf32=False), GPU) == []
    assert precision_remarks(training, CPU) == []


# the batch


def failing_above(limit: int, taken: list[int]) -> Any:
    """Steps that run out of memory with more images than `limit`."""

    def step(size: int) -> None:
        taken.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    return step


@pytest.mark.parametrize(("limit", "most", "expected"), [(5, 64, 4), (8, 64, 8), (100, 12, 8), (1, 64, 1), (0, 64, 0)])
def test_the_batch_doubles_until_memory_runs_out(limit: int, most: int, expected: int) -> None:
    taken: list[int] = []
    assert batch_fit.largest_fitting(failing_above(limit, taken), most) == expected
    assert taken == [2**power for power in range(len(taken))] and max(taken) <= most


def test_other_errors_of_a_step_are_not_taken_for_lack_of_memory() -> None:
    def step(size: int) -> None:
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side assert"):
        batch_fit.largest_fitting(step, 4)


@pytest.mark.parametrize(
    ("limit", "accumulation", "images", "expected"), [(6, 1, 1000, 4), (6, 2, 1000, 8), (6, 1, 40, 2), (64, 1, 163, 8), (64, 1, 20, 1)]
)
def test_on_a_gpu_the_batch_is_what_fits(
    limit: int, accumulation: int, images: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On each process and in each micro-batch, but a pass over the data keeps 16 steps."""
    monkeypatch.setattr(batch_fit, "step_of", lambda *_: failing_above(limit, []))
    monkeypatch.setattr(batch_fit, "_memory_to_spare", lambda device: nullcontext())
    recipe = tiny(batch_size="auto", accumulation=accumulation)
    data = SimpleNamespace(index=range(images))
    assert batch_fit.find_batch(recipe, data, SimpleNamespace(device=GPU, num_processes=1)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("processes", "images", "expected"), [(1, 50, 4), (1, 500, 8), (1, 5000, 16), (8, 50, 8), (3, 500, 6)])
def test_on_the_cpu_the_batch_is_that_of_finetune(processes: int, images: int, expected: int) -> None:
    """As a multiple of the processes."""
    accelerator = SimpleNamespace(device=CPU, num_processes=processes)
    assert batch_fit.find_batch(tiny(batch_size="auto"), SimpleNamespace(index=range(images)), accelerator) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limit", "batch", "processes", "expected"), [(16, 16, 1, 1), (5, 16, 1, 4), (5, 16, 2, 2), (5, 12, 1, 3), (1, 7, 1, 7), (1, 1, 1, 1)]
)
def test_on_a_gpu_a_step_has_as_few_micro_batches_as_fit(
    limit: int, batch: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the batch stays what it is."""
    monkeypatch.setattr(batch_fit, "fits_everywhere", lambda *args: batch_fit.largest_fitting(failing_above(limit, []), args[-1]))
    recipe, said = finetuned(card(tiny().detector), Start("w"), 1000), list[str]()
    recipe = replace(recipe, training=replace(recipe.training, batch_size=batch))
    assert recipe.training.accumulation == "auto"
    accelerator = SimpleNamespace(device=GPU, num_processes=processes)
    found = settle_schedule(recipe, SimpleNamespace(index=range(100)), accelerator, said.append)  # type: ignore[arg-type]
    assert found.training.accumulation == expected and len(said) == (expected > 1)
    on_cpu = settle_schedule(recipe, SimpleNamespace(index=range(100)), SimpleNamespace(device=CPU, num_processes=1), said.append)  # type: ignore[arg-type]
    assert on_cpu.training.accumulation == 1


def test_where_no_image_fits_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_fit, "step_of", lambda *_: failing_above(0, []))
    monkeypatch.setattr(batch_fit, "_memory_to_spare", lambda device: nullcontext())
    data = SimpleNamespace(index=range(100))
    with pytest.raises(ValueError, match="not even one image fits into the memory of the GPU: take smaller images"):
        batch_fit.find_batch(tiny(batch_size="auto"), data, SimpleNamespace(device=GPU, num_processes=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [3, 1])
def test_the_steps_that_are_tried_are_real_ones(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the recipe's own method, on its largest images with the most objects; two of them, with the optimiser's state."""
    recipe = tiny("small-od-dino", batch_size="auto", ema_decay=0.9)
    recipe = replace(recipe, detector=recipe.detector.with_image_channels(channels))
    data = open_data(recipe.data.source)
    seen: list[Any] = []
    forward = batch_fit.made_up_batch
    monkeypatch.setattr(batch_fit, "made_up_batch", lambda *args: seen.append(args) or forward(*args))
    step = batch_fit.step_of(recipe, data, torch.device("cpu"))
    step(1)
    step(2)
    most = int(data.index.counts.max())
    assert seen == [(size, (channels, 64, 64), most, len(data.index.classes), False) for size in (1, 2)]


def test_the_largest_images_of_a_transform() -> None:
    """Padded in both directions, as a batch of wide and high ones is."""
    data = open_data("shapes:size=64,images=8")
    assert batch_fit.largest_size(data, FixedSizeTransform(48, 80)) == (48, 80)
    height, width = batch_fit.largest_size(data, DetrTransform((40, 48), 96, crop=False, zoom=0.4))
    assert 48 < height <= 96 and 48 < width <= 96


def test_the_rate_goes_with_the_root_of_the_batch() -> None:
    start = TrainingConfig(batch_size="auto", lr=1e-3, lr_batch_size=16)
    assert with_batch(start, 4) == replace(start, batch_size=4, lr=5e-4)
    assert with_batch(replace(start, lr_batch_size=0), 4) == replace(start, batch_size=4, lr_batch_size=0)
    with pytest.raises(ValueError, match=r"training\.batch_size is auto, which only a run can tell"):
        _ = start.images_per_step


def test_flags_say_what_the_rate_was_meant_for() -> None:
    recipe, _ = override(find("small-dino"), ["--training.batch-size", "auto"], "train small-dino")
    assert (recipe.training.batch_size, recipe.training.lr_batch_size) == ("auto", 8)
    recipe, _ = override(find("small-dino"), ["--training.batch-size", "4"], "train small-dino")
    assert (recipe.training.batch_size, recipe.training.lr_batch_size) == (4, 0)


def test_another_backbone_is_normalised_as_it_was_trained() -> None:
    """Even where the recipe is a saved one, whose values are those of its own backbone."""
    start = find("dino-4scale-r50-12ep")
    saved = replace(start, detector=start.detector.settled())
    words = ["--detector.backbone.name", "tf_efficientnet_lite0"]
    recipe, _ = override(saved, words, "train")
    assert recipe.detector.settled().backbone.mean == (0.5,) * 3  # type: ignore[attr-defined]
    recipe, _ = override(saved, [*words, "--detector.backbone.mean", "0.1", "0.2", "0.3"], "train")
    assert recipe.detector.settled().backbone.mean == (0.1, 0.2, 0.3)  # type: ignore[attr-defined]
    assert override(saved, [], "train")[0] == saved


# the schedule


@pytest.mark.parametrize(("images", "expected"), [(60, 180), (163, 180), (1000, 600), (10_000, 6000)])
def test_many_images_get_more_steps_and_few_more_passes(images: int, expected: int) -> None:
    training = with_passes(TrainingConfig(epochs=5, epoch_steps=180, passes=12, batch_size=4), images)
    assert training.epoch_steps == expected
    assert with_passes(training, images) == training
    assert training.epochs * training.epoch_steps * 4 / images >= 12


def test_the_average_reaches_over_a_share_of_the_run() -> None:
    recipe = tiny(epochs=10, ema_decay=None)
    method = recipe.build(2)
    averages = make_averages(recipe, method, 100)
    assert averages.evaluated is not None and averages.evaluated.decay == pytest.approx(1 - 1 / 28)
    assert averages.teacher is None


# the recipes for a desk


@pytest.mark.parametrize("name", ["desk-small", "desk-medium", "desk-large"])
@pytest.mark.parametrize("method", ["plain", "od", "stable", "steady", "align"])
def test_desk_recipes_take_every_method(name: str, method: str) -> None:
    recipe, _ = read_training_arguments(name, ["--method", method, "--data", "shapes"])
    assert recipe == replace(find(name, method), data=recipe.data)  # type: ignore[arg-type]
    plain = find(name, "plain")
    assert recipe.name == (name if method == "stable" else f"{name}-{method}")
    assert bool(recipe.teachers) == (method in ("od", "steady"))
    assert recipe.training.ema_decay == (0.0 if recipe.teachers else None)
    assert recipe.detector == plain.detector and recipe.data.transform == plain.data.transform
    assert (recipe.criterion == plain.criterion) == (method == "plain")
    assert (recipe == replace(find(name), data=recipe.data)) == (method == "stable")


def test_a_recipe_with_a_method_takes_no_other() -> None:
    with pytest.raises(ValueError, match="--method stable: small-od-dino has a training method already"):
        read_training_arguments("small-od-dino", ["--method", "stable"])
    with pytest.raises(ValueError, match="--method plain: small-stable-dino has a training method already"):
        read_training_arguments("small-stable-dino", ["--method", "plain"])
    with pytest.raises(ValueError, match=r"--method of: there is no such method.*od"):
        read_training_arguments("small-dino", ["--method", "of"])


@pytest.mark.parametrize("name", ["desk-small", "desk-medium", "desk-large"])
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (50, 50), (1, 900), (2000, 500)])
def test_images_of_a_desk_recipe_fit_its_sizes_and_keep_their_proportions(name: str, size: tuple[int, int]) -> None:
    """Of any form, small ones too; in training as in evaluation."""
    data = find(name).data
    height, width = data.resize.resized(size)
    assert min(height, width) <= data.resize.shortest and max(height, width) <= data.resize.longest  # type: ignore[attr-defined]
    assert min(height, width) == data.resize.shortest or max(height, width) == data.resize.longest  # type: ignore[attr-defined]
    assert height * size[1] == pytest.approx(width * size[0], abs=max(size))
    sample = Sample(torch.zeros(3, *size, dtype=torch.uint8), torch.tensor([[0.0, 0, size[1], size[0]]]), torch.tensor([0]))
    with seeded(0):
        trained = apply(data.transform.build(), sample)
    assert max(trained.image.shape) <= data.resize.longest and len(trained.labels) == 1  # type: ignore[attr-defined]
