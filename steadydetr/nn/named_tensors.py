"""The tensors of another project's file under our names, and what the configs of detectors and backbones are inferred from.

Two kinds of names are not yet those of our parameters. `class_heads.N` and `box_heads.N` are the heads of stage N, those after the last
stage of the decoder being the encoder's. `query_position_and_content` holds both embeddings of learned queries side by side.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from steadydetr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Untraced:
    """What neither a name nor a shape in a file tells. None: the value that the project's own configs usually have."""

    heads: int = 8  # attention heads
    queries: int = 300  # of two-stage Deformable DETR and DAB-Deformable-DETR, which learn none
    temperature: float | None = None  # of the sine position of maps; detrex trained its 24-epoch DINO with 20 and offset 0
    position_offset: float | None = None
    output_stride: int = 32  # of the backbone; 16: DC5, whose tensors are the same


USUAL = Untraced()


@dataclass(frozen=True)
class NamedTensors:
    """A state dict whose keys have been renamed to ours."""

    tensors: Mapping[str, Tensor]  # by our names
    layout: str  # name of the layout that the file is in: "original", "detrex", ...
    original_keys: Collection[str]  # the keys as they stand in the file
    untraced: Untraced = USUAL

    def has(self, *prefixes: str) -> bool:
        """Whether any name begins with any of the prefixes."""
        return any(name.startswith(prefixes) for name in self.tensors)

    def names(self, prefix: str) -> list[str]:
        """All names that begin with the prefix."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def matching(self, pattern: str) -> list[str]:
        """All names that a regular expression matches as a whole."""
        return [name for name in self.tensors if re.fullmatch(pattern, name)]

    def shape(self, name: str) -> torch.Size:
        """The shape of one tensor.

        Raises:
            ValueError: the file has no such tensor; says which.
        """
        if name not in self.tensors:
            raise ValueError(f"missing: {name}, whose shape tells a size of the detector")
        return self.tensors[name].shape

    def count(self, prefix: str) -> int:
        """The number of parts directly below `prefix`: 6 for `decoder.layers` with `decoder.layers.0.` to `decoder.layers.5.`."""
        return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in self.names(f"{prefix}.")})

    @property
    def heads_are_tied(self) -> bool:
        """Whether all decoder stages have equal heads, as those of DINO and plain Deformable DETR do. True for tensors without values."""
        stages = range(self.count("decoder.layers"))
        pairs = [(name, name.replace("_heads.0.", f"_heads.{i}.")) for name in self.tensors if "_heads.0." in name for i in stages]
        return all(other not in self.tensors or same(self.tensors[name], self.tensors[other]) for name, other in pairs)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal shapes and values. Meta tensors have no values: equal shapes are enough."""
    return a.shape == b.shape and (a.device.type == "meta" or bool(torch.equal(a, b)))
