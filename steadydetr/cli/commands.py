"""The subcommands: each a dataclass of its arguments and a short function."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from steadydetr.cli.overrides import parse
from steadydetr.recipe import Recipe

Positional = tyro.conf.Positional


@dataclass(frozen=True)
class TrainArguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    data: str | None = None
    """Folder of the data set, or shapes; several are joined by +. Shorthand of --data.source."""
    output: Path | None = None
    """Folder of the run; runs/RECIPE if not given. An existing run is never overwritten."""
    resume: bool = False
    """Go on from the last checkpoint in --output."""
    without: tuple[str, ...] = ()
    """Objectives to leave out, by name, as in --without denoising."""
    device: Literal["auto", "cpu"] = "auto"
    """cpu keeps a GPU out of it."""


def train(words: Sequence[str]) -> None:
    from steadydetr.recipes import find
    from steadydetr.train import train as run_training

    description = (
        "Train a recipe. Every field of it is a flag, for example\n"
        "  steadydetr train dino-4scale-r50-12ep --data path/to/coco --output runs/dino --training.batch-size 8\n"
        "On several GPUs: torchrun --nproc-per-node 8 -m steadydetr train dino-4scale-r50-12ep --data path/to/coco"
    )
    if not words or words[0].startswith("-"):
        if not {"-h", "--help"} & set(words):
            raise ValueError("name a recipe first, as in `steadydetr train quickstart`; `steadydetr recipes` lists them")
        words = ["quickstart", *words]
    recipe = _without(find(words[0]), words)
    arguments = parse(TrainArguments, words[1:], f"steadydetr train {words[0]}", description, TrainArguments(recipe))
    recipe = arguments.recipe
    if arguments.data is not None:
        recipe = replace(recipe, data=replace(recipe.data, source=arguments.data))
    output = arguments.output or Path("runs") / recipe.name
    summary = run_training(recipe, output, arguments.resume, None if arguments.device == "auto" else arguments.device)
    if summary["finished"] and int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({key: value for key, value in summary.items() if not isinstance(value, dict)}, indent=2))


def _without(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """The recipe less the objectives after --without, so that their flags do not exist either."""
    if "--without" not in words:
        return recipe
    start = list(words).index("--without") + 1
    stop = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
    names = [objective.name for objective in recipe.objectives]
    if unknown := set(words[start:stop]) - set(names):
        raise ValueError(f"--without {' '.join(sorted(unknown))}: the objectives of {recipe.name} are {', '.join(names)}")
    return replace(recipe, objectives=tuple(o for o in recipe.objectives if o.name not in words[start:stop]))


@dataclass(frozen=True)
class EvalArguments:
    checkpoint: Positional[Path]
    """A run (its best is taken), a checkpoint folder, or a converted one."""
    data: str
    """Folder of the data set, or shapes."""
    split: str = "val"
    """val, test or any split that the data has."""
    batch_size: int = 4
    workers: int = 4
    device: str = "auto"
    output: Path | None = None
    """Where to write the metrics as JSON; detections go beside it as COCO results."""
    nms: float | None = None
    """IoU of class-wise suppression; the checkpoint's own if not given."""


def evaluate(words: Sequence[str]) -> None:
    from steadydetr.predict import evaluate_checkpoint

    arguments = parse(EvalArguments, words, "steadydetr eval", "COCO and VOC metrics of a checkpoint on a data set.")
    evaluation = evaluate_checkpoint(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(arguments)})
    console = Console()
    table = Table("metric", "%")
    for key, value in evaluation.as_dict().items():
        if isinstance(value, float):
            table.add_row(key.replace("_", " "), f"{value:.2f}" if value >= 0 else "no such objects")
    console.print(table)
    classes = Table("class", "AP", "AP50")
    for name, value in evaluation.per_class.items():
        classes.add_row(name, f"{value:.2f}", f"{evaluation.per_class_ap50[name]:.2f}")
    console.print(classes)
    for warning in evaluation.warnings:
        console.print(f"AP is low: {warning}")


@dataclass(frozen=True)
class PredictArguments:
    checkpoint: Positional[Path]
    """A run (its best is taken), a checkpoint folder, or a converted one."""
    images: Positional[tuple[Path, ...]]
    """Image files, folders of images, or a COCO image list (JSON with images, no annotations needed, as of test-dev)."""
    output: Path = Path("predictions")
    """Folder for results.json (COCO results) and the pictures."""
    image_folder: Path | None = None
    """Where the images of a COCO image list are; beside it if not given."""
    threshold: float = 0.3
    """Least score that is drawn; the results hold all."""
    draw: bool = True
    """--no-draw: no pictures."""
    batch_size: int = 4
    device: str = "auto"


def predict(words: Sequence[str]) -> None:
    from steadydetr.predict import load, predict_files

    description = "Detect objects in images: pictures, and COCO results for an evaluation server."
    arguments = parse(PredictArguments, words, "steadydetr predict", description)
    report = predict_files(
        load(arguments.checkpoint, arguments.device),
        arguments.images,
        arguments.output,
        image_folder=arguments.image_folder,
        threshold=arguments.threshold,
        draw=arguments.draw,
        batch_size=arguments.batch_size,
    )
    print(f"{report.images} images, {report.detections} detections in {arguments.output / 'results.json'}")
    for failure in report.failures:
        print(f"left out: {failure}")
    if report.failures:
        raise SystemExit(1)


@dataclass(frozen=True)
class CheckArguments:
    data: Positional[str]
    """Folder of the data set, or shapes."""
    splits: tuple[str, ...] = ("train", "val", "test")
    """Splits to look at, those that are there."""
    output: Path | None = None
    """Where to write every finding as JSON."""


def check(words: Sequence[str]) -> None:
    from steadydetr.config import write_json
    from steadydetr.data.check import check_data, print_report

    arguments = parse(CheckArguments, words, "steadydetr check", "Look for what is wrong with a data set before training.")
    report = check_data(arguments.data, arguments.splits)
    print_report(report)
    if arguments.output is not None:
        write_json(arguments.output, dataclasses.asdict(report))
    if report.fatal:
        raise SystemExit(1)


@dataclass(frozen=True)
class ConvertArguments:
    file: Positional[Path]
    """.pth, .pt, .bin or .safetensors of the original project."""
    output: Positional[Path]
    """Folder for the converted checkpoint."""
    classes: str = "auto"
    """coco (by the number of class rows: 80 in a row, or 91 original ids), a text file with one name a line, or auto."""
    heads: int = 8
    """Attention heads, which no shape of the file tells."""


def convert(words: Sequence[str]) -> None:
    from steadydetr.convert import convert_file

    description = "Convert an official checkpoint of Deformable DETR, DINO, DAB-Deformable-DETR, detrex, mmdet or Hugging Face."
    arguments = parse(ConvertArguments, words, "steadydetr convert", description)
    converted = convert_file(arguments.file, arguments.output, arguments.classes, arguments.heads)
    print(f"{arguments.file}: {converted.layout}, {len(converted.state)} tensors, {converted.num_classes} classes -> {arguments.output}")


@dataclass(frozen=True)
class RecipesArguments:
    name: Positional[str] = field(default="")
    """A recipe to show in full; all are listed if not given."""


def recipes(words: Sequence[str]) -> None:
    from steadydetr.config import to_plain
    from steadydetr.recipes import find, names

    arguments = parse(RecipesArguments, words, "steadydetr recipes", "List the recipes, or show one in full.")
    console = Console()
    if arguments.name:
        console.print_json(json.dumps(to_plain(find(arguments.name))))
        return
    table = Table("recipe", "what it is", "epochs", "reported COCO AP")
    for name in names():
        recipe = find(name)
        table.add_row(name, recipe.notes, str(recipe.training.epochs), recipe.reported or "-")
    console.print(table)
