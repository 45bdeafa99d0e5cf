"""Slow, obvious counterparts of the stability measures: images of {target: query}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Matches = Sequence[Mapping[int, int]]  # of every image: its targets with their queries


def instability(before: Matches, after: Matches, queries: int) -> float:
    total = 0
    for old, new in zip(before, after, strict=True):
        held_before = {query: target for target, query in old.items()}
        held_after = {query: target for target, query in new.items()}
        total += sum(held_before.get(query) != held_after.get(query) for query in range(queries))
    return total / len(before)


def unstable_score(before: Matches, after: Matches) -> float:
    shares = [sum(old[t] != new[t] for t in old) / len(old) for old, new in zip(before, after, strict=True) if old]
    return 100 * sum(shares) / len(shares)


def consistency(student: Matches, teacher: Matches) -> float:
    pairs = [(student[i][t], teacher[i][t]) for i in range(len(student)) for t in student[i]]
    return 100 * sum(a == b for a, b in pairs) / len(pairs)
