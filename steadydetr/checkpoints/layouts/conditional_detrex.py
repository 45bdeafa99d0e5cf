"""Conditional DETR in detrex, whose layers are those of its other detectors."""

from __future__ import annotations

from steadydetr.checkpoints.layouts.base import COUNTERS, MMCV_TRANSFORMER, RESNET, KeyLayout, Table
from steadydetr.checkpoints.layouts.conditional import REST
from steadydetr.checkpoints.layouts.detrex import DETECTRON_RESNET

PROJECTIONS = {
    "query_content_proj": "query_content",
    "query_pos_proj": "query_position",
    "query_pos_sine_proj": "query_sine",
    "key_content_proj": "key_content",
    "key_pos_proj": "key_position",
    "value_proj": "value",
    "out_proj": "out_proj",
}
ATTENTION: Table = (
    *(
        (rf"transformer\.(decoder\.layers\.\d+)\.attentions\.{number}\.{theirs}\.(.+)", rf"\1.{part}.{ours}.\2")
        for number, part in enumerate(("self_attention", "cross_attention"))
        for theirs, ours in PROJECTIONS.items()
    ),
    (r"transformer\.(encoder\.layers\.\d+)\.attentions\.0\.attn\.(.+)", r"\1.self_attention.\2"),
    (r"transformer\.decoder\.post_norm_layer\.(.+)", r"decoder.norm.\1"),
)

LAYOUT = KeyLayout(
    name="conditional detr of detrex",
    mark=r"transformer\.decoder\.layers\.\d+\.attentions\.1\.query_content_proj\..+",
    table=(*COUNTERS, *RESNET, *DETECTRON_RESNET, *ATTENTION, *MMCV_TRANSFORMER, *REST),
    described="Conditional DETR (detrex)",
    tied_heads_once=True,
)
