"""Opens the data set that `--data` names, whose layout is recognised from the files that are there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from steadydetr.data.dataset import Dataset, join_data
from steadydetr.data.layouts import DataLayout, Finding, Report, stop
from steadydetr.data.reading import expanded
from steadydetr.files import printable
from steadydetr.kinds import options
from steadydetr.limits import DEFAULT_LIMITS, Limits

MOST_SAID = 5  # remarks of one kind


def open_data(
    where: str | Path, split: str = "train", limits: Limits = DEFAULT_LIMITS, say: Callable[[str], None] | None = None
) -> Dataset:
    """The data set behind a folder or the word `shapes`.

    Args:
        where: a folder or file of a layout that is known (docs/data.md), or that a plugin brings; `shapes[:option=value,...]`; several
            joined by `+`.
        split: train, val, test or the name of any split that the place has; `all` where it is not split.
        limits: what may be read: whether files outside the folder, and how large.
        say: is told what is remarkable about the annotations, such as polygons of which the boxes are taken.

    Raises:
        ValueError: the layout is not recognised or has no such split; says what was looked for and what is there.
    """
    layouts = [(layout_of(place, limits), place) for place in joined_places(where)]
    parts = [layout.inspect(place, split, telling(say)) if say else layout.open(place, split) for layout, place in layouts]
    return parts[0] if len(parts) == 1 else join_data(parts)


def telling(say: Callable[[str], None]) -> Report:
    """The report of a reader that stops at a fault, and says the first remarks of each kind."""
    told = Counter[str]()

    def report(finding: Finding) -> None:
        stop(finding)
        told[finding.kind] += 1
        if told[finding.kind] <= MOST_SAID:
            more = ". Further ones are not named; `steadydetr check` names all" if told[finding.kind] == MOST_SAID else ""
            say(f"{finding.kind}: {finding}{more}")

    return report


def joined_places(where: str | Path) -> list[str]:
    """The places that `+` joins in `where`; `where` itself if a folder has that very name."""
    text = str(where)
    return [part.strip() for part in text.split("+")] if "+" in text and not os.path.exists(text) else [text]


def layout_of(place: str, limits: Limits = DEFAULT_LIMITS) -> DataLayout:
    """The first layout that recognises the place, with these limits."""
    layouts = [kind(limits=limits) for kind in options(DataLayout).values()]
    for layout in layouts:
        if _recognises(layout, place):
            return layout
    root, name = expanded(place), printable(place)
    if not os.path.isdir(root):
        what = "it is a file" if os.path.exists(root) else "there is no such folder"
        kinds = "a folder, a data.yaml or JSON file of COCO, hf:owner/name, or the word shapes for generated images"
        raise ValueError(f"data {name}: {what}; a data set is {kinds}")
    inside = sorted(root.iterdir())
    if within := next((p for p in inside[:100] if p.is_dir() and any(_recognises(layout, str(p)) for layout in layouts)), None):
        raise ValueError(f"data {name}: the data set lies one folder deeper: use {printable(within)}")
    looked_for = "; ".join(layout.looked_for for layout in layouts if layout.looked_for)
    found = ", ".join(printable(p.name) + "/" * p.is_dir() for p in inside[:12]) or "nothing"
    raise ValueError(f"data {name}: no layout of data was recognised. Found there: {found}. What was looked for: {looked_for}")


def _recognises(layout: DataLayout, place: str) -> bool:
    try:
        return layout.recognises(place)
    except (OSError, ValueError):  # the place is no possible name of a folder, or one that may not be listed
        return False
