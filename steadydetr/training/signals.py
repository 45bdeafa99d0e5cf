"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from steadydetr.training.run import Run


@contextmanager
def stop_on_signal(run: Run) -> Iterator[None]:
    """SIGTERM, SIGHUP and the first Ctrl-C let the step end, save and leave; a second one of the same kind acts at once.

    A signal that is ignored, as `nohup` does with SIGHUP, stays ignored.
    """

    def ask_to_stop(number: int, _: object) -> None:
        run.asked_to_stop = True
        signal.signal(number, before[signal.Signals(number)])

    in_main_thread = threading.current_thread() is threading.main_thread()  # Python lets no other thread handle signals
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if in_main_thread and hasattr(signal, name)]
    numbers = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, ask_to_stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
