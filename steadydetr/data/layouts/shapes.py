"""The word `shapes` in place of a folder: the embedded data set, generated as it is read."""

from __future__ import annotations

from dataclasses import dataclass, fields

from steadydetr.data.layouts.base import DataLayout
from steadydetr.data.shapes import ShapesConfig, ShapesDataset
from steadydetr.kinds import register


@register("shapes-layout")
@dataclass(frozen=True)
class Shapes(DataLayout):
    """`shapes`, with options after a colon."""

    gives_masks = True
    looked_for = "shapes: the word itself, as in shapes or shapes:size=128,images=2000,seed=0"

    def recognises(self, where: str) -> bool:
        return where == "shapes" or where.startswith("shapes:")

    def open(self, where: str, split: str) -> ShapesDataset:
        return ShapesDataset(parse_shapes(where), split, self.masks)


def parse_shapes(text: str) -> ShapesConfig:
    """`shapes:size=128,images=2000` -> ShapesConfig."""
    options: dict[str, int] = {}
    known = [field.name for field in fields(ShapesConfig)]
    for item in filter(None, text.partition(":")[2].split(",")):
        key, _, value = item.partition("=")
        if key.strip() not in known or not value.strip().isdigit():
            raise ValueError(f"--data {text}: {item!r} is not understood; options are {', '.join(f'{k}=NUMBER' for k in known)}")
        options[key.strip()] = int(value)
    return ShapesConfig(**options)
