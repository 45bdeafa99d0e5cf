"""The repository of Conditional DETR, whose names Hugging Face transformers had up to version 4."""

from __future__ import annotations

from steadydetr.checkpoints.layouts import original
from steadydetr.checkpoints.layouts.base import COUNTERS, RESNET, KeyLayout, Table

PROJECTIONS = {
    "q_?content": "query_content",
    "q_?pos": "query_position",
    "k_?content": "key_content",
    "k_?pos": "key_position",
    "v": "value",
}
CROSS_PROJECTIONS = PROJECTIONS | {"q_?pos_sine": "query_sine"}
ATTENTION: Table = (
    *(
        (rf"(?:transformer|model)\.(decoder\.layers\.\d+)\.{before}{theirs}_proj\.(.+)", rf"\1.{part}.{ours}.\2")
        for before, part, names in (
            (r"(?:sa_|self_attn\.)", "self_attention", PROJECTIONS),
            (r"(?:ca_|encoder_attn\.)", "cross_attention", CROSS_PROJECTIONS),
        )
        for theirs, ours in names.items()
    ),
    (r"model\.(decoder\.layers\.\d+)\.encoder_attn\.(?:o|out)_proj\.(.+)", r"\1.cross_attention.out_proj.\2"),
    (r"transformer\.(encoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.self_attention.\2"),
    (r"model\.(encoder\.layers\.\d+)\.self_attn\.([qkv])_proj\.(.+)", r"\1.self_attention.\2_\3"),
    (r"model\.(encoder\.layers\.\d+)\.self_attn\.(?:o|out)_proj\.(.+)", r"\1.self_attention.out_proj.\2"),
)
# the other way round in Deformable DETR
NORMS: Table = (
    (r"transformer\.(decoder\.layers\.\d+)\.norm1\.(.+)", r"\1.self_norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norm2\.(.+)", r"\1.cross_norm.\2"),
)
REST: Table = (
    (r"(?:transformer|model)\.decoder\.(?:norm|layernorm)\.(.+)", r"decoder.norm.\1"),
    (r"(?:transformer|model)\.decoder\.query_scale\.(.+)", r"decoder.sine_scale.\1"),
    (r"(?:transformer|model)\.decoder\.ref_point_head\.(.+)", r"query_reference.\1"),
    (r"(?:query_embed|model\.query_position_embeddings)\.weight", "query_position.weight"),
    (r"(?:input_proj|model\.input_projection)\.(.+)", r"neck.\1"),
    (r"(?:class_embed|class_labels_classifier)\.(.+)", r"class_heads.0.\1"),
    (r"(?:bbox_embed|bbox_predictor)\.(layers\..+)", r"box_heads.0.\1"),
)

LAYOUT = KeyLayout(
    name="conditional detr",
    mark=r"transformer\.decoder\.layers\.\d+\.ca_qcontent_proj\..+",
    table=(*COUNTERS, *RESNET, *ATTENTION, *NORMS, *original.TRANSFORMER, *REST),
    described="Conditional DETR (its repository)",
    tied_heads_once=True,
)
