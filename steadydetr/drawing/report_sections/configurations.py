"""The recipe and the classes of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steadydetr.drawing.recipe_text import recipe_outline
from steadydetr.runs.records import Records


@dataclass(frozen=True)
class Configurations:
    """The last section: a text for every run."""

    texts: list[tuple[str, str]]  # the label of the run and its text
    title: str = "Configuration"
    layout: str = "configurations"


def configurations(runs: Sequence[Records]) -> Configurations:
    """The section of these runs."""
    return Configurations([(run.label, configuration_text(run)) for run in runs])


def configuration_text(run: Records) -> str:
    """The recipe of a run, a field on each line, and its classes."""
    return "\n".join([*recipe_outline(run.recipe), "", f"{len(run.classes)} classes: {', '.join(run.classes)}"])
