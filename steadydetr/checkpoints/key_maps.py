"""What other projects call the parameters of our detectors.

A layout is a table of (pattern, replacement), tried in order; the first that matches the whole key names our parameter. Two
intermediate names are left for `steadydetr.checkpoints.convert` to place: `class_heads.N` and `box_heads.N` (the heads of stage N,
those after the last stage being the encoder's) and `query_position_and_content` (both embeddings side by side).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Table = tuple[tuple[str, str], ...]
DROP = ""  # the key carries nothing: a buffer that follows from the architecture

# layers of the transformer in the original repositories: norm1 follows cross-attention, norm2 self-attention
ORIGINAL_TRANSFORMER: Table = (
    (r"transformer\.level_embed", "level_embed"),
    (r"transformer\.(encoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.attention.\2"),
    (r"transformer\.(encoder\.layers\.\d+)\.norm1\.(.+)", r"\1.norm.\2"),
    (r"transformer\.(encoder\.layers\.\d+)\.norm2\.(.+)", r"\1.ffn.norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.self_attn\.(.+)", r"\1.self_attention.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.cross_attn\.(.+)", r"\1.cross_attention.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norm1\.(.+)", r"\1.cross_norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norm2\.(.+)", r"\1.self_norm.\2"),
    (r"transformer\.(decoder\.layers\.\d+)\.norm3\.(.+)", r"\1.ffn.norm.\2"),
    (r"transformer\.((?:en|de)coder\.layers\.\d+)\.(linear[12]\..+)", r"\1.ffn.\2"),
)
# the same in mmcv's transformer, which mmdet and detrex use: attentions, ffns and norms by number
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
    (r"transformer\.encoder\.fusion_layer\.0\.(.+)", r"encoder.fusions.0.project.\1"),
    (r"transformer\.encoder\.fusion_layer\.1\.(.+)", r"encoder.fusions.0.norm.\1"),
    (r"transformer\.fusion_run\.(weight|bias)", r"encoder.fusions.{0+dense}.project.\1"),
    (r"transformer\.fusion_run\.0\.(.+)", r"encoder.fusions.{0+dense}.project.\1"),
    (r"transformer\.fusion_run\.1\.(.+)", r"encoder.fusions.{0+dense}.norm.\1"),
)
# what the decoders and heads are called almost everywhere
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
    (r"label_enc\.weight", "label_content.weight"),
    (r"transformer\.decoder\.norm\.(.+)", r"decoder.norm.\1"),
    (r"transformer\.decoder\.ref_point_head\.(.+)", r"decoder.position.head.\1"),
    (r"transformer\.decoder\.query_scale\.(.+)", r"decoder.position.scale.\1"),
    (r"query_embed(?:ding)?\.weight|model\.query_position_embeddings\.weight", "query_position_and_content"),
)
RESNET: Table = (
    (r"backbone\.0\.body\.(.+)", r"backbone.body.\1"),
    (r"model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?(.+)", r"backbone.body.\1"),
    (r"backbone\.stem\.conv1\.norm\.(.+)", r"backbone.body.bn1.\1"),
    (r"backbone\.stem\.conv1\.(.+)", r"backbone.body.conv1.\1"),
)
# timm calls a stage by the patch merging before it, the original by the one after it
SWIN: Table = (
    (r"backbone\.(?:0\.)?layers\..+\.relative_position_index", DROP),
    (r"backbone\.(?:0\.)?layers\.(\d+)\.downsample\.(.+)", r"backbone.body.layers_{\1+1}.downsample.\2"),
    (r"backbone\.(?:0\.)?layers\.(\d+)\.(.+)", r"backbone.body.layers_\1.\2"),
    (r"backbone\.(?:0\.)?(patch_embed\..+)", r"backbone.body.\1"),
    (r"backbone\.(?:0\.)?norm(\d+)\.(.+)", r"backbone.norms.{\1-first}.\2"),
)
DETECTRON_RESNET: Table = (
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.norm\.(.+)", r"backbone.body.layer{\1-1}.\2.downsample.1.\3"),
    (r"backbone\.res(\d)\.(\d+)\.shortcut\.(.+)", r"backbone.body.layer{\1-1}.\2.downsample.0.\3"),
    (r"backbone\.res(\d)\.(\d+)\.conv(\d)\.norm\.(.+)", r"backbone.body.layer{\1-1}.\2.bn\3.\4"),
    (r"backbone\.res(\d)\.(\d+)\.(conv\d\..+)", r"backbone.body.layer{\1-1}.\2.\3"),
)
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
MMDET_HEADS: Table = (
    (r"transformer\.reference_points\.(.+)", r"query_reference.\1"),
    (r"cls_branches\.(\d+)\.(.+)", r"class_heads.\1.\2"),
    (r"reg_branches\.(\d+)\.(0|2|4)\.(.+)", r"box_heads.\1.layers.{\2/2}.\3"),
    (r"query_embedding\.weight", "query_position_and_content"),
    (r"transformer\.enc_output\.(.+)", r"proposal_head.project.\1"),
    (r"transformer\.enc_output_norm\.(.+)", r"proposal_head.norm.\1"),
    (r"transformer\.pos_trans\.(.+)", r"proposal_position.\1"),
    (r"transformer\.pos_trans_norm\.(.+)", r"proposal_position_norm.\1"),
)
HUGGING_FACE_TRANSFORMER: Table = (
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
COUNTERS: Table = ((r".+\.num_batches_tracked", DROP),)


def _below(prefix: str, table: Table) -> Table:
    return tuple((rf"{prefix}\.{pattern}", replacement) for pattern, replacement in table)


LAYOUTS: dict[str, Table] = {
    "original": (*COUNTERS, *RESNET, *SWIN, *NUMBERED_NECK, *ORIGINAL_TRANSFORMER, *HEADS),
    "detrex": (*COUNTERS, *RESNET, *DETECTRON_RESNET, *SWIN, *NAMED_NECK, *MMCV_TRANSFORMER, *HEADS),
    "mmdet": (
        *COUNTERS,
        (r"backbone\.(.+)", r"backbone.body.\1"),
        *NAMED_NECK,
        *_below("bbox_head", (*MMCV_TRANSFORMER, *MMDET_HEADS)),
    ),
    "hugging face": (*COUNTERS, *RESNET, *NUMBERED_NECK, *HUGGING_FACE_TRANSFORMER, *HEADS),
}
# keys that only the layout has, any of which tells it
MARKS: Table = (
    ("hugging face", r"model\.(?:en|de)coder\.layers\.\d+\.(?:self_attn_layer_norm|encoder_attn)\..+"),
    ("mmdet", r"bbox_head\.transformer\.(?:en|de)coder\.layers\.\d+\.attentions\..+"),
    ("detrex", r"transformer\.(?:en|de)coder\.layers\.\d+\.attentions\..+"),
    ("original", r"transformer\.(?:en|de)coder\.layers\.\d+\.(?:self_attn|cross_attn|linear1)\..+"),
)


def recognise(keys: Iterable[str]) -> str:
    """Which project wrote these keys.

    Raises:
        ValueError: none that is known; lists the keys.
    """
    keys = list(keys)
    for layout, mark in MARKS:
        if any(re.fullmatch(mark, key) for key in keys):
            return layout
    raise ValueError(
        f"no known layout: none of {', '.join(LAYOUTS)} writes keys like {listed(keys)}. Known are Deformable DETR and DINO"
        " (their repositories), DINO and DAB-Deformable-DETR (detrex), Deformable DETR (mmdet 2, Hugging Face)"
    )


def listed(keys: Iterable[str], most: int = 40) -> str:
    """Keys for an error message: all of them, or the first and how many more."""
    keys = list(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def rename(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Every key by the first row of its layout that matches; `{...}` in a replacement is arithmetic on what was matched.

    Raises:
        ValueError: no row matches a key, or two keys of one parameter differ; lists them.
    """
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in LAYOUTS[layout]]
    numbers = _numbers(state)
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in state.items():
        found = next(((m, replacement) for pattern, replacement in patterns if (m := pattern.fullmatch(key))), None)
        if found is None:
            unknown.append(key)
        elif found[1] != DROP:
            name = re.sub(r"\{([^}]+)\}", lambda m: _calculate(m[1], numbers), found[0].expand(found[1]))
            if name in renamed and not same(renamed[name], value):
                raise ValueError(f"{key} differs from another key for the same parameter, {name}: they are tied in every known version")
            renamed[name] = value
    if unknown:
        raise ValueError(f"{len(unknown)} keys are left over: {listed(unknown)}")
    return renamed


def _numbers(state: Mapping[str, Tensor]) -> dict[str, int]:
    """`maps`: how many maps the neck takes from the backbone. `first`: the number of Swin's first output norm. `dense`: 1 where
    Stable-DINO's encoder fuses all its layers, before another fusion after it."""
    maps = [int(m[1]) for key in state if (m := re.fullmatch(r"neck\.convs\.(\d+)\..+", key))]
    norms = [int(m[1]) for key in state if (m := re.fullmatch(r"backbone\.(?:0\.)?norm(\d+)\..+", key))]
    dense = any(key.startswith("transformer.encoder.fusion_layer.") for key in state)
    return {"maps": max(maps, default=-1) + 1, "first": min(norms, default=0), "dense": int(dense)}


def _calculate(expression: str, numbers: Mapping[str, int]) -> str:
    """`3-1`, `0+maps`, `4/2`."""
    left, sign, right = re.fullmatch(r"(\d+)([-+/])(\w+)", expression).groups()  # type: ignore[union-attr]
    a, b = int(left), numbers[right] if right in numbers else int(right)
    return str({"-": operator.sub, "+": operator.add, "/": operator.floordiv}[sign](a, b))


def missing_copies(keys: Iterable[str]) -> list[str]:
    """Keys of heads that the file has for one stage but not for another; torch files hold them for every stage, tied or not."""
    groups: dict[str, tuple[set[str], set[str]]] = {}
    present = set(keys)
    for key in present:
        if m := re.fullmatch(r"((?:.+\.)?(?:class_embed|bbox_embed|cls_branches|reg_branches)\.)(\d+)(\..+)", key):
            stages, rests = groups.setdefault(m[1], (set(), set()))
            stages.add(m[2])
            rests.add(m[3])
    wanted = {f"{group}{stage}{rest}" for group, (stages, rests) in groups.items() for stage in stages for rest in rests}
    return sorted(wanted - present)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and, unless they are only shapes (meta tensors), in value."""
    return a.shape == b.shape and (a.device.type == "meta" or bool(torch.equal(a, b)))
