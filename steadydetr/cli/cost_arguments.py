"""The command line of `cost`: a recipe with everything that was overridden, and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Table

from steadydetr.cli.overrides import choose
from steadydetr.cli.parsing import Overwrite, parse
from steadydetr.cli.training_arguments import find_or_read
from steadydetr.config import check_within
from steadydetr.recipes.base import Recipe

if TYPE_CHECKING:
    from steadydetr.tools.cost import Cost


@dataclass(frozen=True)
class CostArguments:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    size: tuple[int, int] = (800, 1333)
    """Height and width of the image."""
    teacher: str = ""
    """Recipe or checkpoint of the trained teacher, where the recipe learns from one."""
    classes: int = 80
    output: Path | None = None
    """JSON file for the numbers."""
    overwrite: Overwrite = False
    """Replace --output if it is there."""


def read_cost_arguments(name: str, words: Sequence[str], description: str) -> CostArguments:
    recipe, words = choose(find_or_read(name), words)
    arguments = parse(CostArguments, words, f"cost {name}", description, CostArguments(recipe))
    check_within("", arguments, classes=(1, 10**6))
    if not all(32 <= side <= 2**14 for side in arguments.size):
        raise ValueError(f"--size {arguments.size[0]} {arguments.size[1]} must be sides in 32 .. {2**14}")
    return arguments


def tables(cost: Cost) -> list[Table]:
    """A table of the models, and one of the parts of a training step."""
    models = Table("model", "parameters, M", "trainable, M", "GFLOPs", "of encoder")  # of inference
    for name, size in ({"student": cost.student} | cost.teachers).items():
        models.add_row(name, f"{size.parameters / 1e6:.2f}", f"{size.trainable / 1e6:.2f}", giga(size.inference), giga(size.encoder))
    if cost.adapters:
        models.add_row("trained by objectives", f"{cost.adapters / 1e6:.2f}", f"{cost.adapters / 1e6:.2f}", "", "")
    step = Table("a training step", "GFLOPs", "share")
    step.add_row("teachers, forward", giga(cost.teaching), "")
    step.add_row("student and its own losses, forward", giga(cost.forward), "")
    for part, added in cost.parts.items():
        step.add_row(f"{part}, forward", giga(added), f"{cost.share(part):.2%}")
    if len(cost.parts) > 1:
        step.add_row("all distillation, forward", giga(sum(cost.parts.values())), f"{cost.whole_share:.2%}")
    for part, added in cost.parts_as_released.items():
        step.add_row(f"{part} as released, with a second encoder pass", giga(added), f"{cost.share_of(added):.2%}")
    step.add_row("forward and backward", giga(cost.step), "")
    if cost.parts:
        step.add_row("the same without teachers and distillation", giga(cost.plain_step), "")
    return [models, step]


def giga(count: int) -> str:
    return f"{count / 1e9:.2f}"
