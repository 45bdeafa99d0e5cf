"""What Deformable DETR, DAB-Deformable-DETR and DINO have in common: backbone to memory, and the decoder's loop.

Each of them adds its queries, its position vectors and whether and how references are refined.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steadydetr.boxes import inverse_sigmoid
from steadydetr.detectors.base import Detector
from steadydetr.detectors.query_groups import Joined, join
from steadydetr.nn.attention import SelfAttention
from steadydetr.nn.decoder import AnchorPosition, DecoderLayer
from steadydetr.nn.deformable_attention import DeformableAttention
from steadydetr.nn.encoder import Encoder, EncoderLayer, FusionKind
from steadydetr.nn.layers import MLP, Neck, box_head, class_head
from steadydetr.nn.positions import feature_position
from steadydetr.structures import DenseProposals, Memory, Queries, QueryGroup, Stages


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the deformable encoder and decoder; defaults: Deformable DETR's."""

    width: int = 256
    heads: int = 8
    ffn: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    levels: int = 4  # feature levels; more than the backbone's maps adds strided convolutions
    encoder_points: int = 4
    decoder_points: int = 4
    dropout: float = 0.1
    temperature: float = 10000.0  # of the sine position of feature maps; 20 in DINO
    position_offset: float = -0.5  # 0 in DINO
    norm_groups: int = 32  # of the neck's GroupNorm; divides width
    neck_bias: bool = True  # of the convolutions before GroupNorm; False in mmdet
    fusion: FusionKind = "none"  # of the memory with what went into the encoder (Stable-DINO Sec. 3)
    fusion_norm: bool = True  # LayerNorm after each fusion
    share_decoder: bool = False  # one set of parameters, heads included, for all decoder stages
    checkpointing: bool = False  # recompute layers in the backward pass: less memory, same gradients

    def __post_init__(self) -> None:
        for name, divisor in (("heads", self.heads), ("norm_groups", self.norm_groups)):
            if self.width % divisor:
                raise ValueError(f"transformer.width = {self.width} is no multiple of transformer.{name} = {divisor}")
        if self.width % 4:
            raise ValueError(f"transformer.width = {self.width} is no multiple of 4, which sine positions need")
        if self.fusion != "none" and not self.encoder_layers:
            raise ValueError(f"transformer.fusion = {self.fusion} needs an encoder, but transformer.encoder_layers is 0")


SMALL = -2.0  # logit of a side: without proposals a box starts small, not at half the image


class Decoder(nn.Module):
    """Layers, heads and position of the decoder; shared parameters are lists of one."""

    def __init__(
        self,
        config: TransformerConfig,
        num_classes: int,
        position: AnchorPosition | None,
        norm: bool,
        share_heads: bool,
    ) -> None:
        super().__init__()
        c = config
        layers = 1 if c.share_decoder else c.decoder_layers
        heads = 1 if c.share_decoder or share_heads else c.decoder_layers
        self.stages = c.decoder_layers
        self.layers = nn.ModuleList(DecoderLayer(c.width, c.heads, c.levels, c.decoder_points, c.ffn, c.dropout) for _ in range(layers))
        self.position = position
        self.norm = nn.LayerNorm(c.width) if norm else None
        self.class_heads = nn.ModuleList(class_head(c.width, num_classes) for _ in range(heads))
        self.box_heads = nn.ModuleList(box_head(c.width) for _ in range(heads))


class DeformableDetector(Detector):
    """Backbone, neck and deformable encoder; a decoder loop that its subclasses steer by class attributes and config."""

    refine: bool  # each stage refines the reference of the next
    look_forward_twice: bool  # a box also teaches the stage before, whose reference it starts from
    eps: float  # of the inverse sigmoid
    start_size = 0.0  # logit of the sides of a box whose reference has none, before the box head adds to it

    def __init__(
        self,
        backbone: BackboneConfig,
        config: TransformerConfig,
        num_classes: int,
        decoder: Decoder,
    ) -> None:
        super().__init__()
        self.transformer, self.num_classes = config, num_classes
        self.width, self.stages = config.width, config.decoder_layers
        self.backbone = backbone.build()
        maps = self.backbone.strides[: config.levels]
        self.strides = (*maps, *(maps[-1] * 2**k for k in range(1, config.levels - len(maps) + 1)))
        self.neck = Neck(self.backbone.channels, config.width, config.levels, config.norm_groups, config.neck_bias)
        self.level_embed = nn.Parameter(torch.randn(config.levels, config.width))
        c = config
        self.encoder = Encoder(
            lambda: EncoderLayer(c.width, c.heads, c.levels, c.encoder_points, c.ffn, c.dropout),
            c.encoder_layers,
            c.width,
            c.fusion,
            c.fusion_norm,
            c.checkpointing,
        )
        self.decoder = decoder
        initialise(self.encoder)
        initialise(self.decoder.layers)
        if self.decoder.position is not None:
            initialise(self.decoder.position)

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        maps = self.neck(self.backbone(self.normalise(images, padding)))
        levels = tuple((m.shape[-2], m.shape[-1]) for m in maps)
        masks = [resize_padding(padding, size) for size in levels]
        c = self.transformer
        position = [
            feature_position(mask, c.width, c.temperature, c.position_offset, m.dtype).flatten(1, 2) + self.level_embed[level]
            for level, (mask, m) in enumerate(zip(masks, maps, strict=True))
        ]
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        flat_padding = torch.cat([mask.flatten(1) for mask in masks], 1)
        valid_ratios = torch.stack([valid_ratio(mask) for mask in masks], 1)
        encoded = self.encoder(tokens, torch.cat(position, 1).to(tokens.dtype), flat_padding, valid_ratios, levels)
        return self.with_proposals(Memory(encoded, flat_padding, levels, valid_ratios, tokens))

    def with_proposals(self, memory: Memory) -> Memory:
        """Two-stage detectors add `memory.dense`."""
        return memory

    @abstractmethod
    def embed(self, labels: Tensor, boxes: Tensor) -> Queries: ...

    def keep_classes(self, classes: Sequence[int]) -> None:
        rows = list(classes)
        for head in self.decoder.class_heads:
            assert isinstance(head, nn.Linear)
            head.weight, head.bias = nn.Parameter(head.weight[rows].detach()), nn.Parameter(head.bias[rows].detach())
            head.out_features = len(rows)
        self.num_classes = len(rows)

    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, Stages]:
        joined = join(groups)
        return joined.split(self._run(memory, joined))

    def _run(self, memory: Memory, joined: Joined) -> Stages:
        """The stages one after the other; class scores of all stages at the end.

        DINO refines from raw content and emits from normalised content. `base` is what the emitted box is added to: with
        look forward twice it is the undetached reference, so that a stage's box loss also teaches the stage before.
        """
        decoder, content = self.decoder, joined.content
        reference = base = joined.reference
        sized = joined.sized
        contents, emitted, boxes, references = [], [], [], []
        for stage in range(decoder.stages):
            content = self._layer(stage, content, reference, sized, memory, joined)
            shown = content if decoder.norm is None else decoder.norm(content)
            head = decoder.box_heads[stage % len(decoder.box_heads)]
            delta = head(shown)
            contents.append(content)
            emitted.append(shown)
            references.append(base)
            boxes.append(shift(delta, base, sized, self.eps, self.start_size))
            if self.refine:
                refined = shift(delta if shown is content else head(content), reference, sized, self.eps, self.start_size)
                reference = refined.detach()
                base = refined if self.look_forward_twice else reference
                sized = True
        return Stages(self._classify(emitted), torch.stack(boxes), torch.stack(contents), torch.stack(references))

    def _layer(self, stage: int, content: Tensor, reference: Tensor, sized: bool | Tensor, memory: Memory, joined: Joined) -> Tensor:
        decoder = self.decoder
        ratios = torch.cat((memory.valid_ratios, memory.valid_ratios), -1)
        by_level = reference[:, :, None] * ratios[:, None]
        position = joined.position if decoder.position is None else decoder.position(stage, content, by_level[:, :, 0])
        if position is None:
            raise ValueError(f"{type(self).__name__} makes no position vectors of its own: every group must bring its queries' position")
        layer = decoder.layers[stage % len(decoder.layers)]
        arguments = (content, position, by_level, sized, memory.tokens, memory.padding, memory.levels, joined.plan)
        if self.transformer.checkpointing and self.training:
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def _classify(self, emitted: list[Tensor]) -> Tensor:
        heads = self.decoder.class_heads
        if len(heads) == 1:
            return heads[0](torch.stack(emitted))
        return torch.stack([head(shown) for head, shown in zip(heads, emitted, strict=True)])


def shift(delta: Tensor, base: Tensor, sized: bool | Tensor, eps: float, start_size: float = 0.0) -> Tensor:
    """The box that `delta` [B, N, 4] (logits) makes of `base`; where the base has no size, of `start_size` (a logit)."""
    start = inverse_sigmoid(base, eps)
    if sized is False:
        start = torch.cat((start[..., :2], torch.full_like(start[..., 2:], start_size)), -1)
    elif sized is not True:
        start = torch.cat((start[..., :2], torch.where(sized[:, None], start[..., 2:], start_size)), -1)
    return (delta + start).sigmoid()


def resize_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest interpolation of the pixel mask [B, H, W] to a level [B, h, w] (F-04)."""
    return nn.functional.interpolate(padding[:, None].float(), size=size)[:, 0].to(torch.bool)


def valid_ratio(padding: Tensor) -> Tensor:
    """[B, h, w] -> [B, 2] (w, h): the share of the first row and column that is image (F-05).

    float32 whatever the tokens are, and with it all geometry made from it: bfloat16 cannot even count the cells of a row,
    and the originals do so in their float64 runs too.
    """
    height, width = padding.shape[1:]
    return torch.stack(((~padding[:, 0, :]).sum(1).float() / width, (~padding[:, :, 0]).sum(1).float() / height), -1)


def initialise(module: nn.Module) -> None:
    """xavier_uniform on every weight matrix of a transformer part; attention parts keep their own rules (F-12, F-27)."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
    for part in module.modules():
        if isinstance(part, DeformableAttention):
            part.reset_parameters()
        elif isinstance(part, SelfAttention):
            nn.init.xavier_uniform_(part.in_proj_weight)


class ProposalHead(nn.Module):
    """The encoder's own predictions: every token proposes a box around its cell (Deformable DETR A.4)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.project.weight)
        self.class_head = class_head(dim, num_classes)
        self.box_head: MLP = box_head(dim)

    def forward(self, memory: Memory) -> DenseProposals:
        anchors, usable = token_anchors(memory)
        content = self.norm(self.project(memory.tokens.masked_fill(~usable[..., None], 0)))
        # float32: rounding to bfloat16 alone shuffles the ranks that the selection goes by
        with torch.autocast(content.device.type, enabled=False):
            logits = self.class_head(content.to(self.class_head.weight.dtype))
        unsigmoid = torch.log(anchors / (1 - anchors)).masked_fill(~usable[..., None], torch.inf)
        boxes = self.box_head(content) + unsigmoid
        return DenseProposals(logits, boxes, unsigmoid.sigmoid(), content)


def token_anchors(memory: Memory) -> tuple[Tensor, Tensor]:
    """The box that each token starts from [B, L, 4], sides 0.05 * 2^level, and whether it may be used [B, L].

    Unusable are padded tokens and anchors with any coordinate outside (0.01, 0.99) (F-13).
    """
    start, boxes = 0, []
    dtype = memory.valid_ratios.dtype
    for level, (height, width) in enumerate(memory.levels):
        padding = memory.padding[:, start : start + height * width].view(-1, height, width)
        start += height * width
        valid = torch.stack(((~padding[:, 0, :]).sum(1), (~padding[:, :, 0]).sum(1)), -1).to(dtype)
        y, x = torch.meshgrid(
            torch.arange(height, device=valid.device, dtype=dtype), torch.arange(width, device=valid.device, dtype=dtype), indexing="ij"
        )
        centres = (torch.stack((x, y), -1).flatten(0, 1) + 0.5) / valid[:, None]
        boxes.append(torch.cat((centres, torch.full_like(centres, 0.05 * 2.0**level)), -1))
    anchors = torch.cat(boxes, 1)
    return anchors, ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding


def take(tensor: Tensor, token: Tensor) -> Tensor:
    """Rows [B, K] of [B, L, D] -> [B, K, D]."""
    return tensor.gather(1, token[..., None].expand(-1, -1, tensor.shape[-1]))


def selected_proposals(dense: DenseProposals, token: Tensor) -> Stages:
    """The proposals that became queries, as one stage (DINO, DAB-Deformable-DETR: supervised with true labels)."""
    return Stages(take(dense.logits, token)[None], take(dense.boxes_unsigmoid, token).sigmoid()[None])
