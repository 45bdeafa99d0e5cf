"""Official checkpoints of other projects, translated to our detectors.

A layout is a table of (pattern, replacement), tried in order; the first that matches the whole key names our parameter. What two
keys of a file say of one parameter (tied heads) must be equal. Keys that no row matches, that have no place in the detector, or
that the detector misses are errors that list them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from steadydetr.checkpoint import Card, save_detector
from steadydetr.coco_classes import class_list
from steadydetr.data.transforms import ShortestSide
from steadydetr.detectors import DABDeformableDETRConfig, DeformableDETRConfig, DetectorConfig, DINOConfig, TransformerConfig
from steadydetr.detectors.dab_deformable_detr import DAB_TRANSFORMER
from steadydetr.detectors.dino import DINO_TRANSFORMER
from steadydetr.nn.backbone import BackboneConfig

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
SWIN: Table = (
    (r"backbone\.0\..+\.relative_position_index", DROP),
    (r"backbone\.0\.layers\.(\d+)\.downsample\.(.+)", r"backbone.body.layers_{\1+1}.downsample.\2"),
    (r"backbone\.0\.layers\.(\d+)\.(.+)", r"backbone.body.layers_\1.\2"),
    (r"backbone\.0\.(patch_embed\..+)", r"backbone.body.\1"),
    (r"backbone\.0\.norm(\d+)\.(.+)", r"backbone.norms.{\1-first}.\2"),
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

LAYOUTS: dict[str, Table] = {
    "original": (*COUNTERS, *RESNET, *SWIN, *NUMBERED_NECK, *ORIGINAL_TRANSFORMER, *HEADS),
    "detrex": (*COUNTERS, *RESNET, *DETECTRON_RESNET, *NAMED_NECK, *MMCV_TRANSFORMER, *HEADS),
    "mmdet": (*COUNTERS, (r"backbone\.(.+)", r"backbone.body.\1"), *NAMED_NECK, *MMCV_TRANSFORMER, *MMDET_HEADS),
    "hugging face": (*COUNTERS, *RESNET, *NUMBERED_NECK, *HUGGING_FACE_TRANSFORMER, *HEADS),
}


@dataclass(frozen=True)
class Converted:
    config: DetectorConfig
    state: dict[str, Tensor]
    num_classes: int
    layout: str


def convert_state_dict(
    state: Mapping[str, Tensor], config: DetectorConfig | None = None, heads: int = 8, without_backbone: bool = False
) -> Converted:
    """A state dict of another project as our detector's config and state.

    Args:
        config: what the file was trained as; inferred from names and shapes if not given. The number of heads and, for DINO of
            detrex, the position temperature leave no trace in a file.
        without_backbone: the file has no backbone (numeric cases of tests); the detector's is left as it is.

    Raises:
        ValueError: no layout fits, keys are left over or missing, shapes differ, or tied parameters do; lists the keys.
    """
    layout = recognise(state)
    renamed = rename(_strip(state, layout), LAYOUTS[layout])
    if config is None:
        config = infer_config(renamed, layout, heads)
    num_classes = renamed["class_heads.0.bias"].shape[0]
    translated = merge(renamed, config)
    check_complete(translated, config, num_classes, without_backbone)
    return Converted(config, translated, num_classes, layout)


def recognise(state: Mapping[str, Tensor]) -> str:
    """Which project wrote these keys."""
    marks = {
        "hugging face": "model.encoder.layers.0.self_attn.value_proj.weight",
        "mmdet": "bbox_head.transformer.encoder.layers.0.attentions.0.value_proj.weight",
        "detrex": "transformer.encoder.layers.0.attentions.0.value_proj.weight",
        "original": "transformer.encoder.layers.0.self_attn.value_proj.weight",
    }
    for layout, mark in marks.items():
        if mark in state:
            return layout
    raise ValueError(
        f"no known layout: none of {', '.join(marks)} writes keys like {', '.join(list(state)[:8])}. Known are Deformable DETR and DINO"
        " (their repositories), DINO and DAB-Deformable-DETR (detrex), Deformable DETR (mmdet, Hugging Face)"
    )


def _strip(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    return {key.removeprefix("bbox_head.") if layout == "mmdet" else key: value for key, value in state.items()}


def rename(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Every key by the first row that matches; `{...}` in a replacement is arithmetic on what was matched."""
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in table]
    maps = len({key for key in state if re.fullmatch(r"neck\.convs\.\d+\.conv\.weight", key)})
    norms = [int(m[1]) for key in state if (m := re.fullmatch(r"backbone\.0\.norm(\d+)\.weight", key))]
    numbers = {"maps": maps, "first": min(norms, default=0)}
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in state.items():
        found = next(((m, replacement) for pattern, replacement in patterns if (m := pattern.fullmatch(key))), None)
        if found is None:
            unknown.append(key)
        elif found[1] != DROP:
            name = re.sub(r"\{([^}]+)\}", lambda m: _calculate(m[1], numbers), found[0].expand(found[1]))
            if name in renamed and not _same(renamed[name], value):
                raise ValueError(f"{key} differs from another key for the same parameter, {name}: they are tied in every known version")
            renamed[name] = value
    if unknown:
        raise ValueError(f"{len(unknown)} keys are left over: {', '.join(unknown[:30])}")
    return renamed


def _calculate(expression: str, numbers: Mapping[str, int]) -> str:
    """`3-1`, `0+maps`, `4/2`."""
    left, operator, right = re.fullmatch(r"(\d+)([-+/])(\w+)", expression).groups()  # type: ignore[union-attr]
    a, b = int(left), numbers[right] if right in numbers else int(right)
    return str({"-": a - b, "+": a + b, "/": a // b}[operator])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.device.type == "meta" or bool(torch.equal(a, b)))


def infer_config(renamed: Mapping[str, Tensor], layout: str, heads: int) -> DetectorConfig:
    """The config that names and shapes tell."""
    dino = "decoder.norm.weight" in renamed
    dab = "decoder.position.scale.layers.0.weight" in renamed
    base = DINO_TRANSFORMER if dino else DAB_TRANSFORMER if dab else TransformerConfig()
    if dino and layout == "detrex":
        base = replace(base, temperature=10000.0, position_offset=-0.5)
    transformer = replace(base, **_sizes(renamed, heads))
    backbone = infer_backbone(renamed)
    two_stage = "proposal_head.project.weight" in renamed
    if dino:
        queries = renamed["query_content.weight"].shape[0]
        spare = renamed["label_content.weight"].shape[0] > renamed["class_heads.0.bias"].shape[0]
        return DINOConfig(backbone, transformer, queries, share_heads=heads_are_tied(renamed, transformer), spare_label=spare)
    if dab:
        queries = 300 if two_stage else renamed["query_content.weight"].shape[0]
        return DABDeformableDETRConfig(backbone, transformer, queries, two_stage)
    queries = 300 if two_stage else renamed["query_position_and_content"].shape[0]
    refine = two_stage or not heads_are_tied(renamed, transformer)
    return DeformableDETRConfig(backbone, transformer, queries, refine, two_stage)


def _sizes(renamed: Mapping[str, Tensor], heads: int) -> dict[str, Any]:
    levels, width = renamed["level_embed"].shape
    per_point = heads * levels

    def layers(name: str) -> int:
        return len({key.split(".")[2] for key in renamed if key.startswith(f"{name}.layers.")})

    return {
        "width": width,
        "heads": heads,
        "ffn": renamed["encoder.layers.0.ffn.linear1.weight"].shape[0],
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "levels": levels,
        "encoder_points": renamed["encoder.layers.0.attention.attention_weights.bias"].shape[0] // per_point,
        "decoder_points": renamed["decoder.layers.0.cross_attention.attention_weights.bias"].shape[0] // per_point,
        "neck_bias": "neck.convs.0.bias" in renamed,
    }


def heads_are_tied(renamed: Mapping[str, Tensor], transformer: TransformerConfig) -> bool:
    """Whether every decoder stage has the same heads, as DINO's and plain Deformable DETR's have."""
    pairs = [
        (key, key.replace("_heads.0.", f"_heads.{i}.")) for key in renamed if "_heads.0." in key for i in range(transformer.decoder_layers)
    ]
    return all(other not in renamed or _same(renamed[key], renamed[other]) for key, other in pairs)


def infer_backbone(renamed: Mapping[str, Tensor]) -> BackboneConfig:
    """ResNet by its blocks, Swin by its width; random weights, because the file brings them."""
    maps = sum(1 for key, value in renamed.items() if re.fullmatch(r"neck\.convs\.\d+\.weight", key) and value.shape[-1] == 1)
    blocks = len({key.split(".")[3] for key in renamed if key.startswith("backbone.body.layer3.")})
    if blocks:
        names = {(6, True): "resnet50", (23, True): "resnet101", (2, False): "resnet18", (36, True): "resnet152", (6, False): "resnet34"}
        kind = (blocks, "backbone.body.layer1.0.conv3.weight" in renamed)
        if kind not in names:
            raise ValueError(f"a ResNet with {blocks} blocks in its third stage is none that is known")
        return BackboneConfig(f"{names[kind]}.tv_in1k", tuple(range(5 - maps, 5)), weights="none")
    if "backbone.body.patch_embed.proj.weight" in renamed:
        table = renamed["backbone.body.layers_0.blocks.0.attn.relative_position_bias_table"]
        window = (int(table.shape[0] ** 0.5) + 1) // 2
        widths = {96: "tiny", 128: "base", 192: "large"}
        size = {7: 224, 12: 384}[window]
        name = f"swin_{widths[renamed['backbone.body.patch_embed.proj.weight'].shape[0]]}_patch4_window{window}_{size}"
        return BackboneConfig(name, tuple(range(4 - maps, 4)), weights="none", frozen_stages=0, output_norm=True)
    return BackboneConfig("resnet50.tv_in1k", tuple(range(5 - maps, 5)), weights="none")


def merge(renamed: Mapping[str, Tensor], config: DetectorConfig) -> dict[str, Tensor]:
    """What is not one key to one parameter: heads, joint embeddings, separate attention projections."""
    state = dict(renamed)
    stages = config.transformer.decoder_layers
    tied = config.share_heads if isinstance(config, DINOConfig) else isinstance(config, DeformableDETRConfig) and not config.refine
    for key in [key for key in state if key.startswith(("class_heads.", "box_heads."))]:
        kind, number, rest = key.split(".", 2)
        value, i = state.pop(key), int(number)
        # heads after those of the decoder's stages are the encoder's
        name = f"proposal_head.{kind[:-1]}.{rest}" if i >= stages else f"decoder.{kind}.{0 if tied else i}.{rest}"
        if name in state and not _same(state[name], value):
            raise ValueError(f"{key} differs from the head of another stage, but the config says that they are shared")
        state[name] = value
    if (joint := state.pop("query_position_and_content", None)) is not None:
        state["query_position.weight"], state["query_content.weight"] = joint.chunk(2, 1)
    for key in [key for key in state if key.endswith(("self_attention.q_weight", "self_attention.q_bias"))]:
        kind = key.rpartition("_")[2]
        prefix = key.removesuffix(f"q_{kind}")
        state[f"{prefix}in_proj_{kind}"] = torch.cat([state.pop(f"{prefix}{letter}_{kind}") for letter in "qkv"])
    if not _is_two_stage(config):  # Hugging Face keeps an unused extra head
        state = {key: value for key, value in state.items() if not key.startswith("proposal_head.")}
    return state


def _is_two_stage(config: DetectorConfig) -> bool:
    return isinstance(config, DINOConfig) or config.two_stage


def check_complete(state: Mapping[str, Tensor], config: DetectorConfig, num_classes: int, without_backbone: bool) -> None:
    with torch.device("meta"):
        wanted = config.build(num_classes).state_dict()
    if without_backbone:
        wanted = {key: value for key, value in wanted.items() if not key.startswith("backbone.")}
    wanted = {key: value for key, value in wanted.items() if not key.endswith("num_batches_tracked")}
    missing, left = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [
        f"{key} {list(state[key].shape)} for {list(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    problems = [f"{what}: {', '.join(keys[:30])}" for what, keys in (("missing", missing), ("left over", left), ("shapes", shapes)) if keys]
    if problems:
        raise ValueError(f"the file does not fit {type(config).__name__}: {'; '.join(problems)}")


def load_foreign(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or of a torch file, read without running code from it; averaged weights first where there are some."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of tensors ({type(error).__name__}: {error})") from error
    for wrapper in ("ema_model", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name, or such under model or state_dict")
    return {key.removeprefix("module."): value for key, value in content.items()}


def convert_file(path: Path, output: Path, classes: str = "auto", heads: int = 8) -> Converted:
    """Convert a checkpoint file and write it as one of ours.

    Args:
        classes: see `steadydetr.coco_classes.class_list`.

    Raises:
        FileExistsError: `output` is there already.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another folder")
    converted = convert_state_dict(load_foreign(path), heads=heads)
    names, category_ids = class_list(classes, converted.num_classes)
    card = Card(converted.config, names, category_ids, ShortestSide())
    save_detector(output, converted.state, card)
    return converted
