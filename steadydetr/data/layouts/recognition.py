"""Which layout a place of data is of, by the files that are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from steadydetr.data.images import IMAGE_SUFFIXES
from steadydetr.data.layouts.base import DataLayout
from steadydetr.data.reading import expanded
from steadydetr.files import printable
from steadydetr.kinds import options
from steadydetr.limits import DEFAULT_LIMITS, Limits

PARTS = ("images", "labels", "JPEGImages", "annotations", "Annotations", "train", "val", "valid", "test")  # folders in a data set
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz")


def joined_places(where: str | Path) -> list[str]:
    """The places that `+` joins in `where`; `where` itself if a folder has that very name."""
    text = str(where)
    return [part.strip() for part in text.split("+")] if "+" in text and not os.path.exists(text) else [text]


def layout_of(place: str, limits: Limits = DEFAULT_LIMITS, masks: bool = False) -> DataLayout:
    """The first layout that recognises the place, with these limits. Raises ValueError where it gives no masks, and they are asked for."""
    layouts = [kind(limits=limits) for kind in options(DataLayout).values()]
    for layout in layouts:
        if _recognises(layout, place):
            return layout.asked_for_masks(place) if masks else layout
    root, name = expanded(place), printable(place)
    if not os.path.isdir(root):
        packed = ", which has to be unpacked" if root.suffix.lower() in ARCHIVES else ""
        what = f"it is a file{packed}" if os.path.exists(root) else "there is no such folder"
        kinds = "a folder, a data.yaml or JSON file of COCO, hf:owner/name, or the word shapes for generated images"
        raise ValueError(f"data {name}: {what}; a data set is {kinds}")
    inside = sorted(root.iterdir())
    folders = [path for path in inside[:100] if path.is_dir()]
    if within := [printable(path) for path in folders if any(_recognises(layout, str(path)) for layout in layouts)]:
        several = f", or several that have the same classes: {'+'.join(within[:4])}" if len(within) > 1 else ""
        raise ValueError(f"data {name}: the data set lies one folder deeper: use {within[0]}{several}")
    looked_for = "; ".join(layout.looked_for for layout in layouts if layout.looked_for)
    found = ", ".join(printable(p.name) + "/" * p.is_dir() for p in inside[:12]) or "nothing"
    found += f" and {len(inside) - 12} more" * (len(inside) > 12)
    above = next(
        (p.parent for p in (root, root.parent) if p.name in PARTS and any(_recognises(one, str(p.parent)) for one in layouts)), None
    )
    advice = f"It is a part of {printable(above)}: use that folder. " if above else _advice(inside)
    raise ValueError(f"data {name}: no layout of data was recognised. Found there: {found}. {advice}What was looked for: {looked_for}")


def _advice(inside: Sequence[Path]) -> str:
    """What to do with a folder of these files and folders, where they tell it."""
    if packed := next((path for path in inside if path.suffix.lower() in ARCHIVES), None):
        return f"Unpack {printable(packed)} first. "
    if inside and all(path.suffix.lower() in IMAGE_SUFFIXES for path in inside):
        return "These are images alone: annotate them, or give the folder that holds their annotations too. "
    return ""


def _recognises(layout: DataLayout, place: str) -> bool:
    try:
        return layout.recognises(place)
    except (OSError, ValueError):  # the place is no possible name of a folder, or one that may not be listed
        return False
