"""Backbones: any timm model that gives feature maps, and a small one for minutes on a laptop."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model. Defaults: ResNet-50 of ImageNet as DETRs train it, stem and first stage frozen, frozen batch norm."""

    name: str = (
        "resnet50.tv_in1k"  # any timm model with features: resnet18, resnet101, mobilenetv2_100, swin_large_patch4_window12_384, ...
    )
    out_indices: tuple[int, ...] = (2, 3, 4)  # which of timm's feature maps, fine to coarse; Swin's are 0..3
    weights: str = "hub"  # "hub": ImageNet weights by way of timm; "none": random; else the path of a .safetensors or .pth file
    frozen_stages: int = 1  # 0: nothing; n: the stem and the first n stages
    freeze_norm: bool = True  # batch norm with fixed statistics, scale and shift
    drop_path: float = 0.0  # stochastic depth, where the model has it
    output_norm: bool = False  # LayerNorm of every map, as in the originals with Swin

    def build(self) -> Backbone:
        return Backbone(self)


@dataclass(frozen=True)
class SmallBackboneConfig:
    """One basic residual block a stage, trained from scratch with its own batch norm; maps of stride 8, 16, 32."""

    stem: int = 32
    channels: tuple[int, ...] = (48, 96, 160, 192)  # of strides 4, 8, 16, 32

    def build(self) -> SmallBackbone:
        return SmallBackbone(self)


class Backbone(nn.Module):
    """Pixels [B, 3, H, W], normalised, to a list of maps [B, c, h, w], fine to coarse.

    Raises:
        ValueError: no such model, or its weights cannot be had; says what to do.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.body = _timm_model(config)
        self.channels, self.strides = feature_info(self.body)
        if config.weights not in ("hub", "none"):
            load_backbone(self.body, Path(config.weights))
        if config.freeze_norm:
            freeze_batch_norm(self.body)
        for parameter in frozen_parameters(self.body, config.frozen_stages):
            parameter.requires_grad_(False)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if config.output_norm else None

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = self.body(pixels)
        maps = [m.permute(0, 3, 1, 2) if m.shape[1] != c else m for m, c in zip(maps, self.channels, strict=True)]
        if self.norms is not None:
            maps = [norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps, strict=True)]
        return [m.contiguous() for m in maps]


def feature_info(body: Any) -> tuple[list[int], list[int]]:
    """Channels and strides of a feature model's maps."""
    return body.feature_info.channels(), body.feature_info.reduction()


def _timm_model(config: BackboneConfig) -> nn.Module:
    options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    if config.name.startswith("swin"):
        options["strict_img_size"] = False  # any size of image, padded to windows
    try:
        return timm.create_model(
            config.name, pretrained=config.weights == "hub", features_only=True, out_indices=config.out_indices, **options
        )
    except Exception as error:
        if not timm.is_model(config.name.split(".")[0]):
            close = ", ".join(timm.list_models(f"*{config.name.split('.')[0][:6]}*")[:8])
            raise ValueError(f"backbone.name = {config.name!r} is no model of timm; there are {close or 'none like it'}") from error
        if config.weights == "hub":
            raise ValueError(
                f"the ImageNet weights of {config.name} could not be fetched ({type(error).__name__}: {error}). Without a network: set"
                " detector.backbone.weights to a local .safetensors or .pth file, or to none to start from random weights"
            ) from error
        raise ValueError(f"timm cannot build {config.name} with backbone.out_indices = {config.out_indices}: {error}") from error


def load_backbone(body: nn.Module, path: Path) -> None:
    """Weights in timm's or torchvision's naming into a feature model; the classifier's are left out.

    Raises:
        ValueError: no such file, or keys are missing or left over; lists them.
    """
    if not path.exists():
        raise ValueError(f"backbone.weights = {str(path)!r}: there is no such file; or did you mean hub or none?")
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state)
    own = body.state_dict()
    renamed = {_feature_name(key, own): value for key, value in state.items()}
    dropped = ("fc.", "head.", "classifier.", "conv_head.", "bn2.", "norm.")
    left = [key for key in renamed if key not in own and not key.startswith(dropped) and not _is_unused_stage(key, own)]
    missing = [key for key in own if key not in renamed and not key.endswith("num_batches_tracked")]
    if left or missing:
        raise ValueError(f"{path} does not fit backbone {type(body).__name__}: missing {missing[:20]}, left over {left[:20]}")
    body.load_state_dict({key: value for key, value in renamed.items() if key in own}, strict=False)


def _feature_name(key: str, own: dict[str, Tensor]) -> str:
    """timm's feature models of staged transformers call `layers.0` `layers_0`."""
    flat = key.replace("layers.", "layers_", 1)
    return flat if key not in own and flat in own else key


def _is_unused_stage(key: str, own: dict[str, Tensor]) -> bool:
    """A stage after the last map that is taken has no place in the feature model."""
    stage = key.split(".")[0]
    return stage.rstrip("0123456789") in ("layer", "layers_") and not any(name.startswith(f"{stage}.") for name in own)


class FrozenBatchNorm(nn.Module):
    """Batch norm as a fixed affine map; nothing in it is trained."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)


class FrozenBatchNormAct(FrozenBatchNorm):
    """With the activation that timm folds into some of its norms."""

    def __init__(self, norm: Any) -> None:
        super().__init__(norm)
        self.drop: nn.Module = norm.drop
        self.act: nn.Module = norm.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every batch norm below `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNormAct(child) if hasattr(child, "act") else FrozenBatchNorm(child))
        else:
            freeze_batch_norm(child)


def frozen_parameters(body: nn.Module, stages: int) -> list[nn.Parameter]:
    """Those of the stem (everything before the first stage) and of the first `stages` stages."""
    if stages <= 0:
        return []
    names = [name for name, _ in body.named_children()]
    first = next((i for i, name in enumerate(names) if name.rstrip("0123456789").rstrip("_") in ("layer", "layers", "stages", "blocks")), 0)
    staged = [child for name, child in body.named_children()][first:]
    blocks = list(staged[0]) if isinstance(staged[0], (nn.Sequential, nn.ModuleList)) and names[first] in ("blocks", "stages") else staged
    kept = [child for _, child in list(body.named_children())[:first]] + list(blocks[:stages])
    return [parameter for child in kept for parameter in child.parameters()]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; starts as the shortcut alone, because its last norm starts at zero."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class SmallBackbone(nn.Module):
    def __init__(self, config: SmallBackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(nn.Conv2d(3, config.stem, 3, 2, 1, bias=False), nn.BatchNorm2d(config.stem), nn.ReLU())
        widths = (config.stem, *config.channels)
        self.stages = nn.ModuleList(BasicBlock(a, b, 2) for a, b in itertools.pairwise(widths))
        self.channels, self.strides = list(config.channels[1:]), [8, 16, 32]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.stem(pixels)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]
