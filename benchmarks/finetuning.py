"""What trained weights are worth: steps until a detector of them is as good as one from scratch, and what rows of classes add.

A detector is trained on four shapes. Then six shapes, or cells of blood (BCCD), are learned by recipes with three seeds each, all of as
many steps: from scratch, from the trained weights with every class anew, and, where some of the classes are the same, from the trained
weights with classes by name. Goes on where it was interrupted.
    python benchmarks/finetuning.py [runs/finetuning] [--bccd FOLDER] [--seeds 3] [--jobs 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from steadydetr.checkpoints.start import Start
from steadydetr.checkpoints.weights import read_weights
from steadydetr.data import DataConfig, FixedSize, FixedSizeTransform
from steadydetr.recipes import Recipe, find
from steadydetr.runs.folder import RunFolder
from steadydetr.runs.training_config import TrainingConfig
from steadydetr.tools.compare import compare_recipes
from steadydetr.tools.finetune import finetune_recipe
from steadydetr.training.loop import train

STEPS, EVALUATIONS, SHARE = 800, 16, 0.9
EARLY = 2 * STEPS // EVALUATIONS  # steps after which it is looked at first
FOUR, SIX = "shapes:images=2700,classes=4", "shapes:images=600,classes=6,seed=7"


def trained_on_four(output: Path) -> Path:
    """The run whose weights the others start from; trained unless it is there."""
    recipe = find("small-dino")
    data = replace(recipe.data, source=FOUR, val_source="shapes:images=200,classes=4", workers=0)
    if not (output / "summary.json").exists():
        train(replace(recipe, data=data, training=replace(recipe.training, ema_decay=0.99)), output, resume="auto")
    return output


def recipes_for(data: DataConfig, weights: Path) -> dict[str, Recipe]:
    """The three recipes. From scratch all parts learn at the same rate, as where the weights were trained."""
    card = read_weights(str(weights))
    found = {}
    for label, start in {"anew": Start(str(weights), by_name=False), "by-name": Start(str(weights))}.items():
        recipe = finetune_recipe(card, start, data)
        found[label] = replace(recipe, data=data, training=same_length(recipe))
    rates = find("small-dino").training
    training = replace(found["anew"].training, encoder_lr_factor=1.0, backbone_lr_factor=rates.backbone_lr_factor)
    return {"scratch": replace(found["anew"], start=Start(), training=training)} | found


def same_length(recipe: Recipe) -> TrainingConfig:
    return replace(recipe.training, epochs=EVALUATIONS, epoch_steps=STEPS // EVALUATIONS, eval_every=1, stability_images=0, save_every=0)


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, AP) of every evaluation, of whichever weights were better: the trained ones or their average."""
    found: dict[int, float] = {}
    for record in RunFolder(run).read_records():
        if record["kind"] == "eval":
            found[record["step"]] = max(record["ap"], found.get(record["step"], 0.0))
    return sorted(found.items())


def steps_to(ap: float, points: list[tuple[int, float]]) -> int | None:
    return next((step for step, reached in points if reached >= ap), None)


def rows(output: Path, labels: Sequence[str], seeds: int) -> Iterator[str]:
    """Of each recipe, over seeds: the final AP, and the steps to a share of that of the run from scratch of the same seed."""
    share = f"{SHARE:.0%} of the final AP"
    yield f"| start | AP after {EARLY} steps | final AP | steps to {share} from scratch | to {share} of its own |"
    yield "|---|---|---|---|---|"
    scratch = [curve(output / "scratch" / f"seed{seed}") for seed in range(seeds)]
    for label in labels:
        curves = [curve(output / label / f"seed{seed}") for seed in range(seeds)]
        early = [dict(points)[EARLY] for points in curves]
        last = [points[-1][1] for points in curves]
        same = [steps_to(SHARE * other[-1][1], points) for points, other in zip(curves, scratch, strict=True)]
        own = [steps_to(SHARE * points[-1][1], points) for points in curves]
        yield f"| {label} | {mean(early)} | {mean(last)} | {', '.join(map(str, same))} | {', '.join(map(str, own))} |"


def mean(values: list[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/finetuning"))
    parser.add_argument("--bccd", type=Path, help="folder of BCCD in VOC's layout; left out: shapes alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    weights = trained_on_four(arguments.output / "four")
    size = DataConfig(transform=FixedSizeTransform(128, 128), resize=FixedSize(128, 128), workers=0)
    places = {"six": recipes_for(replace(size, source=SIX, val_source="shapes:images=200,classes=6"), weights)}
    if arguments.bccd:
        places["bccd"] = recipes_for(replace(size, source=str(arguments.bccd)), weights)
        del places["bccd"]["by-name"]  # no class of the shapes is among them
    for name, recipes in places.items():
        output = arguments.output / name
        compare_recipes(recipes, arguments.seeds, output, arguments.jobs)
        print(f"\n{name}: {recipes['scratch'].data.source}\n", *rows(output, list(recipes), arguments.seeds), sep="\n")


if __name__ == "__main__":
    main()
