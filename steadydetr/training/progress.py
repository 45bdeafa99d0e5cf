"""What a user sees while a run goes on: a live line in a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from steadydetr.files import printable
from steadydetr.runs.folder import Record
from steadydetr.runs.sinks import SinkWriter

T = TypeVar("T")
QUIET_SECONDS = 15.0  # least time between two lines of training steps where there is no terminal


class LastingStream:
    """A stream of text whose end is not the end of the run: when the pipe or terminal behind it is closed, it falls silent."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with self._lasting():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lasting():
            self.stream.flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with open(os.devnull, "w") as nowhere:  # what the program prints elsewhere goes there too
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Progress:
    """The bars and lines of a run. Only the main process shows any (`enabled`)."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(file=cast(TextIO, LastingStream(sys.stdout)), soft_wrap=True, markup=False, emoji=False)
        self.enabled = enabled
        self.live = enabled and self.console.is_terminal
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = RichProgress(*columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task("training", total=0)
        self.total, self.last_line = 0, 0.0

    def begin(self, total: int, done: int) -> None:
        """Set how many steps the run has, and how many of them are done."""
        self.total = total
        self.bar.update(self.task, total=total, completed=done)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, message: str) -> None:
        if self.enabled:
            self.console.print(printable(message), highlight=False)

    def step(self, step: int, message: str) -> None:
        """Show a step of the run: in a terminal in place of the one before, elsewhere as a line if the last line is long ago."""
        self.bar.update(self.task, completed=step, description=message)
        now = time.monotonic()
        if not self.live and (now - self.last_line > QUIET_SECONDS or step == self.total):
            self.last_line = now
            self.say(f"step {step}/{self.total}  {message}")

    def track(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        """The items; a second bar is shown until they end."""
        if not self.live:
            yield from items
            return
        task = self.bar.add_task(description, total=total)
        for item in items:
            yield item
            self.bar.advance(task)
        self.bar.remove_task(task)


class ConsoleWriter(SinkWriter):
    """The records of a run as lines that people read."""

    def __init__(self, progress: Progress, best_ap: float = -1.0) -> None:
        """`best_ap`: the highest so far, where a run is resumed; -1: not evaluated yet."""
        self.progress, self.best_ap = progress, best_ap

    def write(self, record: Record) -> None:
        {"train": self._write_step, "eval": self._write_evaluation, "stability": self._write_stability}[record["kind"]](record)

    def say(self, message: str) -> None:
        self.progress.say(message)

    def _write_step(self, record: Record) -> None:
        ap = f"  AP {self.best_ap:.1f}" if self.best_ap >= 0 else ""
        message = f"epoch {record['epoch'] + 1}  loss {record['loss']:.2f}  {record['images_per_second']:.1f} images/s{ap}"
        self.progress.step(record["step"], message)

    def _write_evaluation(self, record: Record) -> None:
        self.best_ap = max(self.best_ap, record["ap"])
        sizes = f"small {record['ap_small']:.1f}, medium {record['ap_medium']:.1f}, large {record['ap_large']:.1f}"
        metrics = f"AP {record['ap']:.1f}, AP50 {record['ap50']:.1f}, AP75 {record['ap75']:.1f}, {sizes}"
        self.say(f"epoch {record['epoch']} ({record['weights']}): {metrics}")
        for warning in record["warnings"]:
            self.say(f"  AP is low: {warning}")

    def _write_stability(self, record: Record) -> None:
        scores = ", ".join(f"{score:.0f}" for score in record["unstable_score"].values())
        since = "" if record["between_epochs"] is None else f", instability since the last {record['between_epochs']:.2f}"
        shared = "" if record["consistency"] is None else f", consistency with the average {record['consistency'][-1]:.0f}%"
        self.say(f"  matching ({record['weights']}): unstable score by layer {scores}%{since}{shared}")
