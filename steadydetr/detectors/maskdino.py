"""MaskDINO (Li et al. 2022): DINO with masks, which are products of the queries' vectors with those of pixels at a quarter of the size.

All predictions, those of the encoder's tokens too, come from the same class, box and mask heads. The first stage is predicted from the
queries as they enter the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from steadydetr.boxes import inverse_sigmoid, shift, to_cxcywh
from steadydetr.detectors.configs.maskdino import MaskDINOConfig
from steadydetr.detectors.deformable import Decoder, DeformableDetector, TokenProjection, select_tokens
from steadydetr.detectors.query_groups import Joined
from steadydetr.equations.masks import boxes_of_masks
from steadydetr.nn.decoder import AnchorPosition
from steadydetr.nn.layers import MLP
from steadydetr.nn.padding import resize_padding
from steadydetr.nn.pixels import PixelEmbedding
from steadydetr.structures import (
    DecodedStages,
    MaskMemory,
    MaskPredictions,
    Memory,
    Queries,
    Stages,
    at_least_float32,
    dense_proposals,
    take_rows,
    without_autocast,
)


class MaskDINO(DeformableDetector):
    config: MaskDINOConfig
    refine = True
    look_forward_twice = True
    embeds_labels = True
    label_parameters = ("label_content.weight",)
    predicts_masks = True
    undecoded_stages = 1
    eps = 1e-5

    def __init__(self, config: MaskDINOConfig, num_classes: int) -> None:
        c = config.transformer
        first_level = 0 if config.fine_level else 1  # of the backbone's maps
        decoder = Decoder(c, num_classes, AnchorPosition(c.width, scaled=False), norm=True, share_heads=True)
        super().__init__(config.backbone, c, num_classes, decoder, first_level, config.encoder_ffn)
        self.first_level = first_level
        self.config, self.stages = config, c.decoder_layers + self.undecoded_stages
        self.starts_from_masks = config.box_init != "no"
        self.pixel_embedding = PixelEmbedding(self.backbone.channels[0], c.width, c.norm_groups)
        self.mask_head = MLP(c.width, c.width, c.width, 3)
        self.add_query_parts()
        self.label_content = nn.Embedding(num_classes, c.width)
        self.proposal_classes: nn.Linear | None = None  # the class head of proposals, where the decoder scores other classes
        names = (name for name, _ in self.named_parameters() if name.startswith(("pixel_embedding.", "mask_head.")))
        self.mask_parameters = tuple(names)

    def query_parts(self, count: int) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"proposal_head": TokenProjection(self.width)}
        if self.config.learned_content:
            parts["query_content"] = nn.Embedding(count, self.width)
        return parts

    @property
    def class_head(self) -> nn.Linear:
        return cast(nn.Linear, self.decoder.class_heads[0])

    def encode(self, images: Tensor, padding: Tensor) -> MaskMemory:
        maps = self.backbone(self.normalise(images, padding))
        memory = self.encode_maps(maps[self.first_level :], padding)
        height, width = memory.levels[0]
        finest = memory.tokens[:, : height * width].transpose(1, 2).unflatten(2, (height, width))
        pixels = self.pixel_embedding(maps[0], finest)
        dense = self.propose(memory, cast(TokenProjection, self.proposal_head))
        return MaskMemory(**vars(memory), dense=dense, pixels=pixels, pixel_padding=resize_padding(padding, pixels.shape[-2:]))

    def propose(self, memory: Memory, head: TokenProjection) -> Any:
        """The predictions of the shared heads for every token."""
        classes = self.proposal_classes or self.class_head
        return head.propose(memory, classes, cast(MLP, self.decoder.box_heads[0]), self.config.coarse_anchors_first)

    def with_proposals(self, memory: Memory, head: TokenProjection) -> MaskMemory:
        return replace(cast(MaskMemory, memory), dense=self.propose(memory, head))

    def queries_of(self, memory: Memory, parts: Mapping[str, Any], ranks: slice) -> Queries:
        """The best tokens by their largest class logit; their boxes are those of their masks, if `box_init` says so."""
        dense = dense_proposals(memory)
        token, reference = select_tokens(dense, dense.logits.amax(-1), ranks)
        content = take_rows(dense.content, token).detach()
        if self.config.box_init != "no":
            reference = self.mask_boxes(cast(MaskMemory, memory), content)
        if "query_content" in parts:
            content = parts["query_content"].weight[: token.shape[1]].expand(len(token), -1, -1)
        return Queries(content, reference, token=token)

    @torch.no_grad()
    def mask_boxes(self, memory: MaskMemory, content: Tensor) -> Tensor:
        """The boxes [B, N, 4] around the masks of queries with this content, image by image: masks of all queries are large."""
        inside = ~memory.pixel_padding
        sizes = torch.stack((inside[:, 0].sum(1), inside[:, :, 0].sum(1)), -1).repeat(1, 2)[:, None]
        closed = self.config.box_init == "mask2box"
        with without_autocast(content):
            vectors = self.mask_head(self.decoder_norm(content.to(self.class_head.weight.dtype)))
            products = (of_image @ at_least_float32(pixels).flatten(1) for of_image, pixels in zip(vectors, memory.pixels, strict=True))
            masks = ((p > 0).unflatten(1, i.shape) & i for p, i in zip(products, inside, strict=True))
            corners = torch.stack([boxes_of_masks(of_image, closed) for of_image in masks])
        return inverse_sigmoid(to_cxcywh(corners / sizes).to(vectors.dtype), self.eps).sigmoid()

    def decoder_norm(self, content: Tensor) -> Tensor:
        return cast(nn.LayerNorm, self.decoder.norm)(content)

    def proposals(self, memory: Memory, queries: Queries) -> Stages:
        """Those that the queries come from, predicted as the decoder's stages are."""
        dense, token = dense_proposals(memory), cast(Tensor, queries.token)
        seen = self.decoder_norm(take_rows(dense.content, token))[None]
        boxes = take_rows(dense.boxes_unsigmoid, token).sigmoid()[None]
        return Stages(self.class_head(seen), boxes, masks=self.masks_of(seen, memory))

    def masks_of(self, seen: Tensor, memory: Memory) -> MaskPredictions:
        """The masks of queries with this normalised content, [S, B, N, D]."""
        return MaskPredictions(self.mask_head(seen), cast(MaskMemory, memory).pixels)

    def _classify(self, contents: list[Tensor]) -> Tensor:
        """Classes and masks are predicted from content that is normalised a second time."""
        return self.class_head(self.decoder_norm(torch.stack(contents)))

    def _completed(self, stages: DecodedStages, memory: Memory, joined: Joined) -> DecodedStages:
        """With the stage before the decoder, and with masks."""
        first = self.decoder_norm(joined.content)[None]
        seen = torch.cat((first, self.decoder_norm(self.decoder_norm(stages.content))))
        box = shift(torch.zeros_like(joined.reference), joined.reference, joined.sized, self.eps, self.start_size)
        return DecodedStages(
            torch.cat((self.class_head(first), stages.logits)),
            torch.cat((box[None], stages.boxes)),
            masks=self.masks_of(seen, memory),
            content=torch.cat((joined.content[None], stages.content)),
            reference=torch.cat((joined.reference[None], stages.reference)),
        )

    def embed(self, labels: Tensor, boxes: Tensor) -> Queries:
        reference = inverse_sigmoid(boxes, self.eps).sigmoid()  # never quite 0 or 1
        return Queries(self.label_content(labels), reference)

    def keep_classes(self, classes: Sequence[int]) -> None:
        if self.proposal_classes is None:
            self.proposal_classes = deepcopy(self.class_head)
        super().keep_classes(classes)
