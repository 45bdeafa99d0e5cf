"""From a dataclass to flags and back, by tyro."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_origin

import tyro

from steadydetr.kinds import functions, kind_of, nearest, normal
from steadydetr.old_formats import upgrade

T = TypeVar("T")
REGISTRY = tyro.constructors.ConstructorRegistry()


def parse(kind: type[T], words: Sequence[str], command: str, description: str, default: T | None = None) -> T:
    """`kind` from the words of a command line; unknown flags and wrong values end the program with what was meant, code 2."""
    prog = f"steadydetr {command}"
    config = (tyro.conf.AvoidSubcommands,)
    with REGISTRY:
        if default is None:
            return tyro.cli(kind, args=list(words), prog=prog, description=description, config=config)
        return tyro.cli(kind, args=list(words), prog=prog, description=description, default=default, config=config)


@REGISTRY.primitive_rule
def _function(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """A field that holds a function takes its kind: `half-sine`, `mylab:cubic`."""
    if get_origin(info.type) is not collections.abc.Callable:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FUNCTION",
        instance_from_str=lambda words: find_function(words[0]),
        is_instance=callable,
        str_from_instance=lambda function: [kind_of(function) or function.__qualname__],
    )


def find_function(word: str) -> Callable[..., Any]:
    """The registered function of that kind, with - or _, or by the full name that version 0.1 took; a ValueError gives the nearest ones."""
    known, kind = functions(), normal(upgrade({"function": word})["kind"])
    if kind not in known:
        raise ValueError(f"there is no function {word!r}{nearest(kind, list(known))}")
    return known[kind]
