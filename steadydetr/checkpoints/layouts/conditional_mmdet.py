"""Conditional DETR in mmdet 3, where encoder and decoder stand beside the backbone, and the first layers of the box head are an FFN."""

from __future__ import annotations

from steadydetr.checkpoints.layouts.base import COUNTERS, KeyLayout, Table
from steadydetr.checkpoints.layouts.mmdet import BACKBONE

PROJECTIONS = {
    "qcontent_proj": "query_content",
    "qpos_proj": "query_position",
    "qpos_sine_proj": "query_sine",
    "kcontent_proj": "key_content",
    "kpos_proj": "key_position",
    "v_proj": "value",
    "out_proj": "out_proj",
}
TRANSFORMER: Table = (
    (r"(encoder\.layers\.\d+)\.self_attn\.attn\.(.+)", r"\1.self_attention.\2"),
    *(
        (rf"(decoder\.layers\.\d+)\.{theirs_part}\.{theirs}\.(.+)", rf"\1.{part}.{ours}.\2")
        for theirs_part, part in (("self_attn", "self_attention"), ("cross_attn", "cross_attention"))
        for theirs, ours in PROJECTIONS.items()
    ),
    (r"(encoder\.layers\.\d+)\.norms\.0\.(.+)", r"\1.norm.\2"),
    (r"(encoder\.layers\.\d+)\.norms\.1\.(.+)", r"\1.ffn.norm.\2"),
    (r"(decoder\.layers\.\d+)\.norms\.0\.(.+)", r"\1.self_norm.\2"),
    (r"(decoder\.layers\.\d+)\.norms\.1\.(.+)", r"\1.cross_norm.\2"),
    (r"(decoder\.layers\.\d+)\.norms\.2\.(.+)", r"\1.ffn.norm.\2"),
    (r"((?:en|de)coder\.layers\.\d+)\.ffn\.layers\.0\.0\.(.+)", r"\1.ffn.linear1.\2"),
    (r"((?:en|de)coder\.layers\.\d+)\.ffn\.layers\.1\.(.+)", r"\1.ffn.linear2.\2"),
    (r"decoder\.post_norm\.(.+)", r"decoder.norm.\1"),
    (r"decoder\.query_scale\.(.+)", r"decoder.sine_scale.\1"),
    (r"decoder\.ref_point_head\.(.+)", r"query_reference.\1"),
)
REST: Table = (
    (r"neck\.convs\.0\.conv\.(.+)", r"neck.\1"),
    (r"query_embedding\.weight", "query_position.weight"),
    (r"bbox_head\.fc_cls\.(.+)", r"class_heads.0.\1"),
    (r"bbox_head\.reg_ffn\.layers\.0\.0\.(.+)", r"box_heads.0.layers.0.\1"),
    (r"bbox_head\.reg_ffn\.layers\.1\.(.+)", r"box_heads.0.layers.1.\1"),
    (r"bbox_head\.fc_reg\.(.+)", r"box_heads.0.layers.2.\1"),
)

LAYOUT = KeyLayout(
    name="conditional detr of mmdet 3",
    mark=r"decoder\.layers\.\d+\.cross_attn\.qcontent_proj\..+",
    table=(*COUNTERS, *BACKBONE, *TRANSFORMER, *REST),
    described="Conditional DETR (mmdet 3)",
    heads=(),
    tied_heads_once=True,
)
