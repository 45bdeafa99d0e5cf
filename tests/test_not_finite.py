"""What is NaN or infinite stops a run before a weight or a checkpoint changes, is named, and can be run again from what was saved."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

import steadydetr.data.loading
import steadydetr.tools.predictor
import steadydetr.training.step
from steadydetr import register
from steadydetr.checkpoints.folder import load_progress
from steadydetr.data.transforms import FixedSize
from steadydetr.finite import images_named
from steadydetr.objectives.base import Objective
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import LAST
from steadydetr.structures import Batch, Losses
from steadydetr.tools.predictor import load
from steadydetr.training.loop import evaluate, train_epoch
from steadydetr.training.not_finite import keep_not_finite_batches, replay
from steadydetr.training.preparation import prepare
from steadydetr.training.run import Run, save
from tests.conftest import DETECTORS, make_batch
from tests.test_distill_training import save_teacher, tiny_distilled
from tests.test_online_training import tiny_online
from tests.test_train import tiny, without_batch_norm

BAD: set[int] = set()  # the ids of images that something is wrong with


@pytest.fixture(autouse=True)
def nothing_is_bad() -> Iterator[None]:
    """And a run may have another precision than the one before, in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    BAD.clear()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Poison(Objective):
    """A loss, or the gradient of a finite one, that is not finite for bad images; and a loss of the step's random numbers."""

    what: str = "loss"

    @property
    def name(self) -> str:
        return "poison"

    def add_losses(self, losses: Losses, context: Any, stages: Any, matched: Any) -> None:
        tokens = context.memory.tokens.float()
        chosen = tokens[[image in BAD for image in context.batch.image_ids]].sum()
        if BAD & set(context.batch.image_ids):
            chosen = {"loss": chosen * math.inf, "gradient": (chosen * 0).sqrt(), "large": chosen * 1e30}[self.what]
        losses.add("poison/term", chosen[None], 1.0)
        losses.add("poison/noise", (tokens.sum() * 0 + torch.rand(()))[None], 1.0)


@pytest.fixture
def poison(table: None) -> Callable[..., Recipe]:
    """Two steps of an epoch of eight images, each of two micro-batches of two; nothing is measured."""
    register("test-poison")(Poison)

    def of(recipe: Recipe, what: str = "loss", **training: Any) -> Recipe:
        training = {"accumulation": 2, "stability_images": 0, "eval_every": 2} | training
        return replace(
            recipe,
            objectives=(*recipe.objectives, Poison(what)),
            data=replace(recipe.data, limit=8),
            training=replace(recipe.training, **training),
        )

    return of


def begun(recipe: Recipe, folder: Path) -> Run:
    return prepare(recipe, folder, resume=False, device="cpu")


def message_of(run: Run, act: Callable[[], object]) -> str:
    """The one line that the run stops with."""
    with pytest.raises(FloatingPointError) as caught, keep_not_finite_batches(run):
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(run: Run) -> Path:
    (path,) = run.folder.path.glob("not-finite-*.pt")
    return path


def spoil_second_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Makes the second image of the second micro-batch of the second step bad; gives that micro-batch's ids and what the step met."""
    ids = list(run.loader.epoch(0))[1][-1].image_ids
    BAD.add(ids[1])
    met: dict[str, Any] = {}
    original = steadydetr.training.step.check_step

    def check(run: Run, losses: list[dict[str, float]], norm: float) -> None:
        met.update(losses=losses, weights={name: value.clone() for name, value in weights_of(run)})
        original(run, losses, norm)

    monkeypatch.setattr(steadydetr.training.step, "check_step", check)
    return ids, met


def weights_of(run: Run) -> Iterator[tuple[str, Tensor]]:
    """What the optimiser and the averages change."""
    yield from run.method.named_parameters()
    if run.averages.evaluated is not None:
        yield from run.averages.evaluated.named_parameters(prefix="average")


@pytest.mark.parametrize("case", ["denoising", "bfloat16", "online", "offline"])
def test_loss_of_one_image_in_a_later_micro_batch(
    case: str, poison: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named with step, term and image; no weight has changed; replayed with dropout, noise, groups and teachers it is the same number."""
    recipe = {
        "denoising": lambda: tiny(ema_decay=0.5),
        "bfloat16": lambda: tiny(precision="bf16"),
        "online": lambda: tiny_online("small-od-dino"),
        "offline": lambda: tiny_distilled(save_teacher(tmp_path / "teacher", DETECTORS["refine"])),
    }[case]()
    run = begun(poison(recipe), tmp_path / "run")
    ids, met = spoil_second_step(run, monkeypatch)
    message = message_of(run, lambda: train_epoch(run, 0))
    assert message.startswith(f"step 2: the loss poison/term is not finite for {images_named(ids)} (image {ids[1]} alone too). Batch and")
    assert str(saved(run)) in message and saved(run).name == "not-finite-step2-process0.pt"
    assert run.state.step == 1 and all(torch.equal(value, met["weights"][name]) for name, value in weights_of(run))
    first, second = met["losses"]
    expected = {name: first[name] + second[name] for name in first}
    found = replay(run.folder.path, saved(run))
    assert found.pop("gradient_norm") != 0 and not math.isfinite(found["poison/term"])
    assert found == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert len(found) > 4 and sum(not math.isfinite(value) for value in found.values()) == 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_gradient_of_a_finite_loss(precision: str, poison: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(poison(tiny(precision=precision, clip=0.0), "gradient"), tmp_path / "run")
    ids, met = spoil_second_step(run, monkeypatch)
    message = message_of(run, lambda: train_epoch(run, 0))
    assert message.startswith("step 2: the gradient is not finite in ") and " tensors (student." in message
    assert f": that of the loss poison/term for {images_named(ids)} (image {ids[1]} alone too). Batch and" in message
    assert run.state.step == 1 and all(torch.equal(value, met["weights"][name]) for name, value in weights_of(run))
    found = replay(run.folder.path, saved(run))
    assert math.isnan(found.pop("gradient_norm")) and all(map(math.isfinite, found.values()))


def test_norm_beyond_float32(poison: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of the gradient is finite; clipping would make all of them zero. Statistics that no step reads are not to blame."""
    run = begun(poison(tiny(), "large"), tmp_path / "run")
    spoil_second_step(run, monkeypatch)
    dict(run.method.student.named_buffers())["backbone.stem.1.running_var"].fill_(math.nan)
    message = message_of(run, lambda: train_epoch(run, 0))
    assert "step 2: the norm of the gradient, inf, is beyond float32" in message and "Not finite were" not in message
    assert replay(run.folder.path, saved(run))["gradient_norm"] == math.inf


def spoil_collate(monkeypatch: pytest.MonkeyPatch, module: Any, what: str) -> None:
    """From here on pixels are NaN, or boxes infinite, of images that are bad."""
    original = steadydetr.data.loading.collate

    def collate(samples: Any) -> Batch:
        batch = original(samples)
        bad = torch.tensor([image in BAD for image in batch.image_ids])
        if what == "boxes":
            boxes = batch.targets.boxes.masked_fill(bad[batch.targets.image, None], math.inf)
            return replace(batch, targets=replace(batch.targets, boxes=boxes))
        return replace(batch, images=(batch.images / 255).masked_fill(bad[:, None, None, None], math.nan))

    monkeypatch.setattr(module, "collate", collate)


@pytest.mark.parametrize("what", ["boxes", "pixels"])
def test_cost_of_an_image(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images whose objects cannot be matched are named, and what of the input is to blame; batch norm spreads NaN pixels."""
    run = begun(replace(tiny(), data=replace(tiny().data, limit=4)), tmp_path / "run")
    bad = next(run.loader.epoch(0))[0].image_ids[2]
    BAD.add(bad)
    spoil_collate(monkeypatch, steadydetr.data.loading, what)
    message = message_of(run, lambda: train_epoch(run, 0))
    images = images_named({bad} if what == "boxes" else set(next(run.loader.epoch(0))[0].image_ids))
    assert message.startswith(f"step 1: the matching cost of 'main' is not finite for {images}. Not finite are the {what} of image {bad}. ")
    with pytest.raises(FloatingPointError, match=f"'main' is not finite for {images}"):
        replay(run.folder.path, saved(run))


def test_cost_of_a_teacher(tmp_path: Path) -> None:
    """Weights that are not finite are said to be the reason."""
    run = begun(tiny_online("small-od-dino"), tmp_path / "run")
    assert run.method.ema is not None
    next(run.method.ema.parameters()).data.fill_(math.nan)
    message = message_of(run, lambda: train_epoch(run, 0))
    assert "the matching cost of 'ema' is not finite" in message
    assert "Not finite were the weights before it: 1 of " in message and "method.teachers.ema.model." in message


def spoil(run: Run, place: str) -> Tensor:
    """One of the tensors that a checkpoint holds."""
    average = run.averages.evaluated
    assert average is not None
    state = next(iter(run.optimiser.state.values()))
    found = {
        "weight": lambda: next(run.method.student.parameters()).data,
        "statistics": lambda: dict(run.method.student.named_buffers())["backbone.stem.1.running_var"],
        "average": lambda: next(average.model.parameters()).data,
        "optimiser": lambda: state["exp_avg_sq"],
    }
    return found[place]()


def test_what_is_saved_is_finite(tmp_path: Path) -> None:
    """Else the checkpoint before stays, also where nothing is evaluated, at the end of an epoch and where the run is asked to stop."""
    recipe = tiny(ema_decay=0.5, eval_every=2, stability_images=0)
    run = begun(replace(recipe, data=replace(recipe.data, limit=4)), tmp_path / "run")
    train_epoch(run, 0)
    save(run, LAST)
    before = content_of(run.folder.path / LAST)
    names = {"weight": "method.student.", "statistics": "running_var", "average": "average.", "optimiser": "exp_avg_sq"}
    for place, name in names.items():
        tensor = spoil(run, place)
        value = tensor.flatten()[0].item()
        tensor.flatten()[0] = math.inf
        message = message_of(run, lambda: save(run, LAST))
        assert message.startswith("step 1: 1 of ") and name in message and "are not finite. Batch and weights are in" in message
        assert f"{run.folder.path / LAST} stays as it was." in message
        assert content_of(run.folder.path / LAST) == before and not list(run.folder.path.glob(".*unfinished"))
        tensor.flatten()[0] = value
    spoil(run, "weight").fill_(math.nan)
    run.asked_to_stop = True
    assert "step 1: 1 of " in message_of(run, lambda: (train_epoch(run, 1), save(run, LAST)))
    with pytest.raises(FloatingPointError, match="not finite"):
        replay(run.folder.path, saved(run))
    assert content_of(run.folder.path / LAST) == before


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_detections_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their image is named, nothing is saved over, and the batch is detected in again by `replay`."""
    recipe = tiny(ema_decay=0.5)
    run = begun(replace(recipe, data=replace(recipe.data, limit=4)), tmp_path / "run")
    train_epoch(run, 0)
    BAD.add(int(run.val_data.index.image_ids[2]))
    spoil_collate(monkeypatch, steadydetr.data.loading, "pixels")
    message = message_of(run, lambda: evaluate(run, 0))
    (bad,) = BAD
    assert message.startswith(
        f"step 1: evaluating model: detections of image {bad} are not finite. Not finite are the pixels of image {bad}."
    )
    assert not (run.folder.path / LAST).exists()
    with pytest.raises(FloatingPointError, match=f"detections of image {bad} are not finite"):
        replay(run.folder.path, saved(run))
    BAD.clear()
    content = torch.load(saved(run), weights_only=True)
    content["batches"][0]["images"] = content["batches"][0]["images"].nan_to_num(0.5)
    torch.save(content, saved(run))
    assert replay(run.folder.path, saved(run)) == {}


def test_detections_of_predict_name_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (80, 60)).save(tmp_path / "photo.png")
    predictor = load(save_teacher(tmp_path / "detector", DETECTORS["deformable"]), "cpu")
    predictor = replace(predictor, card=replace(predictor.card, resize=FixedSize(64, 64)))
    BAD.add(0)  # the id of every picture
    spoil_collate(monkeypatch, steadydetr.tools.predictor, "pixels")
    with pytest.raises(FloatingPointError, match=r"the detections of .*photo\.png are not finite"):
        predictor.predict([tmp_path / "photo.png"])
    with pytest.raises(FloatingPointError, match=r"the detections of image 1 are not finite"):
        predictor.predict(Image.new("RGB", (80, 60)))


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("executed").touch, ())


def test_files_that_replay_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without running code in them; those of version 0.1 too, which hold one `Batch`."""
    monkeypatch.chdir(tmp_path)
    run = begun(tiny(), tmp_path / "run")
    path = tmp_path / "saved.pt"
    torch.save({"batch": replace(make_batch((2, 1)), step=3), "method": run.method.training_state()}, path)
    assert all(map(math.isfinite, replay(run.folder.path, path).values()))
    for content in ({"batch": Hostile(), "method": {}}, {"format": 2, "batches": []}, [1], {"batch": {}, "method": {}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"saved\.pt cannot be read as"):
            replay(run.folder.path, path)
    huge = {"batch": make_batch((2,)), "method": {"weight": torch.zeros(()).expand(10**12)}}
    for content in (huge, {"batch": replace(make_batch((2,)), images=torch.zeros(()).expand(10**12)), "method": {}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"saved\.pt claims a tensor of the shape \[1000000000000\], but holds only a part"):
            replay(run.folder.path, path)
    path.write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(ValueError, match=r"saved\.pt cannot be read as"):
        replay(run.folder.path, path)
    assert not Path("executed").exists()
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match=r"saved\.pt: its format is 99"):
        replay(run.folder.path, path)
    with pytest.raises(ValueError, match="is a folder"):
        replay(run.folder.path, tmp_path)


def test_a_link_in_the_place_of_the_kept_batch_is_not_followed(tmp_path: Path) -> None:
    run = begun(tiny_online("small-od-dino"), tmp_path / "run")
    next(run.method.student.parameters()).data.fill_(math.nan)
    (tmp_path / "mine").write_text("mine")
    run.folder.not_finite_path(1, 0).symlink_to(tmp_path / "mine")
    assert "Batch and weights are in" in message_of(run, lambda: train_epoch(run, 0))
    assert (tmp_path / "mine").read_text() == "mine" and not saved(run).is_symlink()


@pytest.mark.parametrize("reason", ["No space left on device", "two\nlines", ""])
def test_a_full_disk_hides_nothing(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tiny_online("small-od-dino"), tmp_path / "run")
    next(run.method.student.parameters()).data.fill_(math.nan)

    def full(*_: object) -> None:
        raise OSError(reason)

    monkeypatch.setattr(torch, "save", full)
    message = message_of(run, lambda: train_epoch(run, 0))
    assert "the matching cost of 'main' is not finite" in message
    assert f"could not be saved: {' '.join(reason.split())}." in message


def one_of_two(process: int, port: int, recipe: Recipe, folder: Path, what: str) -> None:
    """A process of two, of which the second meets something bad after the first step. Leaves the message in a file."""
    where = {
        "RANK": process,
        "LOCAL_RANK": process,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in where.items()})
    with pytest.MonkeyPatch.context() as patch:
        try:
            run = begun(recipe, folder)
            if what != "loss":
                spoil_collate(patch, steadydetr.data.loading, "boxes" if what == "cost" else "pixels")
            if process == 1 and what != "detections":
                BAD.add(list(run.loader.epoch(0))[1][0].image_ids[0])
            with keep_not_finite_batches(run):
                train_epoch(run, 0)
                BAD.add(int(run.val_data.index.image_ids[1]))
                evaluate(run, 0)
        except BaseException as error:
            (folder.parent / f"message{process}").write_text(f"{type(error).__name__}: {error}")
    os._exit(1)


@pytest.mark.parametrize("what", ["loss", "cost", "detections"])
def test_a_process_of_several(what: str, poison: Callable[..., Recipe], tmp_path: Path) -> None:
    """None waits for ever. The one that met it says so and saves its batch; losses and detections stop all of them at the same place."""
    recipe = poison(without_batch_norm(tiny()), accumulation=1, save_every=1, eval_every=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of = multiprocessing.get_context("fork")
    processes = [of.Process(target=one_of_two, args=(number, port, recipe, tmp_path / "run", what)) for number in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 1
    other, mine = ((tmp_path / f"message{number}").read_text() for number in (0, 1))
    files = {path.name for path in (tmp_path / "run").glob("not-finite-*")}
    expected = {
        "loss": "FloatingPointError: process 1, step 2: the loss poison/term is not finite for image",
        "cost": "FloatingPointError: process 1, step 2: the matching cost of 'main' is not finite for image",
        "detections": "FloatingPointError: process 1, step 2: evaluating model: detections of image",
    }[what]
    assert mine.startswith(expected) and "not-finite-step2-process1.pt" in files
    if what == "loss":
        assert "process 0, step 2: the gradient is not finite in" in other and "because of what another process added to it" in other
    if what == "detections":
        assert other.startswith(expected.replace("process 1", "process 0"))
    assert files == {f"not-finite-step2-process{process}.pt" for process in ((1,) if what == "cost" else (0, 1))}
    assert load_progress(tmp_path / "run" / LAST)["step"] == 1
