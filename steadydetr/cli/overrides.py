"""From dataclasses to flags and back, by tyro: what it needs to be told about functions and objectives."""

from __future__ import annotations

import collections.abc
import importlib
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar, get_args, get_origin

import tyro

from steadydetr.config import PACKAGE, nearest
from steadydetr.objectives import Objective

T = TypeVar("T")
FUNCTION_MODULES = (f"{PACKAGE}.equations.detection",)  # where a bare name is looked up
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _function(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """A field that holds a function takes its name: `iou_target`, or in full `steadydetr.equations.detection.iou_target`."""
    if get_origin(info.type) is not collections.abc.Callable:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FUNCTION",
        instance_from_str=lambda words: find_function(words[0]),
        is_instance=callable,
        str_from_instance=lambda function: [function.__name__],
    )


@REGISTRY.struct_rule
def _objectives(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """The tuple of objectives as one group of flags an objective, by its name: `--objectives.denoising.number 200`."""
    if get_origin(info.type) is not tuple or get_args(info.type)[:1] != (Objective,) or not isinstance(info.default, tuple):
        return None
    fields = tuple(tyro.constructors.StructFieldSpec(name=o.name, type=type(o), default=o) for o in info.default)
    return tyro.constructors.StructConstructorSpec(instantiate=lambda **objectives: tuple(objectives.values()), fields=fields)


def find_function(name: str) -> Callable[..., Any]:
    """A function of this package by its short or its full name; a ValueError gives the nearest ones."""
    if name.startswith(f"{PACKAGE}."):
        module, _, attribute = name.rpartition(".")
        modules, wanted = (module,), attribute
    else:
        modules, wanted = FUNCTION_MODULES, name
    known: dict[str, Callable[..., Any]] = {}
    for module in modules:
        try:
            content = vars(importlib.import_module(module))
        except ImportError:
            continue
        known |= {key: value for key, value in content.items() if isinstance(value, FunctionType) and value.__module__ == module}
    if wanted not in known:
        raise ValueError(f"there is no function {name!r}{nearest(wanted, list(known))}")
    return known[wanted]


def parse(kind: type[T], words: Sequence[str], prog: str, description: str, default: T | None = None) -> T:
    """`kind` from the command line's words; unknown flags and wrong values end the program with the nearest flag."""
    config = (tyro.conf.AvoidSubcommands,)
    with REGISTRY:
        if default is None:
            return tyro.cli(kind, args=list(words), prog=prog, description=description, config=config)
        return tyro.cli(kind, args=list(words), prog=prog, description=description, default=default, config=config)
