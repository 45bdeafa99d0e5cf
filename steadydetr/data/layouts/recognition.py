"""Which layout a place of data is of, by the files that are there."""

from __future__ import annotations

import os
from pathlib import Path

from steadydetr.data.layouts.base import DataLayout
from steadydetr.data.reading import expanded
from steadydetr.files import printable
from steadydetr.kinds import options
from steadydetr.limits import DEFAULT_LIMITS, Limits


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
