"""The recipe and the classes of every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steadydetr.drawing.recipe_text import recipe_outline
from steadydetr.runs.records import Records


@dataclass(frozen=True)
class Configuration:
    label: str
    text: str


@dataclass(frozen=True)
class Configurations:
    runs: list[Configuration]
    title: str = "Configuration"
    layout: str = "configurations"


def configurations(runs: Sequence[Records]) -> Configurations:
    return Configurations([Configuration(run.label, configuration_text(run)) for run in runs])


def configuration_text(run: Records) -> str:
    """The recipe and the classes of a run."""
    return "\n".join([*recipe_outline(run.recipe), "", f"{len(run.classes)} classes: {', '.join(run.classes)}"])
