"""What a user sees while a run goes on: a live line in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")
QUIET_SECONDS = 15.0  # between lines where there is no terminal


class Progress:
    """Shown by the main process alone (`enabled`)."""

    def __init__(self, total_steps: int, enabled: bool = True) -> None:
        self.console = Console(soft_wrap=True)
        self.enabled = enabled
        self.live = enabled and self.console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = RichProgress(*columns, console=self.console, disable=not self.live)
        self.task = self.bar.add_task("training", total=total_steps)
        self.total, self.last_line = total_steps, 0.0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, message: str) -> None:
        if self.enabled:
            self.console.print(message, highlight=False)

    def step(self, step: int, message: str) -> None:
        """At `step` of the run; the message replaces the one before, or is printed now and then."""
        self.bar.update(self.task, completed=step, description=message)
        now = time.monotonic()
        if not self.live and (now - self.last_line > QUIET_SECONDS or step == self.total):
            self.last_line = now
            self.say(f"step {step}/{self.total}  {message}")

    def track(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        """A second bar below, for as long as `items` last."""
        if not self.live:
            yield from items
            return
        task = self.bar.add_task(description, total=total)
        for item in items:
            yield item
            self.bar.advance(task)
        self.bar.remove_task(task)
