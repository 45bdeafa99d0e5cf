"""Config of AdaMixer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from steadydetr.config import check_within
from steadydetr.detectors.configs.base import BackboneDetectorConfig
from steadydetr.kinds import changeable, register
from steadydetr.nn.configs import BackboneConfig, TimmBackboneConfig, infer_backbone
from steadydetr.nn.named_tensors import NamedTensors

if TYPE_CHECKING:
    from steadydetr.detectors.adamixer import AdaMixer


@register("adamixer")
@dataclass(frozen=True)
class AdaMixerConfig(BackboneDetectorConfig):
    """Defaults: the paper's detector with R50 and 100 queries."""

    lacks = MappingProxyType(  # no field: without an annotation
        {"transformer": "AdaMixer has no encoder, so there is no memory to fuse: leave it out; what else it has is in --detector itself"}
    )
    encoder_layers = 0
    backbone: BackboneConfig = TimmBackboneConfig(out_indices=(1, 2, 3, 4), train_affine=True)
    width: int = 256
    queries: int = 100
    decoder_layers: int = 6
    heads: int = 8  # of the attention among queries
    ffn: int = 2048
    groups: int = 4  # of channels, each of which samples points of its own
    in_points: int = 32  # that a group of a query samples
    out_points: int = 128  # after mixing
    levels: int = 4  # feature levels; more than the backbone's maps adds strided convolutions
    norm_groups: int = 32  # of the neck's GroupNorm; divides width
    checkpointing: bool = changeable(False)  # recompute layers in the backward pass: less memory, same gradients

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("heads", "groups", "decoder_layers", "in_points", "out_points"), (1, 1000))
        super().__post_init__()
        check_within("detector", self, width=(4, 2**16), ffn=(1, 2**20), levels=(1, 32), norm_groups=(1, 2**16), **counts)
        for name in ("heads", "groups", "norm_groups"):
            if self.width % getattr(self, name):
                raise ValueError(f"detector.width = {self.width} is no multiple of detector.{name} = {getattr(self, name)}")
        if self.width % 8:
            raise ValueError(f"detector.width = {self.width} is no multiple of 8, which sines and cosines of four numbers need")

    def build(self, num_classes: int) -> AdaMixer:
        from steadydetr.detectors.adamixer import AdaMixer

        return AdaMixer(self, num_classes)

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        """Layers that make layers are what AdaMixer alone has. Groups and points follow from the sizes of what they make."""
        if not tensors.has("decoder.layers.0.mixing.generator."):
            return None
        queries, width = tensors.shape("query_content.weight")
        places = tensors.shape("decoder.layers.0.sampling.sampling_offsets.bias")[0] // 3  # groups x points
        out_points = tensors.shape("decoder.layers.0.mixing.output.weight")[1] // width
        squares = tensors.shape("decoder.layers.0.mixing.generator.bias")[0] - places * out_points  # groups x (width / groups)^2
        groups = width**2 // squares
        return cls(
            backbone=replace(infer_backbone(tensors), train_affine=True),
            width=width,
            queries=queries,
            decoder_layers=tensors.count("decoder.layers"),
            heads=tensors.shape("decoder.layers.0.overlap_scale")[0],
            ffn=tensors.shape("decoder.layers.0.ffn.linear1.weight")[0],
            groups=groups,
            in_points=places // groups,
            out_points=out_points,
            levels=tensors.count("neck.convs"),
        )
