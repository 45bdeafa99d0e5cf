"""What the sections of the report share. How they look is up to report.html.jinja."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steadydetr.drawing.colours import run_colours
from steadydetr.runs.records import WEIGHTS_LABELS, Records, by_recipe


class PageSection(Protocol):
    """A section of the page: a frozen dataclass of the values that it shows."""

    @property
    def title(self) -> str: ...
    @property
    def layout(self) -> str:
        """Which macro of the template shows it."""


@dataclass(frozen=True)
class RunName:
    label: str
    colour: str | None  # of its lines; None where there is only one
    weights: str = ""  # "trained" or "average", where both have a row


@dataclass(frozen=True)
class Lack:
    """The runs that have nothing to show in one place of the page, and the reason."""

    labels: tuple[str, ...]
    what: str

    @staticmethod
    def of(runs: Sequence[Records], what: str) -> Lack:
        return Lack(tuple(run.label for run in runs), what)


@dataclass(frozen=True)
class EmbeddedPicture:
    source: str  # data: URL
    description: str

    @staticmethod
    def of(kind: str, content: bytes, description: str) -> EmbeddedPicture:
        return EmbeddedPicture(f"data:image/{kind};base64,{base64.b64encode(content).decode()}", description)


def name_of(run: Records, runs: Sequence[Records], weights: str = "") -> RunName:
    colour = run_colours(runs)[run.label] if len(by_recipe(runs)) > 1 else None
    return RunName(run.label, colour, WEIGHTS_LABELS[weights] if weights else "")


@dataclass(frozen=True)
class Cell:
    value: float | None
    highest: bool  # of its column, or of its row where a column is a run


def last_evaluations(runs: Sequence[Records]) -> list[tuple[Records, str, dict[str, Any]]]:
    """Run, weights and their last evaluation, where there is one."""
    return [(run, weights, last) for run in runs for weights in WEIGHTS_LABELS if (last := run.last("eval", weights)) is not None]


def mark_highest(values: Sequence[Any]) -> list[Cell]:
    """The values, the highest marked if there are several."""
    known = [value for value in values if isinstance(value, (int, float)) and value != -1]
    highest = max(known) if len(known) > 1 else None
    return [Cell(value, value is not None and value == highest) for value in values]
