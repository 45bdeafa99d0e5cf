"""The repositories of Deformable DETR, H-Deformable-DETR and DINO."""

from __future__ import annotations

from steadydetr.checkpoints.layouts.base import COUNTERS, HEADS, NUMBERED_NECK, RESNET, SWIN, KeyLayout, Table

# in the decoder, norm1 follows the cross-attention and norm2 the self-attention
TRANSFORMER: Table = (
    (r"transformer\.level_embed", "level_embed"),
    (r"transformer\.(encoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.attention.\2"),
    (r"transformer\.(encoder\.layers\.\d+)\.norm1\.(.+)", r"\1.norm.\2"),
    (r"transformer\.(encoder\.layers\.\d+)\.norm2\.(.+)", r"\1.ffn.norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.self_attention.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.cross_attn\.(.+)", r"\1.cross_attention.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norm1\.(.+)", r"\1.cross_norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norm2\.(.+)", r"\1.self_norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norm3\.(.+)", r"\1.ffn.norm.\2"),
    (r"transformer\.((?:en|de)coder\.layers\.\d+)\.(linear[12]\..+)", r"\1.ffn.\2"),
)


LAYOUT = KeyLayout(
    name="original",
    mark=r"transformer\.(?:en|de)coder\.layers\.\d+\.(?:self_attn|cross_attn|linear1)\..+",
    table=(*COUNTERS, *RESNET, *SWIN, *NUMBERED_NECK, *TRANSFORMER, *HEADS),
    described="Deformable DETR, H-Deformable-DETR and DINO (their repositories)",
)
