"""How a run is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from steadydetr.training.run import Run


@contextmanager
def stop_on_signal(run: Run) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C let the step end, save and leave; a second Ctrl-C interrupts at once."""

    def ask_to_stop(number: int, _: object) -> None:
        run.stop = True
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
