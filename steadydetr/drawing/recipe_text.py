"""A run's recipe, as plain values, in words that people read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(plain: Any, where: str = "") -> dict[str, str]:
    """Values by their dotted path; a part is its class at its own path, and objectives go by their classes."""
    if isinstance(plain, dict) and "function" not in plain:
        own = {where: short(plain["type"])} if where and "type" in plain else {}
        parts = (flatten(value, f"{where}.{name}" if where else name) for name, value in plain.items() if name != "type")
        return own | {field: value for part in parts for field, value in part.items()}
    if isinstance(plain, list) and any(isinstance(item, dict) and "type" in item for item in plain):
        parts = (flatten(item, f"{where}.{short(item['type']).lower()}") for item in plain)
        return {field: value for part in parts for field, value in part.items()}
    return {where: readable(plain)}


def short(name: str) -> str:
    return str(name).rpartition(".")[2]


def readable(value: Any) -> str:
    """A value without parts as people write it."""
    if isinstance(value, dict):
        return short(value["function"])
    if isinstance(value, list):
        return ", ".join(map(readable, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def outline(plain: Mapping[str, Any], indent: str = "") -> list[str]:
    """The recipe, a line for every field, its parts indented."""
    lines = []
    for name, value in plain.items():
        parts = value if isinstance(value, list) else [value]
        if all(isinstance(part, dict) and "type" in part for part in parts) and parts:
            for part in parts:
                lines += [f"{indent}{name}: {short(part['type'])}", *outline(part, indent + "    ")]
        elif name != "type":
            lines.append(f"{indent}{name}: {readable(value)}")
    return lines
