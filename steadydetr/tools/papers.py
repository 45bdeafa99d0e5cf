"""Rows of the papers' tables beside runs: which run is one of which row, and all rows of a table trained."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

from steadydetr.config import to_plain
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import RunFolder
from steadydetr.tools.compare import compare_recipes

OF_BOXES = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}
METRICS = OF_BOXES | {"box AP": "ap"} | {f"mask {column}": f"segm_{name}" for column, name in OF_BOXES.items()}  # by columns
DEEPEST = 4  # folders below the one in which runs are looked for


def measured(
    recipes: Mapping[str, Recipe], weights: Mapping[str, str], columns: Sequence[str], folder: Path
) -> dict[str, tuple[int, list[str]]]:
    """Of each row of which there are finished runs in `folder`: how many, and their mean for each column, with its deviation.

    Args:
        recipes: by the labels of the rows.
        weights: whose metrics count, "model" or "ema" (the average), by label.
    """
    runs: dict[str, list[Path]] = defaultdict(list)
    for run in _finished_runs(folder):
        try:
            runs[_identity(RunFolder(run).read_config().recipe())].append(run)
        except (ValueError, OSError):
            continue  # of a later version, or of a plugin that is not in use
    found = {}
    for label, recipe in recipes.items():
        records = [record for run in runs[_identity(recipe)] if (record := _last_evaluation(run, weights[label]))]
        if records:
            known = [[record[name] for record in records if (name := METRICS.get(column)) in record] for column in columns]
            found[label] = (len(records), [_mean(values) for values in known])
    return found


def train_table(
    teachers: Mapping[str, Recipe],
    rows: Callable[[Mapping[str, str]], Mapping[str, Recipe]],
    data: str | None,
    output: Path,
    seeds: int,
    jobs: int,
    device: str,
) -> None:
    """Train the teachers once each, and the rows with several seeds, as `steadydetr compare` does.

    Args:
        teachers: recipes, by the places that commands name.
        rows: from the teachers' places to the recipes of the rows by label, the baseline first.
        data: instead of the recipes' own; None: theirs.
    """
    named = {_slug(place): _on(recipe, data) for place, recipe in teachers.items()}
    if named:
        compare_recipes(named, 1, output / "teachers", jobs, device=device)
    places = {place: str(output / "teachers" / _slug(place) / "seed0") for place in teachers}
    compare_recipes(
        {_slug(label): _on(recipe, data) for label, recipe in rows(places).items()}, seeds, output / "rows", jobs, device=device
    )


def _on(recipe: Recipe, data: str | None) -> Recipe:
    return recipe if data is None else replace(recipe, data=replace(recipe.data, source=data))


def _slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-.")


def _finished_runs(folder: Path) -> Iterator[Path]:
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if len(Path(place).relative_to(folder).parts) < DEEPEST)
        if "summary.json" in files:
            below.clear()
            yield Path(place)


def _identity(recipe: Recipe) -> str:
    """What of a recipe decides what is learned, apart from its name and seed."""
    return json.dumps(to_plain(replace(recipe, name="", training=replace(recipe.training, seed=0)), decisive=True), sort_keys=True)


def _last_evaluation(run: Path, weights: str) -> dict[str, float] | None:
    records = [r for r in RunFolder(run).read_records() if r["kind"] == "eval" and r["weights"] == weights]
    return records[-1] if records else None


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
