"""The colours of runs in the figures."""

from __future__ import annotations

from collections.abc import Sequence

from steadydetr.runs.records import Records, by_recipe

COLOURS = ("#2166ac", "#d6604d", "#1b8a5a", "#8e4fb0", "#b8860b", "#0f9aa8", "#c2338a", "#5a6b7b", "#7a9a01", "#8c510a")


def run_colours(runs: Sequence[Records]) -> dict[str, str]:
    """The colour of every run by its label; the seeds of a recipe share one."""
    return {run.label: COLOURS[i % len(COLOURS)] for i, members in enumerate(by_recipe(runs).values()) for run in members}
