"""The commands that the documentation and the command line's own help show, read as the command line reads them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile

from steadydetr.cli.cost_arguments import read_cost_arguments
from steadydetr.cli.distill import take_teacher
from steadydetr.cli.training_arguments import find_or_read, override, read_training_arguments
from steadydetr.recipes.base import Recipe
from steadydetr.recipes.distill import distilled

WITH_RECIPES = "train|distill|cost|compare"


def shown_commands(text: str) -> list[str]:
    """Those that name a recipe, in a page's blocks or a usage text, one a line, without remarks; flags may go on in the next line."""
    text = re.sub(r"\s*\\?\n {4,}(?=--)", " ", text)
    found = re.findall(rf"^ *(?:torchrun .* -m )?(steadydetr (?:{WITH_RECIPES}) .*)", text, re.MULTILINE)
    lines = [re.split(r"\s{2,}|\s#", line)[0] for line in found]
    return [line for line in lines if not re.search(r"RECIPE|config\.json", line)]


def understand(command: str) -> list[Recipe]:
    """The recipes that a command makes; an error where one does not exist or a flag is not understood."""
    _, kind, *words = shlex.split(command)
    return list(_compared(words)) if kind == "compare" else [_single(kind, *words)]


def _single(kind: str, name: str, *words: str) -> Recipe:
    if kind == "train":
        return read_training_arguments(name, words)[0]
    if kind == "cost":
        return read_cost_arguments(name, words, "").recipe
    teacher, rest = take_teacher(words)
    assert teacher
    return override(distilled(find_or_read(name), teacher), rest, kind)[0]


def _compared(words: list[str]) -> Iterator[Recipe]:
    shared = words[words.index("--") + 1 :] if "--" in words else []
    for text in takewhile(lambda word: not word.startswith("--"), words):
        name, *flags = shlex.split(text)
        yield read_training_arguments(name.rpartition("=")[2], [*shared, *flags])[0]
