"""Configs as JSON and back: frozen dataclasses, tuples and functions by their qualified names, nothing else.

Only names of this package are resolved, so that reading a config never runs foreign code.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

PACKAGE = "steadydetr"


def to_plain(value: Any) -> Any:
    """A config as JSON values: {"type": "module.Class", field: ...}, {"function": "module.name"}."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": f"{type(value).__module__}.{type(value).__qualname__}", **plain}
    if isinstance(value, FunctionType):
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a config holds plain values, dataclasses and functions, not {type(value).__name__}: {value!r}")


def from_plain(plain: Any, where: str = "config") -> Any:
    """The object that `to_plain` wrote.

    Raises:
        ValueError: an unknown key, with the nearest name, or a name outside this package; says where.
    """
    if isinstance(plain, list):
        return tuple(from_plain(item, f"{where}[{i}]") for i, item in enumerate(plain))
    if not isinstance(plain, dict):
        return plain
    if "function" in plain:
        return resolve(plain["function"], where)
    if "type" not in plain:
        raise ValueError(f'{where}: an object needs a "type" or a "function", got the keys {sorted(plain)}')
    cls = resolve(plain["type"], where)
    names = [field.name for field in fields(cls)]
    values = {key: from_plain(value, f"{where}.{key}") for key, value in plain.items() if key != "type"}
    for key in values:
        if key not in names:
            raise ValueError(f"{where}: {cls.__name__} has no field {key!r}{nearest(key, names)}")
    return cls(**values)


def resolve(name: str, where: str) -> Any:
    """The class or function behind a qualified name of this package."""
    module, _, attribute = name.rpartition(".")
    if module != PACKAGE and not module.startswith(f"{PACKAGE}."):
        raise ValueError(f"{where}: {name!r} is not a name of {PACKAGE}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise ValueError(f"{where}: there is no {name!r} in this version of {PACKAGE}") from None


def nearest(wanted: str, known: list[str]) -> str:
    """' (nearest: ...)' for error messages, or what there is."""
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; there are {', '.join(known)}"


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """What differs between two plain configs, as 'field: a -> b'."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [line for key in keys for line in differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a!r} -> {b!r}"]


def renewed(plain: Any, where: str = "config") -> Any:
    """A stored config as this version writes it: a field that was added since has its default."""
    return json.loads(json.dumps(to_plain(from_plain(plain, where))))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write so that the file is either the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
