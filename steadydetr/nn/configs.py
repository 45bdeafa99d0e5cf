"""What backbones are built from, and what another project's file tells of its backbone. `nn/backbone.py` has the modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from steadydetr.config import check_within
from steadydetr.kinds import changeable, register
from steadydetr.nn.named_tensors import NamedTensors

if TYPE_CHECKING:
    from steadydetr.nn.backbone import Backbone, SmallBackbone, TimmBackbone

MOST_CHANNELS = (1, 1024)  # of images
Channels = tuple[float, float, float]  # a value each of red, green and blue
IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)  # of pixels in 0..1
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)
FusionKind = Literal["none", "simple", "u_like", "dense", "dense_simple"]


class BackboneConfig(ABC):
    """What a detector's backbone is built from: a frozen dataclass."""

    image_channels: int = 3  # 1: grey, 3: RGB, 4: RGBA; others need a data layout that gives images of so many channels

    @abstractmethod
    def build(self) -> Backbone:
        """The module, with its start weights."""

    def without_pretrained(self) -> BackboneConfig:
        """The same backbone with random weights: nothing is fetched, because other weights are about to be loaded."""
        return self

    def settled(self) -> BackboneConfig:
        """The same backbone, with values for what it would look up elsewhere: what is saved of it then means the same for good."""
        return self


def check_output_stride(stride: int) -> None:
    """Raise ValueError unless a backbone may end with that stride."""
    if stride not in (8, 16, 32):
        raise ValueError(f"detector.backbone.output_stride = {stride} must be 8, 16 or 32")


@register("timm-backbone", "timm", "timm-backbone", "backbone")
@dataclass(frozen=True)
class TimmBackboneConfig(BackboneConfig):
    """A timm model. Defaults: ResNet-50 of ImageNet as DETRs train it, stem and first stage frozen, frozen batch norm."""

    name: str = "resnet50.tv_in1k"  # any timm model with features: resnet18, mobilenetv2_100, swin_large_patch4_window12_384, ...
    out_indices: tuple[int, ...] = (2, 3, 4)  # which of timm's feature maps, fine to coarse; Swin's are 0..3
    # "hub": ImageNet weights by way of timm; "none": random; else the path of a .safetensors or .pth file, or an installed package
    weights: str = changeable("hub")
    frozen_stages: int = 1  # 0: nothing; n: the stem and the first n stages
    freeze_norm: bool = True  # batch norm with fixed statistics, scale and shift
    output_stride: int = 32  # 16: the last stage keeps the size of its input and dilates its convolutions (DC5), where the model can
    drop_path: float = 0.0  # stochastic depth, where the model has it
    output_norm: bool = False  # LayerNorm of every map, as in the originals with Swin
    image_channels: int = 3  # 1: grey, 3: RGB, 4: RGBA; RGB weights are summed for 1, repeated and scaled for others, as in timm
    mean: Channels | None = None  # of pixels in 0..1, taken from them; None: as timm's weights of that name were trained
    std: Channels | None = None  # by which they are then divided
    train_affine: bool = False  # with freeze_norm: train scale and shift, of stages that are not frozen, and fix the statistics alone

    def __post_init__(self) -> None:
        check_within("detector.backbone", self, drop_path=(0, 1), image_channels=MOST_CHANNELS)
        check_output_stride(self.output_stride)
        for name, least in (("mean", -1e3), ("std", 1e-3)):
            if not all(least <= value <= 1e3 for value in getattr(self, name) or ()):
                raise ValueError(f"detector.backbone.{name} = {getattr(self, name)} must be three numbers in {least} .. 1000")

    def build(self) -> TimmBackbone:
        from steadydetr.nn.backbone import TimmBackbone

        return TimmBackbone(self)

    def without_pretrained(self) -> TimmBackboneConfig:
        return replace(self, weights="none")

    def settled(self) -> TimmBackboneConfig:
        """With the mean and deviation of timm's own config of the model. A ValueError where timm has no such model."""
        if self.mean is not None and self.std is not None:
            return self
        from steadydetr.nn.backbone import trained_statistics

        mean, std = trained_statistics(self.name)
        return replace(self, mean=self.mean or mean, std=self.std or std)


@register("small-backbone")
@dataclass(frozen=True)
class SmallBackboneConfig(BackboneConfig):
    """One basic residual block a stage, trained from scratch with its own batch norm; maps of stride 8, 16, 32, and perhaps 4."""

    stem: int = 32
    channels: tuple[int, ...] = (48, 96, 160, 192)  # of strides 4, 8, 16, 32
    image_channels: int = 3  # 1: grey, 3: RGB, 4: RGBA
    output_stride: int = 32  # 16: the last stage keeps the size of its input and dilates its convolutions (DC5); 8: the last two
    fine_map: bool = False  # the map of stride 4 is given too

    def __post_init__(self) -> None:
        check_output_stride(self.output_stride)
        check_within("detector.backbone", self, stem=(1, 2**14), image_channels=MOST_CHANNELS)
        if len(self.channels) != 4 or not all(1 <= channels <= 2**14 for channels in self.channels):
            raise ValueError(f"detector.backbone.channels = {self.channels[:9]} must be four numbers in 1 .. {2**14}")

    def build(self) -> SmallBackbone:
        from steadydetr.nn.backbone import SmallBackbone

        return SmallBackbone(self)


RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101", (36, True): "resnet152"}

SWINS = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}  # by the width and the blocks of the third stage

SWIN_IMAGES = {7: 224, 12: 384}  # by the window's side; part of timm's names


def infer_backbone(tensors: NamedTensors, last: bool = False) -> TimmBackboneConfig:
    """The ResNet or Swin in another project's file. Its weights are random, because the file brings them.

    Detectors of other projects are trained on pixels with ImageNet's mean and deviation, whatever their backbones were trained on before.
    A file without a backbone is taken for one of a ResNet-50, as those of tests are.

    Args:
        last: the detector takes the last map alone, not one for every convolution of a neck.

    Raises:
        ValueError: no model of timm has these numbers of blocks or channels; says which.
    """
    maps = 1 if last else sum(1 for name in tensors.matching(r"neck\.convs\.\d+\.weight") if tensors.shape(name)[-1] == 1)
    stride = tensors.untraced.output_stride
    if tensors.has("backbone.body.layers_"):
        indices = tuple(range(4 - maps, 4))
        return TimmBackboneConfig(_swin_name(tensors), indices, "none", 0, output_norm=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    blocks = tensors.count("backbone.body.layer3")
    resnet = (blocks, any(".conv3." in name for name in tensors.names("backbone.body.")))
    if blocks and resnet not in RESNETS:
        raise ValueError(f"no known ResNet has {blocks} blocks in its third stage")
    name = f"{RESNETS.get(resnet, 'resnet50')}.tv_in1k"
    indices = tuple(range(5 - maps, 5))
    return TimmBackboneConfig(name, indices, weights="none", output_stride=stride, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _swin_name(tensors: NamedTensors) -> str:
    """timm's name of a Swin transformer. The table of relative positions has a row for every offset within a window, (2 side - 1)^2."""
    table = tensors.shape("backbone.body.layers_0.blocks.0.attn.relative_position_bias_table")
    window = (int(table[0] ** 0.5) + 1) // 2
    width, blocks = tensors.shape("backbone.body.patch_embed.proj.weight")[0], tensors.count("backbone.body.layers_2.blocks")
    if (width, blocks) not in SWINS or window not in SWIN_IMAGES:
        raise ValueError(f"no known Swin has width {width}, {blocks} blocks in its third stage and windows of {window}")
    return f"swin_{SWINS[width, blocks]}_patch4_window{window}_{SWIN_IMAGES[window]}"
