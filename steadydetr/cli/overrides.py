"""A recipe as flags: every field of it, nested ones too, objectives by their names, and parts that can be exchanged.

--training.epochs 24                       a field
--objectives.denoising.number 200          a field of an objective
--objectives.denoising none                without the objective; --objectives.denoising denoising adds it
--data.transform fixed-size --data.transform.height 256      another part, then its fields
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Union, get_args, get_origin, get_type_hints

import tyro

from steadydetr.cli.parsing import REGISTRY
from steadydetr.config import nearest
from steadydetr.objectives import OBJECTIVES, Objective
from steadydetr.recipes.base import TEACHERS, Recipe, Teacher

NONE = "none"
NAMED: dict[Any, tuple[type, ...]] = {Objective: OBJECTIVES, Teacher: TEACHERS}  # what comes in tuples, each by its name


@dataclass(frozen=True)
class Choice:
    """A place in a recipe where one of several dataclasses stands, or none."""

    path: tuple[str, ...]
    kinds: dict[str, type | None]  # by the name that the command line calls them
    current: str

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.path).replace("_", "-")


@REGISTRY.struct_rule
def _named_parts(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """The tuples of objectives and of teachers as a group of flags each, by its name: `--objectives.denoising.number 200`."""
    if get_origin(info.type) is not tuple or get_args(info.type)[0] not in NAMED or not isinstance(info.default, tuple):
        return None
    parts = tuple(tyro.constructors.StructFieldSpec(name=part.name, type=type(part), default=part) for part in info.default)
    return tyro.constructors.StructConstructorSpec(instantiate=lambda **named: tuple(named.values()), fields=parts)


def choose(recipe: Recipe, words: Sequence[str]) -> tuple[Recipe, list[str]]:
    """Exchange the parts that `words` name, as in `--data.transform fixed-size`, and give back the words that are left.

    Raises ValueError for a part that does not exist, with the nearest one.
    """
    left = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    recipe, taken = _exchange(recipe, left)
    return (recipe, left) if taken else (recipe, list(words))


def _exchange(recipe: Recipe, left: list[str]) -> tuple[Recipe, bool]:
    """Take from `left` what names a part. Exchanging one can open or close others, so start again after each."""
    taken = False
    while True:
        flags = [word.replace("_", "-") for word in left]
        choice = next((c for c in choices(recipe) if c.flag in flags), None)
        if choice is None:
            return recipe, taken
        at = flags.index(choice.flag)
        name = left[at + 1].replace("_", "-").lower() if at + 1 < len(left) else ""
        if name not in choice.kinds:
            raise ValueError(f"{choice.flag} {name}: there is no such part{nearest(name, list(choice.kinds))}")
        kind = choice.kinds[name]
        recipe = put(recipe, choice.path, None if kind is None else kind())
        del left[at : at + 2]
        taken = True


def choices(value: Any, path: tuple[str, ...] = ()) -> Iterator[Choice]:
    """Every place below a dataclass where parts can be exchanged."""
    hints = get_type_hints(type(value))
    for field in fields(value):
        part, here = getattr(value, field.name), (*path, field.name)
        if isinstance(part, tuple) and get_args(hints[field.name])[0] in NAMED:
            yield from _named_choices(part, NAMED[get_args(hints[field.name])[0]], here)
            continue
        kinds = {NONE if kind is type(None) else part_name(kind): kind for kind in _members(hints[field.name])}
        if len(kinds) > 1:
            current = NONE if part is None else part_name(type(part))
            yield Choice(here, {name: None if name == NONE else kind for name, kind in kinds.items()}, current)
        if is_dataclass(part):
            yield from choices(part, here)


def _named_choices(items: tuple[Any, ...], kinds: tuple[type, ...], here: tuple[str, ...]) -> Iterator[Choice]:
    """Those that are there can be exchanged or left out; one of another name can be added."""
    by_name: dict[str, type | None] = {part_name(kind): kind for kind in kinds}
    for item in items:
        yield Choice((*here, item.name), by_name | {NONE: None}, part_name(type(item)))
        yield from choices(item, (*here, item.name))
    for kind in kinds:
        if kind().name not in {item.name for item in items}:
            yield Choice((*here, kind().name), {part_name(kind): kind, NONE: None}, NONE)


def _members(hint: Any) -> list[type]:
    """The alternatives of a union of dataclasses, with or without None, or the dataclasses of an abstract base; none for any other type."""
    members = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else _subclasses(hint)
    return members if any(map(is_dataclass, members)) else []


def _subclasses(base: Any) -> list[type[Any]]:
    """All dataclasses below an abstract base class."""
    if not (isinstance(base, type) and inspect.isabstract(base)):
        return []
    children: list[type[Any]] = base.__subclasses__()
    below = [kind for child in children for kind in (child, *_subclasses(child))]
    return [kind for kind in below if is_dataclass(kind)]


def part_name(kind: type) -> str:
    """DABDeformableDETRConfig -> dab-deformable-detr, FixedSizeTransform -> fixed-size."""
    name = re.sub(r"(Config|Transform|Cost|Target)$", "", kind.__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


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
