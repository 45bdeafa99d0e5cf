"""From a dataclass to flags and back, by tyro."""

from __future__ import annotations

import collections.abc
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeVar, get_origin

import tyro

from steadydetr.config import PACKAGE, nearest

T = TypeVar("T")
FUNCTION_PACKAGE = f"{PACKAGE}.equations"  # where a bare name is looked up
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


def find_function(name: str) -> Callable[..., Any]:
    """A function of this package by its short name (of `equations`) or its full one; a ValueError gives the nearest ones."""
    module, _, short = name.rpartition(".")
    known: dict[str, Callable[..., Any]] = {}
    for place in [module] if module.startswith(f"{PACKAGE}.") else equation_modules():
        known |= functions_of(place)
    wanted = short if module.startswith(f"{PACKAGE}.") else name
    if wanted not in known:
        raise ValueError(f"there is no function {name!r}{nearest(wanted, list(known))}")
    return known[wanted]


def equation_modules() -> list[str]:
    package = importlib.import_module(FUNCTION_PACKAGE)
    return [f"{FUNCTION_PACKAGE}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]


def functions_of(module: str) -> dict[str, Callable[..., Any]]:
    """The functions that are written in a module of this package, by name."""
    try:
        content = vars(importlib.import_module(module))
    except ImportError:
        raise ValueError(f"there is no module {module!r}") from None
    return {name: value for name, value in content.items() if isinstance(value, FunctionType) and value.__module__ == module}
