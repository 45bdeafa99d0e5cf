"""Where the numbers of a run go: to the console, to metrics.jsonl, and to every further sink that the recipe names.

A sink for another place, such as a tracker, is two classes: a `Sink`, a frozen dataclass that stands in `Recipe.sinks` and is saved
with the recipe, and the `SinkWriter` that its `open` gives. Both are used by the main process alone.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steadydetr.runs.folder import Record, RunFolder


class SinkWriter(ABC):
    """What gets the numbers of a run while it goes on."""

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take one record, as metrics.jsonl has it: its "kind" is train, eval or stability, its "step" counts from 1."""

    def say(self, message: str) -> None:  # noqa: B027
        """Take a sentence that is meant for whoever follows the run."""

    def close(self) -> None:  # noqa: B027
        """Finish: the run has ended, been interrupted or failed, and nothing will follow."""


class Sink(ABC):
    """A further place for the numbers of a run: a frozen dataclass in `Recipe.sinks`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What flags and messages call it; no two sinks of a recipe share a name."""

    @abstractmethod
    def open(self, folder: Path, recipe: dict[str, Any], resumed_step: int) -> SinkWriter:
        """Begin to write. An exception here stops the run before its first step.

        Args:
            folder: of the run; a sink may write files of its own into it.
            recipe: as plain JSON values.
            resumed_step: where a resumed run goes on, so that what was written of later steps will come again; 0 for a new run.
        """


class JSONLines(SinkWriter):
    """Records as lines of metrics.jsonl."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def write(self, record: Record) -> None:
        self.folder.append_record(record)


class RunLog(SinkWriter):
    """All that a run writes to, as one.

    An exception of a further sink does not stop the run: it is said once, and that sink is closed and gets nothing more.
    """

    def __init__(self, always: Sequence[SinkWriter] = (), further: Mapping[str, SinkWriter] | None = None) -> None:
        """
        Args:
            always: console and metrics.jsonl, whose exceptions do stop the run; none in processes that are not the main one.
            further: the opened sinks of the recipe, by name.
        """
        self.always = tuple(always)
        self.further = dict(further or {})

    def write(self, record: Record) -> None:
        for writer in self.always:
            writer.write(record)
        self._each_further(lambda writer: writer.write(copy.deepcopy(record)))

    def say(self, message: str) -> None:
        for writer in self.always:
            writer.say(message)
        self._each_further(lambda writer: writer.say(message))

    def close(self) -> None:
        self._each_further(lambda writer: writer.close())
        self.further.clear()
        for writer in self.always:
            writer.close()

    def _each_further(self, call: Callable[[SinkWriter], None]) -> None:
        for name, writer in list(self.further.items()):
            try:
                call(writer)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        with suppress(Exception):
            self.further.pop(name).close()
        for writer in self.always:
            writer.say(f"The sink {name} failed and is closed; the run goes on without it. {type(error).__name__}: {error}")


def open_sinks(sinks: Sequence[Sink], folder: Path, recipe: dict[str, Any], resumed_step: int) -> dict[str, SinkWriter]:
    """The writers of a recipe's further sinks, by name.

    Raises:
        ValueError: two sinks share a name.
        Exception: what a sink raises, after the ones before it are closed.
    """
    names = [sink.name for sink in sinks]
    if len(set(names)) < len(names):
        raise ValueError(f"sinks need names of their own, got {names}")
    folder.mkdir(parents=True, exist_ok=True)
    opened: dict[str, SinkWriter] = {}
    try:
        for sink in sinks:
            opened[sink.name] = sink.open(folder, copy.deepcopy(recipe), resumed_step)
    except BaseException:
        RunLog(further=opened).close()
        raise
    return opened
