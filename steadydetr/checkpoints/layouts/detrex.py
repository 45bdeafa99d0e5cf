"""detrex and what is built on it, as Stable-DINO is."""

from __future__ import annotations

from collections.abc import Collection

from steadydetr.checkpoints.layouts.base import (
    COUNTERS,
    HEADS,
    MMCV_TRANSFORMER,
    NAMED_NECK,
    RESNET,
    SWIN,
    KeyLayout,
    Numbers,
    Table,
    read_numbers,
)

DETECTRON_RESNET: Table = (
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.(.+)", r"backbone.body.layer{\1-1}.\2.downsample.1.\3"),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.(.+)", r"backbone.body.layer{\1-1}.\2.downsample.0.\3"),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.(.+)", r"backbone.body.layer{\1-1}.\2.bn\3.\4"),
    (r"backbone\.res(\d)\.(\d+)\.(conv\d\..+)", r"backbone.body.layer{\1-1}.\2.\3"),
)
# fusions of the memory in Stable-DINO: the one that is called dense comes before the one that is called simple
FUSIONS: Table = (
    (r"transformer\.encoder\.fusion_layer\.0\.(.+)", r"encoder.fusions.0.project.\1"),
    (r"transformer\.encoder\.fusion_layer\.1\.(.+)", r"encoder.fusions.0.norm.\1"),
    (r"transformer\.fusion_run\.(weight|bias)", r"encoder.fusions.{0+dense}.project.\1"),
    (r"transformer\.fusion_run\.0\.(.+)", r"encoder.fusions.{0+dense}.project.\1"),
    (r"transformer\.fusion_run\.1\.(.+)", r"encoder.fusions.{0+dense}.norm.\1"),
)


def numbers_with_fusions(keys: Collection[str]) -> Numbers:
    """`dense` is 1 where the fusion that is called dense comes before the other."""
    dense = any(key.startswith("transformer.encoder.fusion_layer.") for key in keys)
    return read_numbers(keys) | {"dense": int(dense)}


LAYOUT = KeyLayout(
    name="detrex",
    mark=r"transformer\.(?:en|de)coder\.layers\.\d+\.attentions\..+",
    table=(*COUNTERS, *RESNET, *DETECTRON_RESNET, *SWIN, *NAMED_NECK, *MMCV_TRANSFORMER, *FUSIONS, *HEADS),
    described="DINO, DAB-, DN-DAB- and H-Deformable-DETR (detrex)",
    numbers=numbers_with_fusions,
)
