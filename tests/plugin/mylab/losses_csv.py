"""A sink: the loss of every logged step as a line of losses.csv in the folder of the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steadydetr import register
from steadydetr.runs.sinks import Sink, SinkWriter


@register("losses-csv")
@dataclass(frozen=True)
class LossesCsv(Sink):
    """What stands in the recipe."""

    separator: str = ","

    @property
    def name(self) -> str:
        return "losses"

    def open(self, folder: Path, recipe: dict[str, Any], resumed_step: int) -> SinkWriter:
        return Writer(folder / "losses.csv", self.separator)


class Writer(SinkWriter):
    """What takes the numbers of one run."""

    def __init__(self, path: Path, separator: str) -> None:
        self.path, self.separator = path, separator

    def write(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            with open(self.path, "a") as file:
                file.write(f"{record['step']}{self.separator}{record['loss']}\n")
