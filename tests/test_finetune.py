"""Training on: from trained weights, with frozen parts, for longer, until nothing gets better; and the recipe of `finetune`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steadydetr.training.loop
from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import load_detector, save_detector
from steadydetr.checkpoints.start import Start
from steadydetr.checkpoints.weights import read_weights
from steadydetr.cli import main
from steadydetr.data import open_data
from steadydetr.data.loading import TrainLoader
from steadydetr.data.transforms import FixedSize, ShortestSide
from steadydetr.detectors import DetectorConfig
from steadydetr.learning.class_terms import FocalCost
from steadydetr.objectives import Denoising, SetPrediction
from steadydetr.recipes import find
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.finetuning import METHODS, TrainingMethod, finetuned, training_for
from steadydetr.runs.folder import RunFolder
from steadydetr.runs.training_config import TrainingConfig
from steadydetr.tools.finetune import finetune, recipe_before
from steadydetr.training.loop import train
from steadydetr.training.optimiser import parameter_groups
from tests.conftest import DETECTORS
from tests.test_train import StopAfter, assert_equal_weights, records, tiny, weights

FOUR = "shapes:size=64,images=24,classes=4"
NAMES = open_data(FOUR).index.classes


def save(folder: Path, config: DetectorConfig = DETECTORS["dino"], classes: Sequence[str] = NAMES) -> Path:
    """A detector of random weights for images of 64 pixels."""
    torch.manual_seed(1)
    detector = config.build(len(classes))
    card = DetectorCard(config, tuple(classes), tuple(range(1, len(classes) + 1)), FixedSize(64, 64))
    save_detector(folder, detector.state_dict(), card)
    return folder


def starting(start: Path, **options: Any) -> Recipe:
    recipe = tiny("small-dino", epochs=1, lr=1e-12, warmup_steps=0, weight_decay=0.0, stability_images=0)
    return replace(recipe, detector=load_detector(start).card.detector, start=Start(str(start), **options))


def test_a_run_starts_from_trained_weights(tmp_path: Path) -> None:
    """With next to no learning rate they are what it ends with, the rows of known classes first; start.json says what was taken."""
    start, run = save(tmp_path / "start"), tmp_path / "run"
    train(starting(start), run, device="cpu")
    old, new = weights(start), weights(run / "last")
    moving = ("running_mean", "running_var", "num_batches_tracked")
    for name in (name for name in old if not name.endswith(moving)):
        rows = slice(None) if old[name].shape == new[name].shape else slice(4)
        torch.testing.assert_close(new[name][rows], old[name][rows], rtol=0, atol=1e-6)
    saved = json.loads((run / "start.json").read_text())
    assert saved["weights"] == str(start)
    assert saved["classes"] == {"kept": dict(zip(NAMES, NAMES, strict=True)), "started": ["ring", "star"], "dropped": []}


def test_old_classes_stay_and_a_resumed_run_needs_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights may be gone; the classes are those that the run began with."""
    start, run, whole = save(tmp_path / "start", classes=("boat", "disc", "Square")), tmp_path / "run", tmp_path / "whole"
    recipe = replace(starting(start, keep_classes=True), training=tiny("small-dino").training)
    train(recipe, whole, device="cpu")
    with monkeypatch.context() as patch:
        StopAfter(7, patch)
        assert not train(recipe, run, device="cpu")["finished"]
    (start / "model.safetensors").unlink()
    assert train(recipe, run, resume=True, device="cpu")["finished"]
    assert_equal_weights(whole / "last", run / "last")
    assert records(whole) == records(run)
    card = load_detector(run).card
    assert card.classes == ("disc", "square", "triangle", "cross", "ring", "star", "boat") and card.category_ids == (1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("name", ["small-od-dino", pytest.param("small-stable-dino", marks=pytest.mark.slow)])
def test_methods_with_teachers_start_from_them_too(name: str, tmp_path: Path) -> None:
    """An average that teaches begins with the weights as they were loaded."""
    start = save(tmp_path / "start", classes=open_data("shapes").index.classes)
    recipe = replace(tiny(name), detector=DETECTORS["dino"], start=Start(str(start)))
    student = recipe.build_student(6)
    recipe.start.load(student, recipe.detector, open_data("shapes").index.classes, read_weights(start))
    method = recipe.build(6, 10, student)
    for detector in (method.student, *method.teaching.values()):
        assert all(torch.equal(tensor, weights(start)[key]) for key, tensor in detector.state_dict().items())


def test_weights_that_do_not_fit_leave_no_folder(tmp_path: Path) -> None:
    start = save(tmp_path / "start")
    recipe = replace(starting(start), detector=DETECTORS["dab"])
    with pytest.raises(ValueError, match="does not fit DABDeformableDETR"):
        train(recipe, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_frozen_parts_stay_as_they_are(tmp_path: Path) -> None:
    """Their statistics of batch norm too; everything else learns."""
    start = save(tmp_path / "start", classes=open_data("shapes").index.classes)
    recipe = replace(tiny("small-od-dino", epochs=1, freeze=("backbone", "encoder", "level_embed")), detector=DETECTORS["dino"])
    train(replace(recipe, start=Start(str(start))), tmp_path / "run", device="cpu")
    old, new = weights(start), weights(tmp_path / "run/last")
    frozen = {name for name in old if name.startswith(("backbone.", "encoder.", "level_embed"))}
    assert any("running_mean" in name for name in frozen)
    assert not [name for name in frozen if not torch.equal(old[name], new[name])]
    assert not [name for name in old.keys() - frozen if torch.equal(old[name], new[name])]


def test_frozen_parts_have_no_dropout_and_no_gradient() -> None:
    recipe = tiny(freeze=("encoder",))
    detector = recipe.detector.build(3)
    detector.freeze(("encoder",))
    modes = {name: module.training for name, module in detector.train().named_modules() if isinstance(module, (nn.Dropout, nn.BatchNorm2d))}
    assert not any(mode for name, mode in modes.items() if name.startswith("encoder."))
    assert all(mode for name, mode in modes.items() if not name.startswith("encoder."))
    assert {name.split(".")[0] for name, p in detector.named_parameters() if not p.requires_grad} == {"encoder"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("bakbone",), "has no part 'bakbone' with parameters; did you mean 'backbone'"),
        (("backbone", "neck", "encoder", "decoder", "level_embed", "proposal_head", "query_content", "label_content"), "leaves nothing"),
    ],
)
def test_parts_that_cannot_be_frozen_are_named(parts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DETECTORS["dino"].build(3).freeze(parts)


def ids_of(loader: TrainLoader, epochs: int, start: int = 0) -> list[Any]:
    return [i for epoch in range(epochs) for step in loader.epoch(epoch, start if not epoch else 0) for b in step for i in b.image_ids]


@pytest.mark.parametrize("epoch_steps", [1, 2, 5, 7])
def test_epochs_of_any_number_of_steps_go_through_the_data_in_the_same_order(epoch_steps: int) -> None:
    """Three images of ten are left out of every pass, others in each, as where an epoch is a pass."""
    recipe = tiny()
    data = open_data("shapes:size=64,images=11")
    usual = TrainLoader(data, recipe.data, 4, seed=3)
    other = TrainLoader(data, recipe.data, 4, seed=3, epoch_steps=epoch_steps)
    assert other.steps_per_epoch == epoch_steps
    steps = 14
    expected = ids_of(usual, 7)[: 4 * steps]
    assert ids_of(other, steps // epoch_steps + 1)[: 4 * steps] == expected
    assert ids_of(other, 3, epoch_steps - 1) == ids_of(other, 3)[4 * (epoch_steps - 1) :]


@pytest.mark.slow
def test_a_run_of_short_epochs_is_the_run_of_long_ones(tmp_path: Path) -> None:
    recipe = tiny(epochs=2, drop_epochs=(0.5,))
    train(recipe, tmp_path / "long", device="cpu")
    train(replace(recipe, training=replace(recipe.training, epochs=4, epoch_steps=3)), tmp_path / "short", device="cpu")
    assert_equal_weights(tmp_path / "long/last", tmp_path / "short/last")
    assert [record["epoch"] for record in records(tmp_path / "short") if record["kind"] == "eval"] == [1, 2, 3, 4]


class Scores:
    """Evaluations of these AP, one after the other."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def __call__(self, run: Any, detector: Any) -> Any:
        found = evaluate_detector(run, detector)
        assert found is not None
        return replace(found, values={**found.values, "ap": self.scores.pop(0)})


evaluate_detector = steadydetr.training.loop.evaluate_detector


@pytest.mark.parametrize(
    ("patience", "scores", "epochs"),
    [
        (1, (0.0, 0.0, 5.0, 4.0), 4),
        pytest.param(2, (1.0, 3.0, 2.0, 3.0), 4, marks=pytest.mark.slow),
        (2, (3.0, 1.0, 4.0, 1.0, 1.0), 5),
        (0, (9.0, 1.0, 1.0, 1.0, 1.0, 1.0), 6),
    ],
)
def test_a_run_ends_when_nothing_gets_better(
    patience: int,
    scores: tuple[float, ...],
    epochs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not before AP has risen above 0. The run is finished, and its best is that of the highest AP."""
    monkeypatch.setattr(steadydetr.training.loop, "evaluate_detector", Scores(*scores))
    recipe = tiny(epochs=6, epoch_steps=1, patience=patience, stability_images=0)
    summary = train(recipe, tmp_path / "run", device="cpu")
    assert summary["finished"] and summary["epochs"] == epochs
    assert summary["best_epoch"] == scores.index(max(scores)) + 1
    assert ("AP has not risen" in capsys.readouterr().out) == bool(patience)


@pytest.mark.slow
def test_a_run_that_has_ended_early_goes_on_with_more_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steadydetr.training.loop, "evaluate_detector", Scores(3.0, 1.0, 2.0, 1.0))
    recipe = tiny(epochs=4, epoch_steps=1, patience=1, stability_images=0)
    assert train(recipe, tmp_path / "run", device="cpu")["epochs"] == 2
    assert train(recipe, tmp_path / "run", resume=True, device="cpu")["epochs"] == 2
    patient = replace(recipe, training=replace(recipe.training, patience=5))
    assert train(patient, tmp_path / "run", resume=True, device="cpu")["epochs"] == 4


@pytest.mark.parametrize("done", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_for_more_epochs(tmp_path: Path, done: int) -> None:
    """To the bit as if it had been asked for them at once, as long as the rate has not dropped in the shorter run."""
    recipe = tiny(epochs=done, drop_epochs=(2,), ema_decay=0.9)
    longer = replace(recipe, training=replace(recipe.training, epochs=3))
    train(recipe, tmp_path / "run", device="cpu")
    assert train(longer, tmp_path / "run", resume=True, device="cpu")["epochs"] == 3
    train(longer, tmp_path / "whole", device="cpu")
    assert_equal_weights(tmp_path / "whole/last", tmp_path / "run/last")
    assert records(tmp_path / "whole") == records(tmp_path / "run")
    recipe_now: Any = RunFolder(tmp_path / "run").read_config().recipe()
    assert recipe_now.training.epochs == 3


@pytest.mark.parametrize(
    ("options", "epochs", "reason"),
    [
        ({"schedule": "cosine"}, 3, "its learning rate was laid out"),
        pytest.param({"drop_epochs": (0.5,)}, 4, "its learning rate was laid out", marks=pytest.mark.slow),
        ({"drop_epochs": (5,)}, 1, "it has done 2 epochs"),
    ],
)
def test_a_run_whose_length_decides_its_rates_does_not_go_on_for_longer(
    tmp_path: Path, options: dict[str, Any], epochs: int, reason: str
) -> None:
    recipe = tiny(epochs=2, **options)
    train(recipe, tmp_path / "run", device="cpu")
    longer = replace(recipe, training=replace(recipe.training, epochs=epochs))
    with pytest.raises(ValueError, match=f"recipe.training.epochs: 2 -> {epochs}.*{reason}.*--from"):
        train(longer, tmp_path / "run", resume=True, device="cpu")


@pytest.mark.slow
def test_an_average_over_a_share_of_the_run_keeps_its_length(tmp_path: Path) -> None:
    recipe = tiny(epochs=1, drop_epochs=(5,), ema_decay=None)
    train(recipe, tmp_path / "run", device="cpu")
    longer = replace(recipe, training=replace(recipe.training, epochs=2))
    with pytest.raises(ValueError, match="its averaged weights are an average over a share of all its steps"):
        train(longer, tmp_path / "run", resume=True, device="cpu")


@pytest.mark.slow
def test_a_teacher_over_a_share_of_the_run_keeps_its_length(tmp_path: Path) -> None:
    recipe = tiny("small-od-dino", epochs=1, drop_epochs=(5,))
    train(recipe, tmp_path / "run", device="cpu")
    longer = replace(recipe, training=replace(recipe.training, epochs=2))
    with pytest.raises(ValueError, match="its teacher is an average over a share of all its steps"):
        train(longer, tmp_path / "run", resume=True, device="cpu")


def card(config: DetectorConfig) -> DetectorCard:
    return DetectorCard(config, ("a", "b"), (1, 2), FixedSize(64, 64))


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("method", METHODS)
def test_every_detector_has_a_recipe_by_every_method(name: str, method: TrainingMethod) -> None:
    config = DETECTORS[name]
    recipe = finetuned(card(config), Start("w"), 100, method)
    assert recipe.detector == config and recipe.start.weights == "w"
    recipe.build(2, 100)  # refuses what does not go together
    assert bool(recipe.teachers) == (method in ("od", "steady"))
    assert recipe.training.ema_decay > 0 or recipe.teachers


@pytest.mark.parametrize("images", [1, 3, 30, 150, 1000, 20_000, 10**6])
def test_few_images_are_gone_through_more_often(images: int) -> None:
    base = find("dino-4scale-r50-12ep").training
    training = training_for(base, images)
    per_pass = images // training.batch_size
    steps = training.epochs * (training.epoch_steps or per_pass)
    assert 1 <= training.batch_size <= min(16, images)
    assert 12 <= steps / per_pass <= 101
    assert training.epochs <= 20 and 0 <= training.warmup_steps <= steps
    assert training.lr <= base.lr


def test_images_keep_the_size_of_the_weights() -> None:
    data = finetuned(replace(card(DETECTORS["dino"]), resize=ShortestSide(800, 1333)), Start("w"), 100).data
    assert data.resize == ShortestSide(800, 1333)
    assert data.transform == replace(find("dino-4scale-r50-12ep").data.transform)


def test_the_recipe_of_a_run_is_gone_on_with(tmp_path: Path) -> None:
    """Its losses without its teachers."""
    train(tiny("small-od-dino", epochs=1), tmp_path / "run", device="cpu")
    before = recipe_before(str(tmp_path / "run"))
    assert before is not None and recipe_before(str(save(tmp_path / "start"))) is None
    found = load_detector(tmp_path / "run").card
    recipe = finetuned(found, Start("w"), 24, before=before)
    assert recipe.criterion == before.criterion and recipe.objectives == (SetPrediction(), Denoising(number=40, box_noise=0.4))
    assert not recipe.teachers and recipe.training.clip == before.training.clip
    plain = finetuned(found, Start("w"), 24, "plain", before)
    assert plain.criterion == find("dino-4scale-r50-12ep").criterion and plain.training == recipe.training
    stable = finetuned(found, Start("w"), 24, before=find("desk-small"))
    assert stable.criterion == find("desk-small").criterion and stable.objectives == find("desk-small").objectives
    assert finetuned(found, Start("w"), 24, "od", find("desk-small")).criterion.class_cost == FocalCost()


@pytest.mark.slow
def test_finetune_in_python(tmp_path: Path) -> None:
    start = save(tmp_path / "start")

    def quickly(recipe: Recipe) -> Recipe:
        training = replace(recipe.training, epochs=1, epoch_steps=2, stability_images=0)
        return replace(recipe, training=training, data=replace(recipe.data, workers=0))

    summary = finetune(start, "shapes:size=64,images=16", tmp_path / "run", "od", quickly, device="cpu")
    assert summary["finished"] and load_detector(tmp_path / "run").card.classes == open_data("shapes").index.classes


SHORT = {"--data.workers": "0", "--training.epochs": "1", "--training.epoch-steps": "2", "--training.stability-images": "0"}
QUICKLY = [word for flag in SHORT.items() for word in flag] + ["--device", "cpu"]


def test_finetune_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As --dry-run says it, then trained, evaluated, resumed for longer, and started from again."""
    start, data, run = save(tmp_path / "start"), "shapes:size=64,images=16", str(tmp_path / "run")
    words = ["finetune", str(start), "--data", data, "--output", run, "--classes", "cross=star", *QUICKLY]
    main([*words, "--dry-run"])
    said = capsys.readouterr().out
    plan = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert plan["training"]["epochs"] == 1 and plan["start"]["classes"] == ["cross=star"] and not Path(run).exists()
    assert "4 of 6 classes have weights; 2 start anew: cross, ring" in said and "dropped" not in said
    assert said.rstrip().splitlines()[-1].startswith("16 training images: 1 epoch of 2 steps, 4 images in a step. ")
    main(words)
    said = capsys.readouterr().out
    assert f"It starts from {start}:" in said and "2 start anew: cross, ring" in said
    main([*words, "--resume", "--dry-run"])  # trains nothing, of a run that is there either
    assert "would start from" in capsys.readouterr().out
    words[words.index("--training.epochs") + 1] = "2"
    with pytest.raises(SystemExit):  # its rate drops at a share of the run
        main([*words, "--resume"])
    main(["eval", run, "--data", data, "--device", "cpu"])
    again = ["train", "small-dino", "--from", run, "--data", data, "--output", f"{run}2", "--detector.backbone.stem", "4", *QUICKLY]
    with pytest.raises(SystemExit):
        main(again)
    assert "does not fit DINO as it is configured here" in capsys.readouterr().err
    main(["finetune", run, "--data", data, "--output", f"{run}2", "--method", "steady", *QUICKLY])
    assert "6 of 6 classes have weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x"], "name the weights first"),
        (["runs/none", "--data", "shapes"], "runs/none"),
        (["START"], "--data is missing"),
        (["START", "--data", "shapes", "--method", "stabel"], "did you mean 'stable'"),
        (["START", "--data", "shapes", "--training.freeze", "x", "--training.epohs", "3"], "no field 'epohs'|there is no option"),
    ],
)
def test_mistakes_of_finetune_are_one_line(tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(save(tmp_path / "start")) if word == "START" else word for word in words]
    with pytest.raises(SystemExit):
        main(["finetune", *words])
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(message, said)


def test_classes_need_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "small-dino", "--keep-classes"])
    assert "name them by --from" in capsys.readouterr().err


def test_the_encoder_has_a_rate_of_its_own() -> None:
    detector = DETECTORS["dino"].build(3)
    config = TrainingConfig(encoder_lr_factor=0.5, backbone_lr_factor=0.1, offset_lr_factor=0.2)
    factors = {id(p): group["lr_factor"] for group in parameter_groups(detector, config) for p in group["params"]}  # type: ignore[attr-defined]
    for name, parameter in detector.named_parameters():
        offsets = 0.2 if "sampling_offsets" in name else 1.0
        wanted = 0.1 if name.startswith("backbone") else offsets * (0.5 if name.startswith(("encoder", "neck")) else 1.0)
        assert factors[id(parameter)] == pytest.approx(wanted), name
