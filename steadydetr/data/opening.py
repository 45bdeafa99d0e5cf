"""Opens the data set that `--data` names, whose layout is recognised from the files that are there."""

from __future__ import annotations

import os
from pathlib import Path

from steadydetr.data.dataset import Dataset, join_data
from steadydetr.data.layouts import DataLayout
from steadydetr.data.reading import expanded
from steadydetr.files import printable
from steadydetr.kinds import options
from steadydetr.limits import DEFAULT_LIMITS, Limits


def open_data(where: str | Path, split: str = "train", limits: Limits = DEFAULT_LIMITS) -> Dataset:
    """The data set behind a folder or the word `shapes`.

    Args:
        where: a folder or file of a layout that is known (docs/data.md), or that a plugin brings; `shapes[:option=value,...]`; several
            joined by `+`.
        split: train, val, test or the name of any split that the place has; `all` where it is not split.
        limits: what may be read: whether files outside the folder, and how large.

    Raises:
        ValueError: the layout is not recognised or has no such split; says what was looked for and what is there.
    """
    parts = [layout_of(place, limits).open(place, split) for place in joined_places(where)]
    return parts[0] if len(parts) == 1 else join_data(parts)


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
    looked_for = "\n  ".join(["What was looked for:", *(layout.looked_for for layout in layouts if layout.looked_for)])
    root = expanded(place)
    if not os.path.isdir(root):
        raise ValueError(f"--data {printable(place)}: there is no such folder. {looked_for}")
    found = ", ".join(sorted(printable(p.name) + "/" * p.is_dir() for p in root.iterdir())[:12]) or "nothing"
    raise ValueError(f"--data {printable(place)}: no layout of data was recognised. {looked_for}\nFound there: {found}")


def _recognises(layout: DataLayout, place: str) -> bool:
    try:
        return layout.recognises(place)
    except (OSError, ValueError):  # the place is no possible name of a folder, or one that may not be listed
        return False
