"""Conditional DETR (Meng et al. 2021): one feature level, learned queries whose cross-attention looks around a point of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steadydetr.boxes import shift
from steadydetr.detectors.base import Detector
from steadydetr.detectors.configs.conditional import ConditionalDETRConfig, PlainTransformerConfig
from steadydetr.detectors.query_groups import Joined, join_groups
from steadydetr.nn.conditional import ConditionalDecoderLayer
from steadydetr.nn.encoder import PlainEncoder, PlainEncoderLayer
from steadydetr.nn.initialisation import initialise
from steadydetr.nn.layers import MLP, box_head, class_head, keep_outputs
from steadydetr.nn.padding import resize_padding, valid_ratio
from steadydetr.nn.positions import box_position, feature_position
from steadydetr.structures import DecodedStages, Memory, Queries, QueryGroup, Stages, without_autocast


class ConditionalDecoder(nn.Module):
    """Layers; norm and heads are those of all stages."""

    def __init__(self, config: PlainTransformerConfig, num_classes: int) -> None:
        super().__init__()
        c = config
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(c.width, c.heads, c.ffn, c.dropout, first=stage == 0) for stage in range(c.decoder_layers)
        )
        self.sine_scale = MLP(c.width, c.width, c.width, 2)  # of the content, by which the sine of the reference is multiplied
        self.norm = nn.LayerNorm(c.width)
        self.class_heads = nn.ModuleList([class_head(c.width, num_classes)])
        self.box_heads = nn.ModuleList([box_head(c.width)])


class ConditionalDETR(Detector):
    positioned = True
    makes_references = True
    makes_queries = True
    takes_boxes = False
    eps = 1e-5  # of the inverse sigmoid

    def __init__(self, config: ConditionalDETRConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.transformer, self.num_classes = config, config.transformer, num_classes
        c = config.transformer
        self.width, self.stages = c.width, c.decoder_layers
        self.backbone = config.backbone.build()
        self.normalise_for(self.backbone)
        self.take_channels(config.image_channels)
        self.strides = (self.backbone.strides[-1],)
        self.neck = nn.Conv2d(self.backbone.channels[-1], c.width, 1)
        self.encoder = PlainEncoder(
            lambda: PlainEncoderLayer(c.width, c.heads, c.ffn, c.dropout),
            c.encoder_layers,
            c.width,
            c.fusion,
            c.fusion_norm,
            c.checkpointing,
        )
        self.decoder = ConditionalDecoder(c, num_classes)
        self.query_position = nn.Embedding(config.queries, c.width)
        self.query_reference = MLP(c.width, c.width, 2, 2)
        for part in (self.encoder, self.decoder.layers, self.decoder.sine_scale, self.query_reference):
            initialise(part)

    def encode(self, images: Tensor, padding: Tensor) -> Memory:
        features = self.neck(self.backbone(self.normalise(images, padding))[-1])
        size = (features.shape[-2], features.shape[-1])
        mask, tokens = resize_padding(padding, size), features.flatten(2).transpose(1, 2)
        encoded = self.encoder(tokens, self._position(mask, tokens), mask.flatten(1))
        return Memory(encoded, mask.flatten(1), (size,), valid_ratio(mask)[:, None], tokens)

    def _position(self, mask: Tensor, tokens: Tensor) -> Tensor:
        """The position vectors of all tokens, [B, h, w] -> [B, L, D], of the type of the tokens."""
        c = self.transformer
        return feature_position(mask, c.width, c.temperature, c.position_offset, tokens.dtype).flatten(1, 2)

    def queries(self, memory: Memory) -> dict[str, Queries]:
        return {"main": self._queries_of(memory, self.query_position.weight)}

    def _queries_of(self, memory: Memory, position: Tensor) -> Queries:
        """Content that is empty, position vectors that are learned, and the points that these mean."""
        images = memory.tokens.shape[0]
        position, reference = (tensor.expand(images, -1, -1) for tensor in (position, self.refer(position)))
        return Queries(torch.zeros_like(position), reference, sized=False, position=position)

    def new_queries(self, count: int | None = None) -> nn.ModuleDict:
        """Position vectors; the layer that makes points of them is that of all groups."""
        return nn.ModuleDict({"query_position": nn.Embedding(self.config.queries if count is None else count, self.width)})

    def further_queries(self, memory: Memory, parts: nn.Module, count: int | None = None) -> tuple[Queries, Stages | None]:
        return self._queries_of(memory, cast(nn.Embedding, parts.get_submodule("query_position")).weight), None

    def refer(self, position: Tensor) -> Tensor:
        with without_autocast(position):  # bfloat16 would leave a grid of points
            centre = self.query_reference(position.to(self.query_reference.output.weight.dtype)).sigmoid()
        return torch.cat((centre, torch.zeros_like(centre)), -1)

    def decode(self, memory: Memory, groups: Sequence[QueryGroup]) -> dict[str, DecodedStages]:
        joined = join_groups(groups)
        return joined.split(self._run(memory, joined))

    def _run(self, memory: Memory, joined: Joined) -> DecodedStages:
        """The stages one after the other, then the heads of all. References are those of the start at every stage."""
        decoder, content, position, reference = self.decoder, joined.content, joined.position, joined.reference
        if position is None or joined.sized is not False:
            raise ValueError("every group of a ConditionalDETR must bring its queries' position vectors, and references without a size")
        token_position = self._position(memory.padding.unflatten(1, memory.levels[0]), memory.tokens)
        sine = box_position(reference[..., [1, 0]], self.width // 2).to(position.dtype)
        contents = []
        for stage, layer in enumerate(decoder.layers):
            scaled = sine if stage == 0 else sine * decoder.sine_scale(content)
            arguments = (content, position, scaled, memory.tokens, token_position, memory.padding, joined.plan)
            if self.transformer.checkpointing and self.training:
                content = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                content = layer(*arguments)
            contents.append(content)
        found = torch.stack(contents)
        normalised = decoder.norm(found)
        boxes = shift(decoder.box_heads[0](normalised), reference, False, self.eps)
        return DecodedStages(
            decoder.class_heads[0](normalised), boxes, content=found, reference=reference.expand(len(contents), -1, -1, -1)
        )

    def keep_classes(self, classes: Sequence[int]) -> None:
        keep_outputs(cast(nn.Linear, self.decoder.class_heads[0]), classes)
        self.num_classes = len(classes)

    def compiled_parts(self) -> Iterator[nn.Module]:
        """Every layer of encoder and decoder."""
        return (module for module in self.modules() if isinstance(module, (PlainEncoderLayer, ConditionalDecoderLayer)))
