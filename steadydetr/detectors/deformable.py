"""What the detectors with deformable attention have in common: from the image to the memory, and the decoder's loop.

Each of them adds its queries, its position vectors and whether and how references are refined.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steadydetr.boxes import shift
from steadydetr.detectors.base import Detector
from steadydetr.detectors.configs.deformable import DeformableDetectorConfig, TransformerConfig
from steadydetr.detectors.query_groups import Joined, join_groups
from steadydetr.nn.anchors import token_anchors
from steadydetr.nn.configs import BackboneConfig
from steadydetr.nn.decoder import AnchorPosition, DecoderLayer
from steadydetr.nn.encoder import Encoder, EncoderLayer
from steadydetr.nn.initialisation import initialise
from steadydetr.nn.layers import MLP, Neck, box_head, class_head, keep_outputs
from steadydetr.nn.padding import resize_padding as resize_padding  # a detector of another package imports both from here
from steadydetr.nn.padding import valid_ratio as valid_ratio
from steadydetr.nn.positions import feature_position
from steadydetr.structures import (
    DecodedStages,
    DenseProposals,
    Memory,
    Queries,
    QueryGroup,
    Stages,
    TwoStageMemory,
    dense_proposals,
    take_rows,
    without_autocast,
)

START_SIZE = -2.0  # logit of the sides that a box starts from where there are no proposals; 0 would be half the image


class Decoder(nn.Module):
    """Layers, heads and position vectors of the decoder. What all stages share is a list of one."""

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

    def start_small(self) -> None:
        """Boxes of the first stage start with sides of `START_SIZE`."""
        with torch.no_grad():
            cast(MLP, self.box_heads[0]).output.bias[2:] = START_SIZE


class DeformableDetector(Detector):
    """Backbone, neck and deformable encoder, and a decoder loop that its subclasses steer by class attributes and config."""

    refine: bool  # each stage refines the reference of the next
    look_forward_twice: bool  # the gradient of a box also reaches the stage before, through the reference that it starts from
    eps: float  # of the inverse sigmoid
    samples_points = True
    makes_queries = True
    start_size = 0.0  # logit of the sides of a box whose reference has none, before the box head adds to it
    config: DeformableDetectorConfig

    def __init__(
        self,
        backbone: BackboneConfig,
        config: TransformerConfig,
        num_classes: int,
        decoder: Decoder,
        first_map: int = 0,
        encoder_ffn: int | None = None,
    ) -> None:
        """
        Args:
            first_map: of those of the backbone that the encoder gets.
            encoder_ffn: None: that of the config, as in the decoder.
        """
        super().__init__()
        self.transformer, self.num_classes = config, num_classes
        self.width, self.stages = config.width, config.decoder_layers
        self.backbone = backbone.build()
        self.normalise_for(self.backbone)
        self.take_channels(getattr(backbone, "image_channels", 3))
        maps = self.backbone.strides[first_map:][: config.levels]
        if len(set(maps)) < len(maps):
            raise ValueError(f"the backbone's maps have strides {maps}: levels of one stride would be mixed up, so name one by out_indices")
        self.strides = (*maps, *(maps[-1] * 2**k for k in range(1, config.levels - len(maps) + 1)))
        self.neck = Neck(self.backbone.channels[first_map:], config.width, config.levels, config.norm_groups, config.neck_bias)
        self.level_embed = nn.Parameter(torch.randn(config.levels, config.width))
        c, ffn = config, encoder_ffn or config.ffn
        self.encoder = Encoder(
            lambda: EncoderLayer(c.width, c.heads, c.levels, c.encoder_points, ffn, c.dropout),
            c.encoder_layers,
            c.width,
            c.fusion,
            c.fusion_norm,
            c.checkpointing,
        )
        self.decoder = decoder
        self.proposal_head: TokenProjection | None = None  # two-stage detectors make one
        initialise(self.encoder)
        initialise(self.decoder.layers)
        if self.decoder.position is not None:
            initialise(self.decoder.position)

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        memory = self.encode_maps(self.backbone(self.normalise(images, padding)), padding)
        return memory if self.proposal_head is None else self.with_proposals(memory, self.proposal_head)

    def encode_maps(self, maps: list[Tensor], padding: Tensor) -> Memory:
        """Maps of the backbone, fine to coarse, through the neck and the encoder."""
        maps = self.neck(maps)
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
        return Memory(encoded, flat_padding, levels, valid_ratios, tokens)

    def with_proposals(self, memory: Memory, head: TokenProjection) -> TwoStageMemory:
        """The memory with what a proposal head predicts for every token."""
        return TwoStageMemory.of(memory, head(memory))

    @abstractmethod
    def query_parts(self, count: int) -> dict[str, nn.Module]:
        """New modules with start weights that a group of so many queries has for itself, by the names of the detector's own."""

    @abstractmethod
    def queries_of(self, memory: Memory, parts: Mapping[str, Any], ranks: slice) -> Queries:
        """The queries that are made of such modules. A two-stage detector makes them of the tokens of these ranks."""

    def add_query_parts(self) -> None:
        """Make the detector's own."""
        for name, part in self.query_parts(self.config.queries).items():
            setattr(self, name, part)

    def queries(self, memory: Memory) -> dict[str, Queries]:
        return {"main": self.queries_of(memory, dict(self.named_children()), slice(self.config.queries))}

    def new_queries(self, count: int | None = None) -> nn.ModuleDict:
        """A group like its own has a proposal head too; by a shared one all groups would have the same boxes."""
        parts = self.query_parts(self.config.queries if count is None else count)
        if count is not None:
            parts.pop("proposal_head", None)
        return nn.ModuleDict(parts)

    def further_queries(self, memory: Memory, parts: nn.Module, count: int | None = None) -> tuple[Queries, Stages | None]:
        own, modules = self.config.queries, dict(parts.named_children())
        if count is not None:
            return self.queries_of(memory, modules, slice(own, own + count)), None
        if "proposal_head" in modules:
            memory = self.with_proposals(memory, cast(TokenProjection, modules["proposal_head"]))
        queries = self.queries_of(memory, modules, slice(own))
        return queries, self.proposals(memory, queries)

    def proposals(self, memory: Memory, queries: Queries) -> Stages | None:
        """Those that the queries come from, which are supervised with true labels."""
        if queries.token is None:
            return None
        dense = dense_proposals(memory)
        logits, boxes = (take_rows(values, queries.token) for values in (dense.logits, dense.boxes_unsigmoid))
        return Stages(logits[None], boxes.sigmoid()[None])

    @contextmanager
    def record_sampling_points(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        found: list[tuple[Tensor, Tensor]] = []

        def record(attention: Any, arguments: tuple[Any, ...]) -> None:
            query, reference, sized, _, levels = arguments
            found.append(attention.sampling_points(query, reference, sized, levels))

        hooks = [layer.cross_attention.register_forward_pre_hook(record) for layer in cast("list[DecoderLayer]", list(self.decoder.layers))]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def compiled_parts(self) -> Iterator[nn.Module]:
        """Every layer of encoder and decoder."""
        return (module for module in self.modules() if isinstance(module, (EncoderLayer, DecoderLayer)))

    def keep_classes(self, classes: Sequence[int]) -> None:
        for head in self.decoder.class_heads:
            keep_outputs(cast(nn.Linear, head), classes)
        self.num_classes = len(classes)

    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, DecodedStages]:
        joined = join_groups(groups)
        return joined.split(self._run(memory, joined))

    def _run(self, memory: Memory, joined: Joined) -> DecodedStages:
        """The stages one after the other; class scores of all stages at the end.

        DINO refines the reference from the raw content, but predicts from the normalised content. `base` is what the predicted box is
        added to. With look forward twice it is the reference with its gradient, so that a box loss also trains the stage before.
        """
        decoder, content = self.decoder, joined.content
        reference = base = joined.reference
        sized = joined.sized
        contents, predicted, boxes, references = [], [], [], []
        for stage in range(decoder.stages):
            content = self._layer(stage, content, reference, sized, memory, joined)
            normalised = content if decoder.norm is None else decoder.norm(content)
            head = decoder.box_heads[stage % len(decoder.box_heads)]
            delta = head(normalised)
            contents.append(content)
            predicted.append(normalised)
            references.append(base)
            boxes.append(shift(delta, base, sized, self.eps, self.start_size))
            if self.refine:
                refined = shift(delta if normalised is content else head(content), reference, sized, self.eps, self.start_size)
                reference = refined.detach()
                base = refined if self.look_forward_twice else reference
                sized = True
        stages = DecodedStages(
            self._classify(predicted), torch.stack(boxes), content=torch.stack(contents), reference=torch.stack(references)
        )
        return self._completed(stages, memory, joined)

    def _completed(self, stages: DecodedStages, memory: Memory, joined: Joined) -> DecodedStages:
        """The stages with what a detector predicts besides."""
        return stages

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

    def _classify(self, contents: list[Tensor]) -> Tensor:
        heads = self.decoder.class_heads
        if len(heads) == 1:
            return heads[0](torch.stack(contents))
        return torch.stack([head(content) for head, content in zip(heads, contents, strict=True)])


class TokenProjection(nn.Module):
    """What an encoder makes proposals of: every token proposes a box around its cell (Deformable DETR A.4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.project.weight)

    def propose(self, memory: Memory, class_head: nn.Linear, box_head: MLP, coarse_anchors_first: bool = False) -> DenseProposals:
        """The predictions of these heads; `coarse_anchors_first` as in `token_anchors`."""
        anchors, usable = token_anchors(memory, coarse_anchors_first)
        content = self.norm(self.project(memory.tokens.masked_fill(~usable[..., None], 0)))
        # in float32, because rounding to bfloat16 alone would change which tokens are selected
        with without_autocast(content):
            logits = class_head(content.to(class_head.weight.dtype))
        unsigmoid = torch.log(anchors / (1 - anchors)).masked_fill(~usable[..., None], torch.inf)
        boxes = box_head(content) + unsigmoid
        return DenseProposals(logits, boxes, unsigmoid.sigmoid(), content)


class ProposalHead(TokenProjection):
    """With heads of its own."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(dim)
        self.class_head = class_head(dim, num_classes)
        self.box_head: MLP = box_head(dim)

    def forward(self, memory: Memory) -> DenseProposals:
        return self.propose(memory, self.class_head, self.box_head)


def select_tokens(dense: DenseProposals, score: Tensor, ranks: slice) -> tuple[Tensor, Tensor]:
    """The tokens of these ranks by their score [B, L], the best first: token [B, K] and its box as a constant reference [B, K, 4]."""
    tokens = score.shape[1]
    require_tokens(tokens, ranks.start or 0)
    token = score.topk(min(ranks.stop, tokens)).indices[:, ranks]
    return token, take_rows(dense.boxes_unsigmoid, token).detach().sigmoid()


def require_tokens(tokens: int, taken: int) -> None:
    """Raise ValueError where an image of so many tokens has none left for further queries."""
    if tokens <= taken:
        raise ValueError(
            f"an image of {tokens} tokens has none left for further queries beside detector.queries = {taken}:"
            " train on larger images or with fewer queries"
        )
