"""A recipe as it was saved with a run, in words that people read. Parts are called by their kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(plain: Any, where: str = "") -> dict[str, str]:
    """The fields of a recipe by their dotted paths, as in {"training.lr": "0.001"}.

    A part inside of it also gives its kind, under its own path. Parts in a list are told apart by their kinds, as in
    "objectives.denoising.number".
    """
    if isinstance(plain, dict):
        own = {where: str(plain["kind"])} if where and "kind" in plain else {}
        parts = (flatten(value, f"{where}.{name}" if where else name) for name, value in plain.items() if name != "kind")
        return own | {field: value for part in parts for field, value in part.items()}
    if isinstance(plain, list) and any(is_part(item) for item in plain):
        parts = (flatten(item, f"{where}.{item['kind']}") for item in plain if is_part(item))
        return {field: value for part in parts for field, value in part.items()}
    return {where: readable(plain)}


def is_part(value: Any) -> bool:
    """Whether a plain value is a part: it has a kind."""
    return isinstance(value, dict) and "kind" in value


def readable(value: Any) -> str:
    """A value as people write it; a list with commas."""
    if isinstance(value, list):
        return ", ".join(map(readable, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def recipe_outline(plain: Mapping[str, Any], indent: str = "") -> list[str]:
    """The recipe, a line for every field; the fields of a part inside of it are indented."""
    lines = []
    for name, value in plain.items():
        parts = value if isinstance(value, list) else [value]
        if parts and all(map(is_part, parts)):
            for part in parts:
                lines += [f"{indent}{name}: {part['kind']}", *recipe_outline(part, indent + "    ")]
        elif name != "kind":
            lines.append(f"{indent}{name}: {readable(value)}")
    return lines
