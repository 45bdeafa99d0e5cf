"""Hugging Face transformers."""

from __future__ import annotations

from steadydetr.checkpoints.layouts.base import COUNTERS, HEADS, NUMBERED_NECK, RESNET, KeyLayout, Table

TRANSFORMER: Table = (
    (r"model\.level_embed", "level_embed"),
    (r"model\.(encoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.attention.\2"),
    (r"model\.(encoder\.layers\.\d+)\.self_attn_layer_norm\.(.+)", r"\1.norm.\2"),
    (r"model\.(decoder\.layers\.\d+)\.self_attn\.([qkv])_proj\.(.+)", r"\1.self_attention.\2_\3"),
    (r"model\.(decoder\.layers\.\d+)\.self_attn\.(?:o|out)_proj\.(.+)", r"\1.self_attention.out_proj.\2"),
    (r"model\.(decoder\.layers\.\d+)\.self_attn_layer_norm\.(.+)", r"\1.self_norm.\2"),
    (r"model\.(decoder\.layers\.\d+)\.encoder_attn\.(.+)", r"\1.cross_attention.\2"),
    (r"model\.(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.(.+)", r"\1.cross_norm.\2"),
    (r"model\.((?:en|de)coder\.layers\.\d+)\.(?:mlp\.)?fc([12])\.(.+)", r"\1.ffn.linear\2.\3"),
    (r"model\.((?:en|de)coder\.layers\.\d+)\.final_layer_norm\.(.+)", r"\1.ffn.norm.\2"),
)

LAYOUT = KeyLayout(
    name="hugging face",
    mark=r"model\.(?:en|de)coder\.layers\.\d+\.(?:self_attn_layer_norm|encoder_attn)\..+",
    table=(*COUNTERS, *RESNET, *NUMBERED_NECK, *TRANSFORMER, *HEADS),
    described="Deformable DETR (Hugging Face)",
    tied_heads_once=True,
)
