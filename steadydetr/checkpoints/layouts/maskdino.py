"""The repository of MaskDINO, which is built on detectron2."""

from __future__ import annotations

from steadydetr.checkpoints.layouts import original
from steadydetr.checkpoints.layouts.base import COUNTERS, DROP, NUMBERED_NECK, RESNET, SWIN, KeyLayout, Table, below
from steadydetr.checkpoints.layouts.detrex import DETECTRON_RESNET

PIXELS: Table = below(
    r"sem_seg_head\.pixel_decoder",
    (
        *NUMBERED_NECK,
        *original.TRANSFORMER,
        (r"adapter_1\.norm\.(.+)", r"pixel_embedding.lateral_norm.\1"),
        (r"adapter_1\.(.+)", r"pixel_embedding.lateral.\1"),
        (r"layer_1\.norm\.(.+)", r"pixel_embedding.smooth_norm.\1"),
        (r"layer_1\.(.+)", r"pixel_embedding.smooth.\1"),
        (r"mask_features\.(.+)", r"pixel_embedding.project.\1"),
    ),
)
# the norm after the decoder's layers and the box head have several names
PREDICTOR: Table = below(
    r"sem_seg_head\.predictor",
    (
        *((pattern.removeprefix(r"transformer\."), ours) for pattern, ours in original.TRANSFORMER),
        (r"decoder(?:_|\.)norm\.(.+)", r"decoder.norm.\1"),
        (r"decoder\.ref_point_head\.(.+)", r"decoder.position.head.\1"),
        (r"(?:decoder\.)?bbox_embed\.(\d+)\.(.+)", r"box_heads.\1.\2"),
        (r"_bbox_embed\.(.+)", r"box_heads.0.\1"),
        (r"class_embed\.(.+)", r"class_heads.0.\1"),
        (r"mask_embed\.(.+)", r"mask_head.\1"),
        (r"enc_output\.(.+)", r"proposal_head.project.\1"),
        (r"enc_output_norm\.(.+)", r"proposal_head.norm.\1"),
        (r"label_enc\.(.+)", r"label_content.\1"),
        (r"query_feat\.(.+)", r"query_content.\1"),
    ),
)

LAYOUT = KeyLayout(
    name="maskdino",
    mark=r"sem_seg_head\.pixel_decoder\.adapter_1\..+",
    table=(*COUNTERS, (r"criterion\.empty_weight", DROP), *RESNET, *DETECTRON_RESNET, *SWIN, *PIXELS, *PREDICTOR),
    described="MaskDINO (its repository)",
)
