"""A golden model case rebuilt: our detector with the case's weights, fed with the case's feature maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steadydetr.convert import Untraced, convert_state_dict, infer_config
from steadydetr.detectors import DetectorConfig
from steadydetr.detectors.deformable import DeformableDetector
from steadydetr.layouts import recognise, rename
from steadydetr.structures import Batch, Targets


class GivenMaps(nn.Module):
    """Stands in for the backbone."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps, self.channels = maps, [m.shape[1] for m in maps]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.maps


@dataclass(frozen=True)
class GivenBackbone:
    maps: list[Tensor]

    def build(self) -> GivenMaps:
        return GivenMaps(self.maps)


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    detector: DeformableDetector
    detector_config: DetectorConfig
    padding: Tensor

    def batch(self, dtype: torch.dtype) -> Batch:
        images, height, width = self.padding.shape
        size = (height, width)
        targets = self.targets(dtype)
        return Batch(torch.zeros(images, 3, height, width), self.padding, targets, tuple(range(images)), (size,) * images, (size,) * images)

    def targets(self, dtype: torch.dtype) -> Targets:
        prefix = "tgt" if "tgt.0.labels" in self.tensors else "in.target"
        count = len(self.padding)
        labels = [self.tensors[f"{prefix}.{i}.labels"] for i in range(count)]
        boxes = [self.tensors[f"{prefix}.{i}.boxes"].to(dtype) for i in range(count)]
        return Targets(torch.cat(labels), torch.cat(boxes), tuple(len(l) for l in labels))


def rebuild(config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Case:
    """The detector that the case's names, shapes and metadata describe, its weights loaded through the converter."""
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    hyper = config.get("hparams") or config
    selected = [value.shape[1] for key, value in tensors.items() if key.endswith(("topk_indices", ".topk"))]
    heads = _first(hyper, "nheads", "num_heads", "heads", default=4)
    untraced = Untraced(heads=heads, queries=selected[0] if selected else 300, **_position(config))
    layout = recognise(state)
    inferred = infer_config(state, rename(state, layout), layout, untraced)
    maps = [tensors[key].to(dtype) for key in sorted(k for k in tensors if k.startswith("in.feat."))]
    ours = replace(inferred, backbone=GivenBackbone(maps), transformer=replace(inferred.transformer, dropout=0.0))  # type: ignore[arg-type]
    converted = convert_state_dict(state, ours, without_backbone=True)
    detector = ours.build(converted.num_classes)
    missing, unexpected = detector.load_state_dict(converted.state, strict=False)
    assert not missing and not unexpected
    return Case(config, tensors, detector.to(dtype), ours, _padding(tensors))


def _position(config: dict[str, Any]) -> dict[str, float]:
    """What the metadata says of the sine position; the defaults of the layout where it says nothing."""
    flags, spec = config.get("flags", {}), config.get("position_embedding")
    found: dict[str, float] = {}
    if "pe_temperatureH" in flags:
        found["temperature"] = float(flags["pe_temperatureH"])
    if isinstance(spec, dict):
        found |= {ours: float(spec[key]) for key, ours in (("temperature", "temperature"), ("offset", "position_offset")) if key in spec}
    for key, ours in (("pe_temperature", "temperature"), ("pe_offset", "position_offset")):
        if key in config:
            found[ours] = float(config[key])
    return found


def _first(values: dict[str, Any], *keys: str, default: int) -> int:
    return next((int(values[key]) for key in keys if key in values), default)


def _padding(tensors: dict[str, Tensor]) -> Tensor:
    if "in.pixel_mask" in tensors:
        return tensors["in.pixel_mask"].bool()
    sizes = tensors["in.image_sizes"].tolist()
    map0 = tensors["in.feat.res3"] if "in.feat.res3" in tensors else tensors["in.feat.res2"]
    stride = 8 if "in.feat.res3" in tensors else 4
    height, width = map0.shape[2] * stride, map0.shape[3] * stride
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        padding[i, :h, :w] = False
    return padding
