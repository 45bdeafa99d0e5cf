"""The repository of AdaMixer, on mmdet 2: every stage of the decoder, with its heads, is one `bbox_head`."""

from __future__ import annotations

from steadydetr.checkpoints.layouts.base import COUNTERS, KeyLayout, Table, below
from steadydetr.checkpoints.layouts.mmdet import BACKBONE

NECK: Table = (
    (r"neck\.lateral_convs\.(\d+)\.conv\.(.+)", r"neck.convs.\1.\2"),
    (r"neck\.gn_out\.(.+)", r"neck.norm.\1"),
)
QUERIES: Table = (
    (r"rpn_head\.init_content_features\.weight", "query_content.weight"),
    (r"rpn_head\.init_proposal_bboxes\.weight", "query_box"),
)
STAGES: Table = (
    (r"(\d+)\.attention\.attn\.(.+)", r"decoder.layers.\1.self_attention.\2"),
    (r"(\d+)\.attention_norm\.(.+)", r"decoder.layers.\1.self_norm.\2"),
    (r"(\d+)\.iof_tau", r"decoder.layers.\1.overlap_scale"),
    (r"(\d+)\.sampling_n_mixing\.sampling_offset_generator\.0\.(.+)", r"decoder.layers.\1.sampling.sampling_offsets.\2"),
    (r"(\d+)\.sampling_n_mixing\.adaptive_mixing\.parameter_generator\.0\.(.+)", r"decoder.layers.\1.mixing.generator.\2"),
    (r"(\d+)\.sampling_n_mixing\.adaptive_mixing\.out_proj\.(.+)", r"decoder.layers.\1.mixing.output.\2"),
    (r"(\d+)\.sampling_n_mixing\.norm\.(.+)", r"decoder.layers.\1.mixing_norm.\2"),
    (r"(\d+)\.ffn\.layers\.0\.0\.(.+)", r"decoder.layers.\1.ffn.linear1.\2"),
    (r"(\d+)\.ffn\.layers\.1\.(.+)", r"decoder.layers.\1.ffn.linear2.\2"),
    (r"(\d+)\.ffn_norm\.(.+)", r"decoder.layers.\1.ffn.norm.\2"),
    (r"(\d+)\.cls_fcs\.([01])\.(.+)", r"decoder.class_towers.\1.\2.\3"),
    (r"(\d+)\.reg_fcs\.([01])\.(.+)", r"decoder.box_towers.\1.\2.\3"),
    (r"(\d+)\.fc_cls\.(.+)", r"class_heads.\1.\2"),
    (r"(\d+)\.fc_reg\.(.+)", r"box_heads.\1.\2"),
)


LAYOUT = KeyLayout(
    name="adamixer",
    mark=r"roi_head\.bbox_head\.\d+\.sampling_n_mixing\..+",
    table=(*COUNTERS, *BACKBONE, *NECK, *QUERIES, *below(r"roi_head\.bbox_head", STAGES)),
    described="AdaMixer (its repository)",
    heads=(),
)
