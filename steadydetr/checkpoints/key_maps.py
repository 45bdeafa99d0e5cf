"""The keys of other projects' state dicts, renamed to ours by the table of their layout.

Two kinds of names are not yet those of our parameters, and are left for `steadydetr.checkpoints.convert` to place: see
`steadydetr.nn.named_tensors`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from steadydetr.checkpoints.layouts import BY_NAME, LAYOUTS, known_layouts
from steadydetr.checkpoints.layouts.base import DROP, Numbers
from steadydetr.files import listed
from steadydetr.nn.named_tensors import same


def recognise(keys: Iterable[str]) -> str:
    """The name of the layout that these keys are in.

    Raises:
        ValueError: it is none that is known; lists the keys.
    """
    keys = list(keys)
    for layout in LAYOUTS:
        if any(re.fullmatch(layout.mark, key) for key in keys):
            return layout.name
    names = ", ".join(reversed(BY_NAME))
    raise ValueError(f"no known layout: none of {names} writes keys like {listed(keys)}. Known are {known_layouts()}")


def rename(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors under our names, each by the first row of the layout's table that matches its key.

    Raises:
        ValueError: no row matches a key, or the tensors of two keys that name one parameter differ; lists them.
    """
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in BY_NAME[layout].table]
    numbers = BY_NAME[layout].numbers(state.keys())
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in state.items():
        found = next(((m, replacement) for pattern, replacement in patterns if (m := pattern.fullmatch(key))), None)
        if found is None:
            unknown.append(key)
        elif found[1] != DROP:
            name = re.sub(r"\{([^}]+)\}", lambda m: _calculate(m[1], numbers), found[0].expand(found[1]))
            if name in renamed and not same(renamed[name], value):
                raise ValueError(f"{key} differs from another key for the same parameter, {name}: they are tied in every known version")
            renamed[name] = value
    if unknown:
        raise ValueError(f"{len(unknown)} keys are left over: {listed(unknown)}")
    return renamed


def _calculate(expression: str, numbers: Numbers) -> str:
    """The value of `3-1`, `0+maps` or `4/2`, where `maps` is one of `numbers`."""
    left, sign, right = re.fullmatch(r"(\d+)([-+/])(\w+)", expression).groups()  # type: ignore[union-attr]
    a, b = int(left), numbers[right] if right in numbers else int(right)
    return str({"-": operator.sub, "+": operator.add, "/": operator.floordiv}[sign](a, b))


def missing_copies(keys: Iterable[str]) -> list[str]:
    """Keys of heads that a file has for one decoder stage but not for another.

    Files written by torch hold the heads of every stage, those that all stages share too.
    """
    heads = "|".join({head for layout in LAYOUTS for head in layout.heads})
    groups: dict[str, tuple[set[str], set[str]]] = {}
    present = set(keys)
    for key in present:
        if m := re.fullmatch(rf"((?:.+\.)?(?:{heads})\.)(\d+)(\..+)", key):
            stages, rests = groups.setdefault(m[1], (set(), set()))
            stages.add(m[2])
            rests.add(m[3])
    wanted = {f"{group}{stage}{rest}" for group, (stages, rests) in groups.items() for stage in stages for rest in rests}
    return sorted(wanted - present)
