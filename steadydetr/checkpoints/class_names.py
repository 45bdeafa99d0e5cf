"""The classes of a trained detector and those of other data, which go by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from steadydetr.files import listed
from steadydetr.kinds import nearest

Pairs = list[tuple[int, int]]  # of a row here and the row there that it takes its values from


@dataclass(frozen=True)
class ClassMatch:
    """Which classes of the data a trained detector knows."""

    pairs: Pairs  # label here, label there
    kept: dict[str, str]  # by our name, theirs
    started: tuple[str, ...]  # ours that it does not know
    dropped: tuple[str, ...]  # theirs that are not ours


def folded(name: str) -> str:
    """A class name without case, spaces, hyphens and underscores: "Traffic_Light" and "traffic light" are one."""
    return re.sub(r"[\s_-]+", "", name.casefold())


def match_classes(theirs: Sequence[str], ours: Sequence[str], renamed: Sequence[str] = ()) -> ClassMatch:
    """Match classes by their names, equal ones first, then those that are equal when folded.

    Args:
        theirs: of the trained detector, in the order of its logits.
        ours: of the data.
        renamed: "theirs=ours", for those that are named otherwise.

    Raises:
        ValueError: a word of `renamed` names no class, or several classes of the one are equal to one of the other; says which.
    """
    given = dict(_renames(theirs, ours, renamed))
    there = {name: label for name, label in _by_name(theirs, ours).items() if label not in given.values()} | given
    pairs = [(label, there[name]) for label, name in enumerate(ours) if name in there]
    used = {label for _, label in pairs}
    if len(used) < len(pairs):
        doubled = [ours[label] for label, other in pairs if [old for _, old in pairs].count(other) > 1]
        raise ValueError(
            f"the classes {listed(doubled)} of the data are one class of the weights: say which it is, by --classes theirs=ours"
        )
    return ClassMatch(
        pairs,
        {ours[label]: theirs[other] for label, other in pairs},
        tuple(name for name in ours if name not in there),
        tuple(name for label, name in enumerate(theirs) if label not in used),
    )


def _by_name(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, int]:
    """The label there, for each of our names that is known there."""
    exact = {name: label for label, name in enumerate(theirs)}
    alike: dict[str, list[int]] = {}
    for name, label in exact.items():
        alike.setdefault(folded(name), []).append(label)
    found = {}
    for name in ours:
        close = [exact[name]] if name in exact else alike.get(folded(name), [])
        if len(close) > 1:
            names = listed(theirs[label] for label in close)
            raise ValueError(f"class {name!r} of the data may be any of {names} of the weights: say which, by --classes theirs=ours")
        if close and (name in exact or theirs[close[0]] not in ours):
            found[name] = close[0]
    return found


def _renames(theirs: Sequence[str], ours: Sequence[str], renamed: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Our name and the label there of every "theirs=ours"; a name may hold the sign itself."""
    for word in renamed:
        cuts = [(word[: sign.start()].strip(), word[sign.end() :].strip()) for sign in re.finditer("=", word)]
        if not cuts:
            raise ValueError(f"--classes {word}: give the name in the weights and the name in the data, as in --classes automobile=car")
        known = [(old, new) for old, new in cuts if old in theirs and new in ours]
        if not known:
            old, new = cuts[0]
            wrong = f"the weights have no class {old!r}{nearest(old, theirs)}"
            raise ValueError(f"--classes {word}: {wrong if old not in theirs else f'the data have no class {new!r}{nearest(new, ours)}'}")
        yield known[0][1], theirs.index(known[0][0])


def joined_classes(
    names: Sequence[str], ids: Sequence[int], old_names: Sequence[str], old_ids: Sequence[int], renamed: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The classes of the data and after them those of trained weights that the data do not have, with category ids that differ.

    A class of the weights keeps its id where the data do not use that; otherwise it gets the next number that nobody uses.
    """
    dropped = set(match_classes(old_names, names, renamed).dropped)
    found, used = list(ids), set(ids)
    for name, number in zip(old_names, old_ids, strict=True):
        if name in dropped:
            found.append(number if number not in used else max(used | set(old_ids)) + 1)
            used.add(found[-1])
    return (*names, *(name for name in old_names if name in dropped)), tuple(found)
