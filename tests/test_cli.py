"""The command line: help without torch, typed overrides, errors of one line, and every command on a tiny run."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

import steadydetr
from steadydetr.checkpoints.card import DetectorCard
from steadydetr.cli import COMMANDS, main, take_plugins
from steadydetr.cli.overrides import choices, put
from steadydetr.cli.parsing import find_function
from steadydetr.cli.training_arguments import read_training_arguments
from steadydetr.cli.words import take_flag
from steadydetr.config import FORMAT, to_plain
from steadydetr.data import DetrTransform, FixedSizeTransform
from steadydetr.data.opening import BOXES_ALONE
from steadydetr.detectors import DeformableDETRConfig, DINOConfig
from steadydetr.equations.stable import half_sine
from steadydetr.kinds import nearest
from steadydetr.learning.class_terms import FocalCost, HardTarget, PositionModulatedCost, PositionTarget, QualityTarget
from steadydetr.learning.criterion import Weights
from steadydetr.nn.configs import SmallBackboneConfig, TimmBackboneConfig
from steadydetr.objectives import Denoising, Objective, SetPrediction
from steadydetr.recipe_index import recipe_lines
from steadydetr.recipes import find, names
from steadydetr.recipes.base import Recipe
from steadydetr.training.preparation import check_masks_are_read
from tests.commands import shown_commands, understand
from tests.write_recipe_index import lines

SHAPES = "shapes:size=64,images=16"
SIZES = [f"--data.{part}.{side}" for part in ("transform", "resize") for side in ("height", "width")]
TINY = [word for flag in SIZES for word in (flag, "64")] + ["--data.workers", "0", "--data.limit", "8", "--device", "cpu"]


def recipe_of(words: str, name: str = "small-dino") -> Recipe:
    return read_training_arguments(name, words.split())[0]


# overrides


def test_without_words_a_recipe_is_itself() -> None:
    for name in names():
        assert recipe_of("", name) == find(name)


def test_nested_fields() -> None:
    recipe = recipe_of("--training.epochs 24 --detector.queries 300 --detector.transformer.ffn 64 --criterion.loss-weights.giou 4")
    start = find("small-dino")
    assert recipe.training == replace(start.training, epochs=24)
    assert (recipe.detector.queries, recipe.detector.transformer.ffn) == (300, 64)
    assert recipe.criterion.loss_weights == replace(start.criterion.loss_weights, giou=4.0)
    assert (recipe.objectives, recipe.data) == (start.objectives, start.data)


def test_none_tuples_booleans_and_underscores() -> None:
    recipe = recipe_of("--criterion.alpha None --training.drop_epochs 5 7.5 --training.compile --nms 0.7")
    assert recipe.criterion.alpha is None and recipe.training.drop_epochs == (5, 7.5) and recipe.training.compile and recipe.nms == 0.7
    assert not recipe_of("--detector.no-look-forward-twice").detector.look_forward_twice  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["half_sine", "steadydetr.equations.stable.half_sine"])
def test_functions_by_short_and_full_name(name: str) -> None:
    recipe = recipe_of(f"--criterion.class-target position --criterion.class-target.warp {name}")
    assert recipe.criterion.class_target == PositionTarget(warp=half_sine)
    assert find_function(name) is half_sine


def test_costs_and_targets_are_parts() -> None:
    recipe = recipe_of("--criterion.class-cost position-modulated --criterion.class-cost.exponent 1 --criterion.class-target quality")
    assert recipe.criterion.class_cost == PositionModulatedCost(exponent=1.0)
    assert recipe.criterion.class_target == QualityTarget()
    recipe = recipe_of("--criterion.class-cost focal --criterion.class-target hard")
    assert (recipe.criterion.class_cost, recipe.criterion.class_target) == (FocalCost(), HardTarget())


def test_objectives_by_their_names() -> None:
    recipe = recipe_of("--objectives.denoising.number 200")
    assert recipe.objectives == (SetPrediction(), Denoising(number=200, box_noise=0.4))
    assert recipe_of("--objectives.denoising none").objectives == (SetPrediction(),)
    weighted = recipe_of("--objectives.denoising.weights=weights --objectives.denoising.weights.label 3").objectives[1]
    assert isinstance(weighted, Denoising) and weighted.weights == Weights(label=3.0)


def test_parts_are_exchanged_and_then_set() -> None:
    assert isinstance(find("quickstart").data.transform, FixedSizeTransform)
    recipe = recipe_of("--data.transform detr --data.transform.longest 640 --detector.backbone timm-backbone")
    assert recipe.data.transform == DetrTransform(longest=640)
    assert isinstance(recipe.detector, DINOConfig) and recipe.detector.backbone == TimmBackboneConfig()
    small = recipe_of("--detector deformable-detr --detector.backbone small-backbone --detector.backbone.stem 16 --detector.refine")
    assert small.detector == DeformableDETRConfig(SmallBackboneConfig(stem=16), refine=True)


@dataclass(frozen=True)
class Second(SetPrediction):
    @property
    def name(self) -> str:
        return "second"


def test_putting_a_part_into_a_tuple_leaves_the_others() -> None:
    objectives: tuple[Objective, ...] = (SetPrediction(), Second())
    recipe = replace(find("quickstart"), objectives=objectives)
    assert {choice.flag for choice in choices(recipe)} >= {"--objectives.main", "--objectives.second", "--detector", "--data.resize"}
    assert put(recipe, ("objectives", "main"), None).objectives == (Second(),)


def test_shorthands() -> None:
    recipe, arguments = read_training_arguments("quickstart", ["--data", "somewhere", "--seed", "7", "--output", "out", "--resume"])
    assert (recipe.data.source, recipe.training.seed) == ("somewhere", 7)
    assert (arguments.output, arguments.resume, arguments.device) == (Path("out"), "yes", "auto")


# errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean 'train'"),
        (["train", "quickstrat"], "did you mean 'quickstart'"),
        (["train", "--data", "shapes"], "name a recipe first"),
        (["train", "quickstart", "--data.transform", "fixed"], "did you mean 'fixed-size'"),
        (["train", "quickstart", "--data", "no/such/folder"], "there is no such folder"),
        (
            ["train", "quickstart", "--detector", "conditional-detr", "--detector.backbone", "small-backbone", "--data", SHAPES],
            "is about a point, which takes no box: --objectives.auxiliary none",
        ),
        (["eval", "no/such/run", "--data", "shapes"], "does not exist"),
        (["predict", "no/such/run", "image.jpg"], "does not exist"),
        (["check", "no/such/folder"], "there is no such folder"),
        (["check", __file__], "it is a file; a data set is a folder"),
        (
            ["check", str(Path(__file__).parent)],
            "What was looked for: COCO: annotations/instances_SPLIT*.json beside folders of images; Roboflow: ",
        ),
        (["convert", "no/such/file.pth", "out"], "no/such/file.pth"),
        (["recipes", "dino"], "there is no recipe"),
        (["compare", "small-dino", "small-od-dino", "--training.epochs", "1"], "stand after --, as in `-- --training.epochs`"),
    ],
)
def test_errors_are_short_and_name_what_to_do(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(words)
    captured = capsys.readouterr().err
    assert exit_.value.code == 2 and said in captured
    assert captured.startswith(f"steadydetr {words[0]}: ") and "Traceback" not in captured


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.epohcs", "3"], "--training.epochs"),
        (["--criterion.class-target", "positon"], "did you mean 'position'"),
        (["--criterion.class-target", "position", "--criterion.class-target.warp", "half_sin"], "did you mean 'half-sine'"),
        (["--criterion.class-target.warp", "steadydetr.equations.stabel.half_sine"], "there is no function"),
        (["--criterion.class-target.warp", "exponential", "--criterion.class-target.rescale", "none"], "needs class_target.rescale"),
        (["--training.epochs", "many"], "many"),
        (["--detector.transformer.heads", "5"], "transformer.heads"),
    ],
)
def test_wrong_flags_name_the_right_ones(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "small-stable-dino", *words])
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())  # without the box and its line breaks
    assert exit_.value.code == 2 and said in shown


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="there is no such command"):
        main(["--debug", "trian"])


@pytest.mark.parametrize(
    ("words", "value", "left"),
    [
        ("train a --teacher b --seed 1", "b", "train a --seed 1"),
        ("train --teacher=b=c a", "b=c", "train a"),
        ("--teacher", "", ""),
        ("a --teacher= b", "", "a b"),
        ("a --teacher b --teacher c", "b", "a --teacher c"),
        ("a --teachers b", None, "a --teachers b"),
    ],
)
def test_a_flag_is_taken_with_its_word(words: str, value: str | None, left: str) -> None:
    assert take_flag(words.split(), "--teacher") == (value, left.split())
    assert take_flag([word.replace("--teacher", "--the_teacher") for word in words.split()], "--the-teacher")[0] == value


def test_plugins_are_taken_in_their_order() -> None:
    assert take_plugins(["train", "--plugin", "a", "x", "--plugin=b", "--plugin", "c"]) == (["train", "x"], ["a", "b", "c"])


# help


@pytest.mark.parametrize("command", ["train", "distill", "cost"])
def test_a_recipe_comes_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["--data", "shapes", "-h"]):
        with pytest.raises(SystemExit) as exit_:
            main([command, *words])
        assert exit_.value.code == 0 and capsys.readouterr().out.startswith(f"steadydetr {command} RECIPE")
    with pytest.raises(SystemExit) as exit_:
        main([command, "--data", "shapes"])
    assert exit_.value.code == 2 and f"name a recipe first, as in `steadydetr {command} " in capsys.readouterr().err


def test_help_comes_without_torch() -> None:
    said_without_what_is_slow([["--help"], *([command, "--help"] for command in COMMANDS)], "steadydetr")


HEAVY = ("torch", "torchvision", "timm", "matplotlib", "scipy", "transformers", "accelerate", "numpy")


def said_without_what_is_slow(commands: list[list[str]], *words: str, folder: Path | None = None) -> None:
    """Run commands in one new process. Each must say the words, and none may import what takes seconds."""
    script = f"""
import contextlib, io, sys
from steadydetr.cli import main
for words in {commands!r}:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        main(words)
    assert "Traceback" not in out.getvalue(), out.getvalue()
    assert all(word in out.getvalue() for word in {words!r}), (words, out.getvalue())
    assert not {{*{HEAVY!r}}} & set(sys.modules), words
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=folder)


def test_recipes_are_listed_without_torch() -> None:
    said_without_what_is_slow([["recipes"]], *(line.name for line in recipe_lines()))


def test_typos_in_names_are_told_without_torch(tmp_path: Path) -> None:
    recipes = [[command, "quickstrat"] for command in ("train", "distill", "cost", "recipes")]
    recipes += [["compare", "small-dino", "a=quickstrat --training.epochs 3"], ["train", "Quick_strat", "--data", "x"]]
    said_without_what_is_slow(recipes, "did you mean 'quickstart'?", folder=tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    (tmp_path / "run/model.safetensors").write_text("")
    said_without_what_is_slow([["stability", "run", "shapes", "--criterion", "quickstrat"]], "did you mean 'quickstart'?", folder=tmp_path)
    places = [["eval", "rnu", "--data", "x"], ["predict", "rnu", "a.png"], ["stability", "rnu", "x"], ["report", "rnu"], ["figures", "rnu"]]
    said_without_what_is_slow([*places, ["convert", "rnu", "out"], ["predict", "run", "rnu"]], "rnu", folder=tmp_path)
    said_without_what_is_slow([["trian"]], "did you mean 'train'?", folder=tmp_path)
    said_without_what_is_slow([["eval", "run", "--dota", "x"], ["eval", "run", "--data", "x", "--batch-size", "z"]], "--", folder=tmp_path)


def test_a_file_in_the_place_of_a_runs_folder_is_called_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "quickstart", "--output", str(tmp_path / "mine")])
    assert "mine is not a folder: choose another --output" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_told_without_torch(tmp_path: Path) -> None:
    for folder in ("run", "runs/quickstart"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    commands = [["train", "quickstart"], ["train", "quickstart", "--output", "run"], ["distill", "small-dino", "--output=run"]]
    said_without_what_is_slow([*commands, ["train", "some.json", "--output", "run"]], "already holds a run: go on", folder=tmp_path)


def test_recipes_are_shown_and_changed_without_torch(tmp_path: Path) -> None:
    """Their help with every flag, and mistakes in flags and values."""
    (tmp_path / "mine.json").write_text(json.dumps(to_plain(find("small-od-dino"))))
    said_without_what_is_slow([["recipes", "small-dino"]], '"kind": "recipe"', '"kind": "small-backbone"')
    named = [["train", "small-dino"], ["train", "mine.json"], ["cost", "small-dino"], ["distill", "small-distill-deformable-detr"]]
    shown = ("--detector.queries", "--criterion.gamma", "--training.epochs", "--data.source")
    said_without_what_is_slow([[*words, "--help"] for words in named], *shown, folder=tmp_path)
    named += [["compare", "small-dino", "small-od-dino", "--"], ["compare", "small-dino", "small-od-dino", "--seeds", "2", "--"]]
    wrong = {
        "did you mean '--training.epochs'?": ["--trainin.epochs", "3"],
        "invalid choice 'wave'": ["--training.schedule", "wave"],
        "training.epochs = 0 must be": ["--training.epochs", "0"],
        "did you mean 'hard'?": ["--criterion.class-target", "hrad"],
        "has no field 'gama'": ["--criterion.class-cost", "focal", "--criterion.class-cost.gama", "2"],
    }
    for said, flags in wrong.items():
        said_without_what_is_slow([[*words, *flags] for words in named], said, folder=tmp_path)


def test_data_and_teachers_that_are_not_there_are_told_without_torch(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    card = DetectorCard(find("small-dino").detector, ("a",), (1,))
    (tmp_path / "run/config.json").write_text(json.dumps({"format": FORMAT} | to_plain(card)))
    (tmp_path / "run/model.safetensors").write_text("")
    trained = [["train", "small-dino"], ["distill", "small-dino", "--teacher", "run"], ["compare", "small-dino", "small-od-dino"]]
    commands = [[*words, "--data", "shapes+nowhere"] for words in [*trained, ["eval", "run"]]]
    commands += [["train", "small-dino", "--data.val-source", "nowhere"], ["stability", "run", "nowhere"], ["check", "nowhere"]]
    said_without_what_is_slow(commands, "data nowhere: there is no such folder", folder=tmp_path)
    (tmp_path / "nowhere").mkdir()
    said_without_what_is_slow(commands, "no layout of data was recognised", folder=tmp_path)
    said_without_what_is_slow(
        [["distill", "small-dino", "--teacher", "rnu"]], "the teacher: there is no file or folder rnu", folder=tmp_path
    )
    started = [["finetune", "rnu", "--data", "shapes"], ["train", "small-dino", "--from", "rnu"]]
    said_without_what_is_slow(started, "there is no file or folder rnu", folder=tmp_path)
    said_without_what_is_slow([["finetune", "nowhere", "--data", "shapes"]], "nowhere holds no checkpoint", folder=tmp_path)
    said_without_what_is_slow([["distill", "small-dino"]], "no teacher is named", folder=tmp_path)
    (tmp_path / "run/config.json").write_text("{}")
    said_without_what_is_slow(
        [["eval", "run", "--data", "shapes"], ["stability", "run", "shapes"]], "config.json: an object", folder=tmp_path
    )


def test_every_recipe_is_made_without_torch() -> None:
    script = f"""
import sys
from steadydetr.config import from_plain, to_plain
from steadydetr.kinds import load_own
from steadydetr.recipes import find, names
load_own()
assert all(from_plain(to_plain(find(name))) == find(name) for name in names())
assert not {{*{HEAVY!r}}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_list_of_recipes_is_that_of_the_recipes() -> None:
    assert recipe_lines() == lines(), "python -m tests.write_recipe_index"
    for line in recipe_lines():
        assert find(line.name).name == line.name  # by which `train` knows its folder before the recipe is made


@pytest.mark.parametrize("width", ["40", "80", "200"])
def test_no_name_of_a_recipe_is_cut(width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    main(["recipes"])
    shown = capsys.readouterr().out
    assert all(f" {line.name} " in shown for line in recipe_lines()) and "…" not in shown


def test_long_lists_in_messages_end_after_the_first() -> None:
    assert nearest("zzz", [f"name-{n}" for n in range(50)]).endswith("name-11 and 38 more")
    assert nearest("zzz", ["a", "b"]) == "; there are a, b" and nearest("zzz", []) == "; there are none"


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md", "docs/own-data.md", "docs/training.md", "docs/recipes.md"])
def test_commands_of_the_documentation_are_understood(page: str) -> None:
    commands = shown_commands((Path(__file__).parents[1] / page).read_text())
    assert ("train" if "own-data" in page else "distill") in {command.split()[1] for command in commands}
    for command in commands:
        assert understand(command)


def test_flags_of_maskdino_are_understood() -> None:
    """Those of its table, and those that errors advise: to learn masks again, and to train without."""
    page = (Path(__file__).parents[1] / "docs/recipes.md").read_text()
    section = page.partition("\n### MaskDINO\n")[2].partition("\n## ")[0]
    plain, *others = (
        understand(f"steadydetr train maskdino-r50-12ep {flags}")[0] for flags in ("", *re.findall(r"\| `(--.+)` \|", section))
    )
    assert len(others) >= 6
    advised = " ".join(re.findall(r"--[\w.-]+(?: none| no\b)?", BOXES_ALONE))
    (boxes,) = understand(f"steadydetr train maskdino-r50-12ep {advised}")
    assert (boxes.data.masks, boxes.criterion.masks, boxes.detector.box_init) == (False, None, "no")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="leaves unread") as refused:
        check_masks_are_read(replace(plain, data=replace(plain.data, masks=False)))
    (flag,) = re.findall(r"unread: (.+), or ", str(refused.value))
    assert understand(f"steadydetr train maskdino-r50-12ep --data.no-masks {flag}") == [plain]


@pytest.mark.parametrize("command", ["train", "distill", "cost", "compare"])
def test_commands_of_the_help_are_understood(command: str) -> None:
    texts = vars(importlib.import_module(f"steadydetr.cli.{command}"))
    commands = shown_commands(texts.get("USAGE") or texts["DESCRIPTION"])
    assert len(commands) >= 3
    for shown in commands:
        assert shown.split()[1] == command and understand(shown)


def test_help_of_a_recipe_shows_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "dino-4scale-r50-12ep", "--help"])
    shown = capsys.readouterr().out
    assert not exit_.value.code
    for flag in ("--detector.queries", "--objectives.denoising.number", "--criterion.class-target", "--data.transform {detr,"):
        assert flag in shown


def test_what_is_reported_for_a_recipe_is_not_for_another() -> None:
    """Other data, another seed or other flags that decide nothing leave it; one that changes what is learned takes it away."""
    said = find("dino-4scale-r50-12ep").reported
    assert said
    for flags, kept in {
        "--data shapes --seed 3 --training.eval-every 2 --detector.backbone.weights none": True,
        "--objectives.denoising none": False,
        "--detector.queries 300": False,
        "--training.epochs 13": False,
        "--training.epochs 13 --reported 50": True,
    }.items():
        reported = read_training_arguments("dino-4scale-r50-12ep", flags.split())[0].reported
        assert reported == (("50" if "--reported" in flags else said) if kept else ""), flags


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == steadydetr.__version__


# commands


def test_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    main(["recipes"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in names()) and "49.0 (DINO Table 1)" in shown
    main(["recipes", "quickstart"])
    assert json.loads(capsys.readouterr().out)["name"] == "quickstart"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    main(["train", "quickstart", "--data", SHAPES, "--output", str(folder), "--training.epochs", "1", *TINY])
    return folder


def test_train_leaves_a_whole_run(run_folder: Path) -> None:
    present = {path.name for path in run_folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "last", "best", "summary.json", "curves.png", "predictions.png"} <= present
    assert json.loads((run_folder / "summary.json").read_text())["images_seen"] == 8


def test_a_run_is_never_overwritten(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "quickstart", "--data", SHAPES, "--output", str(run_folder), *TINY])
    assert "already holds a run" in capsys.readouterr().err


def test_resuming_a_finished_run_does_nothing_more(run_folder: Path) -> None:
    main(["train", "quickstart", "--data", SHAPES, "--output", str(run_folder), "--training.epochs", "1", *TINY, "--resume"])
    assert json.loads((run_folder / "summary.json").read_text())["step"] == 1


def test_eval(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "metrics.json"
    main(["eval", str(run_folder), "--data", SHAPES, "--workers", "0", "--device", "cpu", "--output", str(output)])
    assert "AP50" in capsys.readouterr().out
    assert json.loads(output.read_text())["images"] == 16
    assert json.loads(output.with_suffix(".results.json").read_text())


def test_eval_at_any_iou(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for all classes, a column for each, and in the file."""
    words = ["eval", str(run_folder), "--data", SHAPES, "--workers", "0", "--device", "cpu", "--output", str(tmp_path / "m.json")]
    main([*words, "--iou", "0.3", "0.625"])
    said = capsys.readouterr().out
    assert re.search(r"AP30 ", said) and re.search(r"class .* AP .* AP50 .* AP30 .* AP62\.5", said)
    written = json.loads((tmp_path / "m.json").read_text())
    assert {"ap30", "ap62.5"} <= set(written) and set(written["per_class_ap62.5"]) == set(written["per_class"])
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--overwrite", "--iou", "50"])
    assert stopped.value.code == 2 and "--iou 50 must lie above 0 and up to 1" in capsys.readouterr().err


def test_predict_names_what_it_could_not_read(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (80, 60), "grey").save(images / "good.png")
    (images / "bad.jpg").write_bytes(b"not an image")
    with pytest.raises(SystemExit) as exit_:
        main(["predict", str(run_folder), str(images), "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert exit_.value.code == 1 and "bad.jpg" in capsys.readouterr().out
    assert (tmp_path / "out" / "good.png").exists()
    assert {result["category_id"] for result in json.loads((tmp_path / "out" / "results.json").read_text())} <= set(range(1, 7))


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", SHAPES, "--output", str(tmp_path / "findings.json")])
    assert "triangle" in capsys.readouterr().out
    assert json.loads((tmp_path / "findings.json").read_text())["findings"] == []


def test_the_same_in_python(run_folder: Path) -> None:
    detector = steadydetr.load(run_folder, device="cpu")
    found = detector.predict(Image.new("RGB", (80, 60), "grey"), threshold=0)
    assert len(found) and found.draw(Image.new("RGB", (80, 60))).size == (80, 60)
    assert not set(found.class_names) - set(detector.names)
