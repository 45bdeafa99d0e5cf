"""What a user sees while a run goes on: a live line in a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from steadydetr.files import printable
from steadydetr.metrics.table import AP_COLUMNS, percent
from steadydetr.runs.folder import Record
from steadydetr.runs.records import WEIGHTS_LABELS
from steadydetr.runs.sinks import SinkWriter

T = TypeVar("T")
QUIET_SECONDS = 15.0  # least time between two lines about how far the run is, where there is no terminal


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


class TimeLeftColumn(TimeRemainingColumn):
    """The time that is left, and the word."""

    def render(self, task: Task) -> Text:
        return super().render(task).append(" left")


def _columns(narrow: bool) -> list[ProgressColumn]:
    """What a bar shows. Where the width does not do, the bar becomes shorter and the text breaks, but no number is cut."""
    text = TextColumn("{task.description}", markup=False, table_column=Column())
    done, elapsed, left = (kind(table_column=Column(no_wrap=True)) for kind in (MofNCompleteColumn, TimeElapsedColumn, TimeLeftColumn))
    rate = TextColumn("{task.fields[rate]}", markup=False)
    return [text, done, left] if narrow else [text, BarColumn(), done, rate, elapsed, left]


class Progress:
    """The bars and lines of a run. Only the main process shows any (`enabled`)."""

    def __init__(self, enabled: bool = True) -> None:
        self.console = Console(file=cast(TextIO, LastingStream(sys.stdout)), soft_wrap=True, markup=False, emoji=False)
        self.enabled = enabled
        self.live = enabled and self.console.is_terminal
        self.bar = RichProgress(*_columns(narrow=self.console.width < 60), console=self.console, disable=not self.live)
        self.task = self.bar.add_task("training", total=0, rate="")
        self.total, self.message, self.last_line = 0, "training", -QUIET_SECONDS
        self.first: tuple[float, int] | None = None  # when this process had done its first step, and which of the run that was

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

    def step(self, step: int, images_per_second: float) -> None:
        """Show that a step of the run is done: in a terminal the bar moves, elsewhere a line says so if the last line is long ago.

        `message` stands beside it, what was logged last.
        """
        rate, now = f"{images_per_second:.1f} images/s", time.monotonic()
        self.bar.update(self.task, completed=step, description=self.message, rate=rate)
        if self.first is None:
            self.first = now, step
        if not self.live and (step == self.total or self._is_due()):
            self.say(f"step {step}/{self.total}  {self.message}  {rate}{self._left(now, step)}")

    def track(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        """The items; until they end, a second bar is shown, or now and then a line."""
        task = self.bar.add_task(description, total=total, rate="")
        for number, item in enumerate(items, 1):
            yield item
            self.bar.advance(task)
            if not self.live and self._is_due():
                self.say(f"{description}: {number}/{total}")
        self.bar.remove_task(task)

    def _is_due(self) -> bool:
        """Whether the last line is long ago; another one is then about to be written."""
        now = time.monotonic()
        if now - self.last_line <= QUIET_SECONDS:
            return False
        self.last_line = now
        return True

    def _left(self, now: float, step: int) -> str:
        """How long the remaining steps will take, at the pace of this process until now, evaluations included."""
        since, first = self.first or (now, step)
        if step <= first or step >= self.total:
            return ""
        return f"  {timedelta(seconds=round((now - since) / (step - first) * (self.total - step)))} left"


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
        self.progress.message = f"epoch {record['epoch'] + 1}  loss {record['loss']:.2f}{ap}"

    def _write_evaluation(self, record: Record) -> None:
        self.best_ap = max(self.best_ap, record["ap"])
        metrics = ", ".join(f"{label} {percent(record[name])}" for label, name in AP_COLUMNS.items() if name in record)
        self.say(f"epoch {record['epoch']} ({WEIGHTS_LABELS[record['weights']]} weights): {metrics}")
        for warning in record["warnings"]:
            self.say(f"  note on AP: {warning}")

    def _write_stability(self, record: Record) -> None:
        scores = ", ".join(f"{score:.0f}" for score in record["unstable_score"].values())
        since = "" if record["between_epochs"] is None else f", instability since the last {record['between_epochs']:.2f}"
        shared = "" if record["consistency"] is None else f", consistency with the average {record['consistency'][-1]:.0f}%"
        self.say(f"  matching ({WEIGHTS_LABELS[record['weights']]} weights): unstable score by layer {scores}%{since}{shared}")
