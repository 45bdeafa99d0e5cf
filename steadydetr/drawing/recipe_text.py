"""A recipe as it was saved with a run, in words that people read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(plain: Any, where: str = "") -> dict[str, str]:
    """The fields of a recipe by their dotted paths, as in {"training.lr": "0.001"}.

    A config inside of it also gives its class, under its own path. Configs in a list are told apart by their classes, as in
    "objectives.denoising.number".
    """
    if isinstance(plain, dict) and "function" not in plain:
        own = {where: short(plain["type"])} if where and "type" in plain else {}
        parts = (flatten(value, f"{where}.{name}" if where else name) for name, value in plain.items() if name != "type")
        return own | {field: value for part in parts for field, value in part.items()}
    if isinstance(plain, list) and any(isinstance(item, dict) and "type" in item for item in plain):
        parts = (flatten(item, f"{where}.{short(item['type']).lower()}") for item in plain)
        return {field: value for part in parts for field, value in part.items()}
    return {where: readable(plain)}


def short(name: str) -> str:
    """The last part of a dotted name: a class or a function without its module."""
    return str(name).rpartition(".")[2]


def readable(value: Any) -> str:
    """A value as people write it; a list with commas, a function by its name."""
    if isinstance(value, dict):
        return short(value["function"])
    if isinstance(value, list):
        return ", ".join(map(readable, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def recipe_outline(plain: Mapping[str, Any], indent: str = "") -> list[str]:
    """The recipe, a line for every field; the fields of a config inside of it are indented."""
    lines = []
    for name, value in plain.items():
        parts = value if isinstance(value, list) else [value]
        if all(isinstance(part, dict) and "type" in part for part in parts) and parts:
            for part in parts:
                lines += [f"{indent}{name}: {short(part['type'])}", *recipe_outline(part, indent + "    ")]
        elif name != "type":
            lines.append(f"{indent}{name}: {readable(value)}")
    return lines
