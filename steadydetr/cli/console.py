"""Where commands print tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console


class PlainConsole(Console):
    """Text as it is, without markup and emoji codes, which names may look like."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Whoever read the output has ended: `cli.tell` gives the exit code, which rich's own way would make 1."""
        raise BrokenPipeError
