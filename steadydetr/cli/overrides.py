"""A recipe as flags: every field of it, nested ones too, objectives by their names, and parts that can be exchanged.

--training.epochs 24                       a field
--objectives.denoising.number 200          a field of an objective
--objectives.denoising none                without the objective; --objectives.denoising denoising adds it
--data.transform fixed-size --data.transform.height 256      another part, then its fields
"""

from __future__ import annotations

import types
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import takewhile
from typing import Any, Union, get_args, get_origin, get_type_hints

import tyro

from steadydetr.cli.parsing import REGISTRY
from steadydetr.kinds import nearest, normal, not_found, options, package_of, word_of, words_of
from steadydetr.recipes.base import Recipe

NONE = "none"


@dataclass(frozen=True)
class Choice:
    """A place in a recipe where one of several dataclasses stands, or none."""

    path: tuple[str, ...]
    kinds: dict[str, type | None]  # by the name that the command line calls them
    current: str

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.path).replace("_", "-")

    def find(self, word: str) -> type | None:
        """The part that a word means, by any of its words or its kind; ValueError where there is none."""
        found = [kind for kind in self.kinds.values() if normal(word) in ((NONE,) if kind is None else words_of(kind))]
        if not found:
            if not word or word.startswith("--"):
                raise ValueError(f"{self.flag} names no part; there are {', '.join(self.kinds)}")
            raise ValueError(f"{self.flag} {word}: {not_found(normal(word), list(self.kinds))}")
        return found[0]


@REGISTRY.struct_rule
def _named_parts(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """The tuples of objectives and of teachers as a group of flags each, by its name: `--objectives.denoising.number 200`."""
    if role_of(info.type) is None or not isinstance(info.default, tuple):
        return None
    parts = tuple(tyro.constructors.StructFieldSpec(name=part.name, type=type(part), default=part) for part in info.default)
    return tyro.constructors.StructConstructorSpec(instantiate=lambda **named: tuple(named.values()), fields=parts)


def choose(recipe: Recipe, words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Exchange the parts that `words` name, as in `--data.transform fixed-size`, and give back the words that are left.

    Raises ValueError for a part that does not exist, with the nearest one.
    """
    words = _with_image_channels(words)
    left = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    recipe, taken = _exchange(recipe, left)
    _check_flags(recipe, left)
    return (recipe, left) if taken else (recipe, list(words))


def _with_image_channels(words: Sequence[str]) -> list[str]:
    """The words, in which `--detector.backbone.channels 1` is short for image-channels.

    Several numbers are the widths of a small backbone (D-145).
    """
    found = list(words)
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        numbers = [value] if equals else list(takewhile(str.isdigit, words[at + 1 :]))
        if name == "--detector.backbone.channels" and len(numbers) == 1:
            found[at] = f"--detector.backbone.image-channels{equals}{value}"
    return found


def _exchange(recipe: Recipe, left: list[str]) -> tuple[Recipe, bool]:
    """Take from `left` what names a part. Exchanging one can open or close others, so start again after each."""
    taken = False
    while True:
        flags = [word.replace("_", "-") for word in left]
        choice = next((c for c in choices(recipe) if c.flag in flags), None)
        if choice is None:
            return recipe, taken
        at = flags.index(choice.flag)
        kind = choice.find(left[at + 1] if at + 1 < len(left) else "")
        recipe = put(recipe, choice.path, None if kind is None else kind())
        del left[at : at + 2]
        taken = True


def _check_flags(recipe: Recipe, left: Sequence[str]) -> None:
    """Raise ValueError for a flag of a part that the recipe does not have, or of a field that a part does not have."""
    places = {choice.flag: choice for choice in choices(recipe)}
    words = zip(left, [*left[1:], ""], strict=False)
    for flag, word in ((flag.replace("_", "-"), word) for flag, word in words if flag.startswith("--") and "." in flag):
        top, name, *_ = flag.removeprefix("--").split(".")
        above = [place for place in places if flag.startswith(f"{place}.")]
        if above:
            _check_field(places[max(above, key=len)], flag)
        elif role := role_of(get_type_hints(Recipe).get(top)):
            raise ValueError(_no_such_name(flag, word, top, name, role))


def _check_field(place: Choice, flag: str) -> None:
    """Raise ValueError where the part that stands there has no such field."""
    part, field = place.kinds.get(place.current), flag.removeprefix(f"{place.flag}.").partition(".")[0]
    if part is None:
        fitting = [word for word, kind in place.kinds.items() if kind is not None]
        raise ValueError(f"{flag}: there is none in this recipe; name a part before it, {place.flag} {fitting[0]}")
    names = [each.name.replace("_", "-") for each in fields(part)]
    if field.removeprefix("no-") not in names:
        if reason := getattr(part, "lacks", {}).get(field):
            raise ValueError(f"{flag}: {reason}")
        raise ValueError(f"{flag}: {place.flag} is {place.current}, which has no field {field!r}{nearest(field, names)}")


def _no_such_name(flag: str, word: str, top: str, name: str, role: type) -> str:
    """What is wrong with --objectives.NAME, --teachers.NAME or --sinks.NAME where no part has that name."""
    known, what = options(role), top.removesuffix("s")
    names = {other: kind().name for other, kind in known.items()}
    for other, kind in known.items():
        if normal(word) in words_of(kind):
            return f"{flag} {word}: this {what} goes by the name {names[other]}: --{top}.{names[other]} {word}"
    if package_of(word):
        return f"{flag} {word}: {not_found(normal(word), list(known), what)}"
    return f"{flag}: there is no {what} {name!r}{nearest(name, sorted(set(names.values())))}"


def choices(value: Any, path: tuple[str, ...] = ()) -> Iterator[Choice]:
    """Every place below a dataclass where parts can be exchanged."""
    hints = get_type_hints(type(value))
    for field in fields(value):
        part, here = getattr(value, field.name), (*path, field.name)
        if isinstance(part, tuple):
            if role := role_of(hints[field.name]):
                yield from _named_choices(part, role, here)
            continue
        kinds = _alternatives(hints[field.name])
        if len(kinds) > 1:
            yield Choice(here, kinds, NONE if part is None else word_of(type(part)))
        if is_dataclass(part):
            yield from choices(part, here)


def role_of(hint: Any) -> type | None:
    """The class of the parts that a tuple field holds, such as Objective for `tuple[Objective, ...]`; None if they have no names."""
    role = get_args(hint)[0] if get_origin(hint) is tuple and Ellipsis in get_args(hint) else None
    return role if isinstance(role, ABCMeta) and hasattr(role, "name") else None


def _named_choices(items: tuple[Any, ...], role: type, here: tuple[str, ...]) -> Iterator[Choice]:
    """The choices in a tuple of named parts: each can be exchanged or left out, and one of another name can be added."""
    kinds: dict[str, type | None] = {**options(role)}
    for item in items:
        yield Choice((*here, item.name), kinds | {NONE: None}, word_of(type(item)))
        yield from choices(item, (*here, item.name))
    absent: dict[str, dict[str, type | None]] = {}  # by name: several parts can go by one, of which a recipe has one at a time
    for word, kind in options(role).items():
        absent.setdefault(kind().name, {})[word] = kind
    for name in [name for name in absent if name not in {item.name for item in items}]:
        yield Choice((*here, name), absent[name] | {NONE: None}, NONE)


def _alternatives(hint: Any) -> dict[str, type | None]:
    """The parts that can stand in a field, by the words for them; empty where its type leaves no choice."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found: dict[str, type | None] = {}
    for member in members:
        if isinstance(member, type) and member is not type(None) and not issubclass(member, (bool, int, float, str)):
            found |= options(member)
    return found | {NONE: None} if found and type(None) in members else found


def put(value: Any, path: Sequence[str], part: Any) -> Any:
    """`value` with another part at `path`; in a tuple, None takes the one of that name out and a new one is added."""
    if not path:
        return part
    first, rest = path[0], path[1:]
    if isinstance(value, tuple):
        changed = [put(item, rest, part) if item.name == first else item for item in value]
        if first not in {item.name for item in value}:
            changed.append(part)
        return tuple(item for item in changed if item is not None)
    return replace(value, **{first: put(getattr(value, first), rest, part)})
