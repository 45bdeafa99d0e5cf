"""Conditional DETR in Hugging Face transformers, of all versions."""

from __future__ import annotations

from steadydetr.checkpoints.layouts.base import COUNTERS, RESNET, KeyLayout
from steadydetr.checkpoints.layouts.conditional import ATTENTION, REST
from steadydetr.checkpoints.layouts.hugging_face import TRANSFORMER

LAYOUT = KeyLayout(
    name="conditional detr of hugging face",
    mark=r"model\.decoder\.layers\.\d+\.(?:ca_qcontent|encoder_attn\.q_content)_proj\..+",
    table=(*COUNTERS, *RESNET, *ATTENTION, *TRANSFORMER, *REST),
    described="Conditional DETR (Hugging Face)",
    tied_heads_once=True,
)
