"""Configs as JSON and back: frozen dataclasses and functions by their kinds, tuples and plain values, nothing else.

A saved file carries the number of its format. Format 1, of version 0.1, named parts by module and class; `old_formats` translates it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, get_args, get_origin, get_type_hints

from steadydetr.files import read_json_object
from steadydetr.kinds import CHANGEABLE, find_part, kind_of, nearest
from steadydetr.old_formats import upgrade

FORMAT = 2
LARGEST = 1e100  # number that a file may hold; larger ones, infinity and NaN would only cause errors later
# //host, \\\\host, https://host, hub:owner/name, hf:owner/name
NETWORK_PLACE = re.compile(r"\s*([\\/]{2}|[a-zA-Z][\w+.-]+:[\\/]{2}|(hub|hf):)")
TEXTS = ("name", "notes", "reported")  # fields of a recipe that only people read


def to_plain(value: Any, where: str = "config", *, decisive: bool = False) -> Any:
    """A config as JSON values: {"kind": "focal-cost", field: ...}; a function as {"kind": "half-sine"}.

    Args:
        decisive: leave out the fields that are `changeable`, which do not decide what is learned.

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
        if isinstance(plain, (int, float)) and not abs(plain) <= LARGEST:
            raise ValueError(f"{where} is no number that can be counted with: {str(plain)[:40]}")
        return plain
    if not isinstance(plain.get("kind"), str):
        raise ValueError(f'{where}: an object needs a "kind", got the keys {sorted(map(str, plain))[:20]}')
    part = find_part(plain["kind"], where)
    if not isinstance(part, type):
        return part
    names = [field.name for field in fields(part)]
    inner = f"{where}: " if where.endswith(".json") else f"{where}."
    values = {key: _build(value, f"{inner}{key}") for key, value in plain.items() if key != "kind"}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"{where}: {plain['kind']} has no field {key[:100]!r}{nearest(key, names)}")
        _check_type(value, _hints(part).get(key, Any), f"{inner}{key}")
    try:
        return part(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except Exception as error:  # a field is missing, or whatever a part raises where values do not go together
        raise ValueError(f"{where}: {plain['kind']} cannot be made of these values: {error}") from None


@cache
def _hints(part: Any) -> dict[str, Any]:
    """The types of a part's fields; none for a plugin's part that names types which exist only for checkers."""
    try:
        return get_type_hints(part)
    except NameError:
        return {}


def _check_type(value: Any, expected: Any, where: str) -> None:
    from typeguard import CollectionCheckStrategy, TypeCheckError, check_type  # which takes a third of what recipes take to import

    shown = f"a {kind_of(type(value))}" if is_dataclass(value) else repr(value)[:100]
    if get_origin(expected) is Callable and not isinstance(value, FunctionType):
        raise ValueError(f"{where} = {shown}: the kind of a function belongs here")
    if any(isinstance(v, bool) for v in (value if isinstance(value, tuple) else (value,))) and not _allows_bool(expected):
        raise ValueError(f"{where} = {shown}: true and false are no numbers")
    try:
        check_type(value, expected, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        raise ValueError(f"{where} = {shown}: {error}") from None


def _allows_bool(expected: Any) -> bool:
    """Whether a type has a place for true and false, which Python takes for the numbers 1 and 0."""
    return expected in (bool, Any, object) or any(map(_allows_bool, get_args(expected)))


def check_within(owner: str, config: Any, **bounds: tuple[float, float]) -> None:
    """Raise ValueError where a field of a config is below the first of its bounds, above the second, or NaN. A field may also be None.

    Args:
        owner: what messages and flags call the config: "detector.transformer"; empty for the options of a command.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            shown = f"{owner}.{name} =" if owner else f"--{name.replace('_', '-')}"
            raise ValueError(f"{shown} {value} must lie in {low} .. {high}")


def holds_foreign_part(config: Any) -> bool:
    """Whether a config, or a part inside of it, belongs to another package."""
    if isinstance(config, tuple):
        return any(map(holds_foreign_part, config))
    if not is_dataclass(config):
        return ":" in (kind_of(config) or "") if isinstance(config, FunctionType) else False
    inner = (getattr(config, field.name) for field in fields(config))
    return ":" in (kind_of(type(config)) or ":") or any(map(holds_foreign_part, inner))


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
    return to_plain(from_plain(plain, where))


def refuse_network(plain: Any, where: str) -> None:
    """Raise ValueError for a place in the network that a recipe of a file names, such as `weights`: only the user's own words may."""
    for name, value in flat_strings(plain):
        if name not in TEXTS and any(map(NETWORK_PLACE.match, re.split("[+,=]", value))):  # + joins data sets, `,images-in=` follows one
            raise ValueError(
                f"{where}: {name} = {value[:100]!r} is a place in the network, which a file may not name."
                f" Take it out of the file, and if you trust it, give it as --{name.replace('_', '-')}"
            )


def flat_strings(plain: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string below a plain value, with its path of dots."""
    if isinstance(plain, str):
        yield where, plain
    elif isinstance(plain, dict):
        for name, value in plain.items():
            yield from flat_strings(value, f"{where}.{name}" if where else name)
    elif isinstance(plain, list):
        for value in plain:
            yield from flat_strings(value, where)


def read_recipe(path: Path) -> Any:
    """The recipe in a file: the config.json of a run, or a recipe alone, as `steadydetr compare` writes it."""
    content = read_json_object(path)
    check_format(content, str(path))
    plain = content.get("recipe", content)
    refuse_network(plain, str(path))
    return from_plain(plain, str(path))
