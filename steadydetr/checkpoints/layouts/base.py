"""What a layout of checkpoints is, and the tables that several layouts share."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

Table = tuple[tuple[str, str], ...]  # of a pattern for the whole key of a foreign file, and what our parameter is called
Numbers = dict[str, int]  # numbers that a layout reads from all keys of a file, by the name that replacements call them
DROP = ""  # as a replacement: the tensor is not needed, because the architecture determines it


def read_numbers(keys: Collection[str]) -> Numbers:
    """The numbers that tables of several layouts use.

    `maps`: how many maps the neck takes from the backbone; its further convolutions make smaller maps of the last of them.
    `first`: the number of the first of Swin's maps that is used, and therefore has an output norm.
    """
    maps = 1 + max((int(m[1]) for key in keys if (m := re.fullmatch(r"neck\.convs\.(\d+)\..+", key))), default=-1)
    first = min((int(m[1]) for key in keys if (m := re.fullmatch(r"backbone\.(?:0\.)?norm(\d+)\..+", key))), default=0)
    return {"maps": maps, "first": first}


@dataclass(frozen=True)
class KeyLayout:
    """How one project names the parameters of its detectors.

    The table is tried in order, and the first pattern that matches a key names our parameter. In a replacement, `\\1` stands for what
    the first group matched, and `{...}` for arithmetic with a number on its left: `{\\1-1}`, `{\\2/2}`, or `{\\1+maps}`, where `maps` is
    one of `numbers`.
    """

    name: str
    mark: str  # a pattern that only keys of this layout match
    table: Table
    described: str  # detectors and project, for messages: "Deformable DETR (mmdet 2)"
    heads: tuple[str, ...] = ("class_embed", "bbox_embed")  # what precedes the number of the stage in keys of heads
    tied_heads_once: bool = False  # heads that all decoder stages share are saved once, for stage 0; False: once for every stage
    numbers: Callable[[Collection[str]], Numbers] = read_numbers


def below(prefix: str, table: Table) -> Table:
    """The table for keys that have a prefix."""
    return tuple((rf"{prefix}\.{pattern}", replacement) for pattern, replacement in table)


# the counters of batch norms
COUNTERS: Table = ((r".+\.num_batches_tracked", DROP),)
# what the original code, detrex and Hugging Face call the heads, the queries and the parts for proposals
HEADS: Table = (
    (r"(?:transformer\.|model\.)?(?:decoder\.)?class_embed\.(\d+)\.(.+)", r"class_heads.\1.\2"),
    (r"(?:transformer\.|model\.)?(?:decoder\.)?bbox_embed\.(\d+)\.(.+)", r"box_heads.\1.\2"),
    (r"(?:transformer\.)?(?:model\.)?enc_output\.(.+)", r"proposal_head.project.\1"),
    (r"(?:transformer\.)?(?:model\.)?enc_output_norm\.(.+)", r"proposal_head.norm.\1"),
    (r"transformer\.enc_out_class_embed\.(.+)", r"proposal_head.class_head.\1"),
    (r"transformer\.enc_out_bbox_embed\.(.+)", r"proposal_head.box_head.\1"),
    (r"(?:transformer\.)?(?:model\.)?pos_trans\.(.+)", r"proposal_position.\1"),
    (r"(?:transformer\.)?(?:model\.)?pos_trans_norm\.(.+)", r"proposal_position_norm.\1"),
    (r"(?:transformer\.)?(?:model\.)?reference_points\.(.+)", r"query_reference.\1"),
    (r"(?:transformer\.)?tgt_embed\.weight", "query_content.weight"),
    (r"refpoint_embed\.weight", "query_anchor.weight"),
    (r"(?:label_enc|denoising_generator\.label_encoder)\.weight", "label_content.weight"),
    (r"transformer\.decoder\.norm\.(.+)", r"decoder.norm.\1"),
    (r"transformer\.decoder\.ref_point_head\.(.+)", r"decoder.position.head.\1"),
    (r"transformer\.decoder\.query_scale\.(.+)", r"decoder.position.scale.\1"),
    (r"query_embed(?:ding)?\.weight|model\.query_position_embeddings\.weight", "query_position_and_content"),
)
# ResNet of timm or torchvision, and the stem of detrex
RESNET: Table = (
    (r"backbone\.0\.body\.(.+)", r"backbone.body.\1"),
    (r"model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?(.+)", r"backbone.body.\1"),
    (r"backbone\.stem\.conv1\.norm\.(.+)", r"backbone.body.bn1.\1"),
    (r"backbone\.stem\.conv1\.(.+)", r"backbone.body.conv1.\1"),
)
# timm counts the patch merging to the stage after it, the original Swin to the stage before it
SWIN: Table = (
    (r"backbone\.(?:0\.)?layers\..+\.relative_position_index", DROP),
    (r"backbone\.(?:0\.)?layers\.(\d+)\.downsample\.(.+)", r"backbone.body.layers_{\1+1}.downsample.\2"),
    (r"backbone\.(?:0\.)?layers\.(\d+)\.(.+)", r"backbone.body.layers_\1.\2"),
    (r"backbone\.(?:0\.)?(patch_embed\..+)", r"backbone.body.\1"),
    (r"backbone\.(?:0\.)?norm(\d+)\.(.+)", r"backbone.norms.{\1-first}.\2"),
)
# convolution and norm of each level of the neck: by number in the original code, by name in mmdet and detrex
NUMBERED_NECK: Table = (
    (r"(?:model\.)?input_proj\.(\d+)\.0\.(.+)", r"neck.convs.\1.\2"),
    (r"(?:model\.)?input_proj\.(\d+)\.1\.(.+)", r"neck.norms.\1.\2"),
)
NAMED_NECK: Table = (
    (r"neck\.convs\.(\d+)\.conv\.(.+)", r"neck.convs.\1.\2"),
    (r"neck\.convs\.(\d+)\.(?:norm|gn)\.(.+)", r"neck.norms.\1.\2"),
    (r"neck\.extra_convs\.(\d+)\.conv\.(.+)", r"neck.convs.{\1+maps}.\2"),
    (r"neck\.extra_convs\.(\d+)\.(?:norm|gn)\.(.+)", r"neck.norms.{\1+maps}.\2"),
)
# layers of the transformer of mmcv, which mmdet and detrex use: attentions, ffns and norms are numbered
MMCV_TRANSFORMER: Table = (
    (r"transformer\.level_embeds", "level_embed"),
    (r"transformer\.(encoder\.layers\.\d+)\.attentions\.0\.(.+)", r"\1.attention.\2"),
    (r"transformer\.(encoder\.layers\.\d+)\.norms\.0\.(.+)", r"\1.norm.\2"),
    (r"transformer\.(encoder\.layers\.\d+)\.norms\.1\.(.+)", r"\1.ffn.norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.attentions\.0\.attn\.(.+)", r"\1.self_attention.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.attentions\.1\.(.+)", r"\1.cross_attention.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norms\.0\.(.+)", r"\1.self_norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norms\.1\.(.+)", r"\1.cross_norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norms\.2\.(.+)", r"\1.ffn.norm.\2"),
    (r"transformer\.((?:en|de)coder\.layers\.\d+)\.ffns\.0\.layers\.0\.0\.(.+)", r"\1.ffn.linear1.\2"),
    (r"transformer\.((?:en|de)coder\.layers\.\d+)\.ffns\.0\.layers\.1\.(.+)", r"\1.ffn.linear2.\2"),
)
