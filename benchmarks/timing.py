"""Paired timing: the two sides take turns, so that a machine whose speed drifts treats them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def paired(ours: Callable[[], object], peer: Callable[[], object], rounds: int, warmup: int = 1) -> tuple[float, float, float]:
    """Median seconds of each side, and the median of the ratios ours / peer, round by round."""
    times: list[tuple[float, float]] = []
    for turn in range(warmup + rounds):
        pair = (seconds(ours), seconds(peer))
        if turn >= warmup:
            times.append(pair)
    a, b = zip(*times, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in times)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def print_row(what: str, ours: float, peer: float, ratio: float, unit: str = "s") -> None:
    print(f"{what:<44} ours {ours:10.4f} {unit}   peer {peer:10.4f} {unit}   ours/peer {ratio:.3f}")
