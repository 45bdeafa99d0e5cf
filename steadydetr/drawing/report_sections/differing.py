"""The fields in which the recipes of the runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from steadydetr.drawing.recipe_text import flatten
from steadydetr.runs.records import Records, by_recipe


@dataclass(frozen=True)
class DifferingRow:
    field: str
    values: list[list[str | None]]  # by recipe: the values of its seeds, None where it has no such field


@dataclass(frozen=True)
class Differing:
    columns: list[str]
    rows: list[DifferingRow]
    title: str = "What differs"
    layout: str = "differing"


def differing(runs: Sequence[Records]) -> Differing:
    """The fields that are not the same in all runs, a column for every recipe."""
    flat = {run.label: flatten(run.recipe) | {"classes": ", ".join(run.classes)} for run in runs}
    fields = sorted({field for values in flat.values() for field in values})
    changed = [field for field in fields if len({values.get(field) for values in flat.values()}) > 1]
    recipes = by_recipe(runs)
    return Differing(list(recipes), list(differing_rows(changed, flat, recipes)))


def differing_rows(
    fields: Sequence[str], flat: Mapping[str, Mapping[str, str]], recipes: Mapping[str, Sequence[Records]]
) -> Iterator[DifferingRow]:
    for field in fields:
        yield DifferingRow(field, [list(dict.fromkeys(flat[run.label].get(field) for run in members)) for members in recipes.values()])
