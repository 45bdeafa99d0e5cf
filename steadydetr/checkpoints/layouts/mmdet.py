"""mmdet 2."""

from __future__ import annotations

from steadydetr.checkpoints.layouts.base import COUNTERS, MMCV_TRANSFORMER, NAMED_NECK, KeyLayout, Table, below

BACKBONE: Table = ((r"backbone\.(.+)", r"backbone.body.\1"),)
BRANCHES: Table = (
    (r"transformer\.reference_points\.(.+)", r"query_reference.\1"),
    (r"cls_branches\.(\d+)\.(.+)", r"class_heads.\1.\2"),
    (r"reg_branches\.(\d+)\.(0|2|4)\.(.+)", r"box_heads.\1.layers.{\2/2}.\3"),
    (r"query_embedding\.weight", "query_position_and_content"),
    (r"transformer\.enc_output\.(.+)", r"proposal_head.project.\1"),
    (r"transformer\.enc_output_norm\.(.+)", r"proposal_head.norm.\1"),
    (r"transformer\.pos_trans\.(.+)", r"proposal_position.\1"),
    (r"transformer\.pos_trans_norm\.(.+)", r"proposal_position_norm.\1"),
)


LAYOUT = KeyLayout(
    name="mmdet",
    mark=r"bbox_head\.transformer\.(?:en|de)coder\.layers\.\d+\.attentions\..+",
    table=(*COUNTERS, *BACKBONE, *NAMED_NECK, *below("bbox_head", (*MMCV_TRANSFORMER, *BRANCHES))),
    described="Deformable DETR (mmdet 2)",
    heads=("cls_branches", "reg_branches"),
)
