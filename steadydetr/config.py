"""Configs as JSON and back: frozen dataclasses and functions by their kinds, tuples and plain values, nothing else.

A saved file carries the number of its format. Format 1, of version 0.1, named parts by module and class; `old_formats` translates it.
"""

from __future__ import annotations

import json
from dataclasses import field, fields, is_dataclass
from types import FunctionType
from typing import Any, TypeVar

from steadydetr.kinds import find_part, kind_of, nearest
from steadydetr.old_formats import upgrade

FORMAT = 2
CHANGEABLE = "changeable"
T = TypeVar("T")


def changeable(default: T) -> T:
    """The default of a config's field that does not decide what is learned, such as an interval of logging.

    A resumed run may have another value of it.
    """
    return field(default=default, metadata={CHANGEABLE: True})  # type: ignore[no-any-return]


def to_plain(value: Any, where: str = "config", *, decisive: bool = False) -> Any:
    """A config as JSON values: {"kind": "focal-cost", field: ...}; a function as {"kind": "half-sine"}.

    Args:
        decisive: leave out the fields that are `changeable`.

    Raises:
        ValueError: something in it cannot be saved; says what, where, and what to do.
    """
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if not (decisive and field.metadata.get(CHANGEABLE))]
        plain = {name: to_plain(getattr(value, name), f"{where}.{name}", decisive=decisive) for name in names}
        return {"kind": _saved_kind(type(value), where)} | plain
    if isinstance(value, FunctionType):
        return {"kind": _saved_kind(value, where)}
    if isinstance(value, list):
        raise ValueError(f"{where} cannot be saved: a list would come back as a tuple, so use a tuple: {tuple(value)!r}")
    if isinstance(value, tuple):
        return [to_plain(item, f"{where}[{i}]", decisive=decisive) for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):  # an enumeration or a number of numpy would come back as another type
        return value
    raise ValueError(
        f"{where} cannot be saved: a config holds plain values, tuples, and parts with a kind, not {type(value).__name__}: {value!r}"
    )


def _saved_kind(part: Any, where: str) -> str:
    kind = kind_of(part)
    name = f"{part.__module__}.{part.__qualname__}"
    if kind is None:
        raise ValueError(f"{where} cannot be saved: {name} has no kind. Give it one, @steadydetr.register('its-kind') above its definition")
    if part.__module__ == "__main__":
        raise ValueError(
            f"{where} cannot be saved: {part.__qualname__} is defined in the script or notebook itself, where no other program finds it."
            " Put it into a module of its own and import it from there"
        )
    return kind


def from_plain(plain: Any, where: str = "config") -> Any:
    """The object that `to_plain` wrote, of this version or an older one.

    Raises:
        ValueError: an unknown kind or key, with the nearest one, or a newer format; says where.
    """
    if isinstance(plain, dict):
        check_format(plain, where)
        plain = {key: value for key, value in plain.items() if key != "format"}
    return _build(upgrade(plain), where)


def _build(plain: Any, where: str) -> Any:
    if isinstance(plain, list):
        return tuple(_build(item, f"{where}[{i}]") for i, item in enumerate(plain))
    if not isinstance(plain, dict):
        return plain
    if not isinstance(plain.get("kind"), str):
        raise ValueError(f'{where}: an object needs a "kind", got the keys {sorted(map(str, plain))}')
    part = find_part(plain["kind"], where)
    if not isinstance(part, type):
        return part
    names = [field.name for field in fields(part)]
    values = {key: _build(value, f"{where}.{key}") for key, value in plain.items() if key != "kind"}
    for key in values:
        if key not in names:
            raise ValueError(f"{where}: {plain['kind']} has no field {key!r}{nearest(key, names)}")
    try:
        return part(**values)
    except TypeError as error:  # a field is missing, or a value is of a type that it cannot compare or count with
        raise ValueError(f"{where}: {plain['kind']} cannot be made of these values: {error}") from None


def check_format(plain: dict[str, Any], where: str) -> None:
    """Raise ValueError for a file that a newer version wrote."""
    found = plain.get("format", 1)
    if type(found) is not int or found < 1:
        raise ValueError(f"{where}: its format is {found!r}, which no version of steadydetr has written")
    if found > FORMAT:
        raise ValueError(f"{where}: its format is {found}, this version of steadydetr reads up to {FORMAT}: update steadydetr")


def check_savable(value: Any, where: str) -> None:
    """Raise ValueError, saying why, if `value` would not come back from a file as it is."""
    plain = json.loads(json.dumps(to_plain(value, where)))
    again = json.loads(json.dumps(to_plain(from_plain(plain, where), where)))
    if changed := differences(plain, again):
        raise ValueError(f"{where} would not come back from a file as it is: {'; '.join(changed)}")


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """What differs between two plain configs, as 'field: a -> b'."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [line for key in keys for line in differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a!r} -> {b!r}"]


def renewed(plain: Any, where: str = "config") -> Any:
    """A stored config as this version would write it: fields that were added since have their defaults."""
    return json.loads(json.dumps(to_plain(from_plain(plain, where))))
