"""A golden model case rebuilt: our detector with the case's weights, fed with the case's feature maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steadydetr.checkpoints.convert import convert_state_dict, infer_config
from steadydetr.checkpoints.key_maps import recognise, rename
from steadydetr.detectors import DetectorConfig, HDeformableDETRConfig, TransformerConfig
from steadydetr.detectors.deformable import DeformableDetector
from steadydetr.nn.named_tensors import NamedTensors, Untraced
from steadydetr.nn.positions import feature_position
from steadydetr.structures import Batch, Targets


class GivenMaps(nn.Module):
    """Stands in for the backbone."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps, self.channels = maps, [m.shape[1] for m in maps]
        self.strides = [8 * 2**i for i in range(len(maps))]  # of no matter: only their order counts

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.maps


@dataclass(frozen=True)
class GivenBackbone:
    maps: list[Tensor]

    def build(self) -> GivenMaps:
        return GivenMaps(self.maps)


@dataclass(frozen=True)
class Case:
    config: dict[str, Any]  # of the file's metadata
    tensors: dict[str, Tensor]
    state: dict[str, Tensor]  # official names
    detector: DeformableDetector
    detector_config: DetectorConfig
    padding: Tensor

    def batch(self) -> Batch:
        """Without pixels: the maps are given."""
        images, height, width = self.padding.shape
        sizes = ((height, width),) * images
        return Batch(torch.zeros(images, 3, height, width), self.padding, self.targets(), tuple(range(images)), sizes)

    def targets(self) -> Targets:
        """Those of the file; none where it has none."""
        prefix = "tgt" if "tgt.0.labels" in self.tensors else "in.target"
        count, dtype = len(self.padding), next(self.detector.parameters()).dtype
        labels = [self.tensors.get(f"{prefix}.{i}.labels", torch.zeros(0, dtype=torch.int64)) for i in range(count)]
        boxes = [self.tensors.get(f"{prefix}.{i}.boxes", torch.zeros(0, 4)).to(dtype) for i in range(count)]
        return Targets(torch.cat(labels), torch.cat(boxes), tuple(len(l) for l in labels))

    def official(self, prefix: str) -> dict[str, Tensor]:
        """Values per parameter that the file keeps under `prefix` and official names, by our names; single numbers in every entry.

        A tied parameter stands under one of its names only, so each is spread to all names that hold the same tensor.
        """
        given = {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}
        known = {key: given[owner].expand_as(self.state[key]) for key, owner in owners(self.state, given).items()}
        assert known
        return convert_state_dict(known, self.detector_config, without_backbone=True).state


def owners(state: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Each official key -> the key among `given` that holds the same parameter; keys without one (buffers) are left out."""
    found = {}
    for key, value in state.items():
        counterparts = (
            other for other in given if other in state and state[other].shape == value.shape and torch.equal(state[other], value)
        )
        if owner := key if key in given else next(counterparts, None):
            found[key] = owner
    return found


def config_of(state: dict[str, Tensor], heads: int, maps: list[Tensor], dtype: torch.dtype, **options: Any) -> DetectorConfig:
    """The detector of a state dict without a backbone. `options`: fields of Untraced."""
    layout = recognise(state)
    found = infer_config(NamedTensors(rename(state, layout), layout, state.keys(), Untraced(heads=heads, **options)))
    backbone = GivenBackbone([m.to(dtype) for m in maps])
    return replace(found, backbone=backbone, transformer=replace(found.transformer, dropout=0.0))  # type: ignore[arg-type]


def load_case(state: dict[str, Tensor], config: DetectorConfig, dtype: torch.dtype) -> DeformableDetector:
    converted = convert_state_dict(state, config, without_backbone=True)
    detector = config.build(converted.num_classes)
    detector.load_state_dict(converted.state)
    return detector.to(dtype)


def rebuild(config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Case:
    """The detector that the case's names, shapes and metadata describe, its weights loaded through the converter."""
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    maps = [tensors[key] for key in sorted(k for k in tensors if k.startswith("in.feat."))]
    hyper = config.get("hparams", config)
    queries = hyper.get("num_queries", hyper.get("num_queries_one2one"))
    ours = config_of(state, hyper["nheads"], maps, dtype, queries=queries, **position(config))
    if "num_queries_one2many" in hyper:
        ours = hybrid(ours, hyper)
    groups = config.get("groupnorm_groups", config.get("gn_groups", TransformerConfig.norm_groups))
    ours = replace(ours, transformer=replace(ours.transformer, norm_groups=groups))
    check_sizes(ours, hyper)
    return Case(config, tensors, state, load_case(state, ours, dtype), ours, padding(config, tensors))


def hybrid(found: DetectorConfig, hyper: dict[str, Any]) -> HDeformableDETRConfig:
    """H-Deformable-DETR of its own repository, of which files tell mixed selection alone."""
    flags = {name: hyper[name] for name in ("two_stage", "mixed_selection", "look_forward_twice")}
    sizes = {"queries": hyper["num_queries_one2one"], "one_to_many_queries": hyper["num_queries_one2many"]}
    kept = {"backbone": found.backbone, "transformer": found.transformer}  # type: ignore[attr-defined]
    return HDeformableDETRConfig(**kept, **sizes, **flags, refine=hyper["with_box_refine"])


def check_sizes(ours: DetectorConfig, hyper: dict[str, Any]) -> None:
    """What the converter read from names and shapes is what the case was built with."""
    official = {
        "width": "hidden_dim",
        "ffn": "dim_feedforward",
        "encoder_layers": "enc_layers",
        "decoder_layers": "dec_layers",
        "levels": "num_levels",
        "encoder_points": "enc_n_points" if "enc_n_points" in hyper else "num_points",
        "decoder_points": "dec_n_points" if "dec_n_points" in hyper else "num_points",
    }
    for name, key in official.items():
        assert getattr(ours.transformer, name) == hyper.get(key, getattr(ours.transformer, name)), name
    assert ours.queries == hyper.get("num_queries", hyper.get("num_queries_one2one"))
    for name, key in (("refine", "with_box_refine"), ("two_stage", "two_stage")):
        if key in hyper:
            assert getattr(ours, name) == hyper[key], name


def position(config: dict[str, Any]) -> dict[str, float]:
    """What the metadata says of the sine position; nothing where the layout's own values hold."""
    names = {"pe_temperature": "temperature", "pe_offset": "position_offset"}
    flags = config.get("flags", {})
    found = {ours: float(config[key]) for key, ours in names.items() if key in config}
    return found | ({"temperature": float(flags["pe_temperatureH"])} if "pe_temperatureH" in flags else {})


def padding(config: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    if "in.pixel_mask" in tensors:
        return tensors["in.pixel_mask"].bool()
    sizes = tensors["in.image_sizes"].tolist()
    first = tensors[min(key for key in tensors if key.startswith("in.feat."))]
    height, width = (side * config["strides"][0] for side in first.shape[-2:])
    mask = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = False
    return mask


def positions(case: Case, masks: list[Tensor]) -> list[Tensor]:
    """Position tables [B, D, h, w] of the levels, without level embedding."""
    c = case.detector.transformer
    return [feature_position(mask, c.width, c.temperature, c.position_offset).permute(0, 3, 1, 2) for mask in masks]


@contextmanager
def encoder_outputs(detector: DeformableDetector) -> Iterator[list[Tensor]]:
    """The memory after each encoder layer, then after each fusion of all of them or of the last."""
    outputs: list[Tensor] = []
    parts = (*detector.encoder.layers, *detector.encoder.fusions)
    hooks = [part.register_forward_hook(lambda module, args, output: outputs.append(output)) for part in parts]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def numbered(tensors: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    """`prefix`0, `prefix`1, ... as far as the file has them."""
    found = []
    while f"{prefix}{len(found)}" in tensors:
        found.append(tensors[f"{prefix}{len(found)}"])
    return found


def noise(config: Mapping[str, Any]) -> float:
    """float32 noise of a case: what its file says (`float64_diff`), 2e-6 where it says nothing (README, variants a)."""
    return max([2e-6, *(value for value in config.get("float64_diff", {}).values() if isinstance(value, float))])


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0, name: str = "") -> None:
    """Compared in float64; infinite where the other is."""
    torch.testing.assert_close(
        actual.detach().double(), expected.double(), atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}" if name else text
    )


def close_to_scale(actual: Tensor, expected: Tensor, relative: float, name: str = "") -> None:
    """Within a share of the largest entry: for gradients, whose size differs from tensor to tensor."""
    close(actual, expected, atol=relative * float(expected.abs().max()) + 1e-6 if expected.numel() else 0.0, name=name)
