"""A row for every run: its best AP, its progress, its speed and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steadydetr.drawing.report_sections.base import RunName, name_of
from steadydetr.runs.records import WEIGHTS_LABELS, Records


@dataclass(frozen=True)
class OverviewRow:
    """One run. None: not known yet."""

    name: RunName
    recipe: str
    best_ap: float | None
    best_epoch: int | None
    best_weights: str
    finished: bool
    epochs_done: int
    planned_epochs: int
    step: int
    planned_steps: int | None
    images_seen: int
    seconds: float | None  # of training
    estimated: bool  # whether the seconds are computed from the speed, because the run is not finished
    images_per_second: float | None
    memory_gib: float | None
    parameters: int | None
    seed: object


@dataclass(frozen=True)
class Overview:
    """The first section of the page."""

    runs: list[OverviewRow]
    title: str = "Runs"
    layout: str = "overview"


def overview(runs: Sequence[Records]) -> Overview:
    """The section of these runs."""
    return Overview([overview_row(run, runs) for run in runs])


def overview_row(run: Records, runs: Sequence[Records]) -> OverviewRow:
    """The row of `run`, which has a colour if the page shows several recipes."""
    best, speed = run.best or {}, run.images_per_second
    measured = None if run.summary is None else run.summary.get("seconds")
    estimate = run.images_seen / speed if speed else None
    return OverviewRow(
        name=name_of(run, runs),
        recipe=str(run.recipe.get("name", "?")),
        best_ap=best.get("ap"),
        best_epoch=best.get("epoch"),
        best_weights=WEIGHTS_LABELS[best["weights"]] if best else "",
        finished=run.summary is not None,
        epochs_done=run.epochs_done,
        planned_epochs=run.planned_epochs,
        step=run.step,
        planned_steps=run.planned_steps,
        images_seen=run.images_seen,
        seconds=estimate if measured is None else float(measured),
        estimated=measured is None,
        images_per_second=speed,
        memory_gib=run.memory_gib,
        parameters=run.parameters,
        seed=run.recipe["training"]["seed"],
    )
