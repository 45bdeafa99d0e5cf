"""Official checkpoints of other projects, translated to our detectors.

`steadydetr.checkpoints.key_maps` renames the keys one by one; here the detector's config is read from names and shapes, what is not one
key to one parameter is placed, and the result is checked: a key that is left over or missing is an error that lists it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from steadydetr.checkpoints.folder import DetectorCard, save_detector
from steadydetr.checkpoints.key_maps import listed, missing_copies, recognise, rename, same
from steadydetr.data.coco_classes import class_list
from steadydetr.data.transforms import ShortestSide
from steadydetr.detectors import DABDeformableDETRConfig, DeformableDETRConfig, DINOConfig, TransformerConfig
from steadydetr.detectors.dab_deformable_detr import DAB_TRANSFORMER
from steadydetr.detectors.deformable import DeformableDetectorConfig
from steadydetr.detectors.dino import DINO_TRANSFORMER
from steadydetr.nn.backbone import TimmBackboneConfig
from steadydetr.nn.encoder import FusionKind

RESNETS = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101", (36, True): "resnet152"}
SWINS = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}  # width and blocks of the third stage
SWIN_IMAGES = {7: 224, 12: 384}  # by the window's side; part of timm's names
# averaged weights first: they are what the reported numbers belong to
WRAPPERS = ("ema_model", "ema_state", "ema_state_dict", "state_dict_ema", "teacher", "model", "state_dict")


@dataclass(frozen=True)
class Untraced:
    """What neither a name nor a shape in a file tells. None: what the project's configs have as a rule."""

    heads: int = 8  # attention heads
    queries: int = 300  # of two-stage Deformable DETR and DAB-Deformable-DETR, which learn none
    temperature: float | None = None  # of the sine position of maps; detrex trained its 24-epoch DINO with 20 and offset 0
    position_offset: float | None = None


@dataclass(frozen=True)
class Converted:
    config: DeformableDetectorConfig
    state: dict[str, Tensor]
    num_classes: int
    layout: str


def convert_state_dict(
    state: Mapping[str, Tensor],
    config: DeformableDetectorConfig | None = None,
    untraced: Untraced = Untraced(),
    without_backbone: bool = False,
) -> Converted:
    """A state dict of another project as our detector's config and state.

    Args:
        config: what the file was trained as, which is then only checked; read from names and shapes if not given.
        without_backbone: the file has no backbone (numeric cases of tests), and none is asked for.

    Raises:
        ValueError: no layout fits, keys are left over or missing, shapes differ, or tied parameters do; lists the keys.
    """
    layout = recognise(state)
    renamed = rename(state, layout)
    if layout == "hugging face":
        renamed = fill_tied_heads(renamed)
    elif copies := missing_copies(state):
        raise ValueError(f"missing: {listed(copies)}")
    if config is None:
        config = infer_config(state, renamed, layout, untraced)
    num_classes = shape(renamed, "class_heads.0.bias")[0]
    placed = place(renamed, config)
    check_complete(placed, config, num_classes, without_backbone)
    return Converted(config, placed, num_classes, layout)


def infer_config(state: Mapping[str, Tensor], renamed: Mapping[str, Tensor], layout: str, untraced: Untraced) -> DeformableDetectorConfig:
    """The config that names and shapes tell."""

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in renamed)

    dino, dab, two_stage = has("decoder.norm."), has("decoder.position.scale."), has("proposal_")
    base = DINO_TRANSFORMER if dino else DAB_TRANSFORMER if dab else TransformerConfig()
    transformer = infer_transformer(renamed, base, untraced, infer_fusion(state))
    if dino and layout == "detrex":
        transformer = replace(transformer, temperature=10000.0, position_offset=-0.5)
    if untraced.temperature is not None:
        transformer = replace(transformer, temperature=untraced.temperature)
    if untraced.position_offset is not None:
        transformer = replace(transformer, position_offset=untraced.position_offset)
    backbone = infer_backbone(renamed)
    if dino:
        queries = shape(renamed, "query_content.weight")[0]
        spare = shape(renamed, "label_content.weight")[0] > shape(renamed, "class_heads.0.bias")[0]
        return DINOConfig(backbone, transformer, queries, share_heads=heads_are_tied(renamed, transformer), spare_label=spare)
    learned = "query_content.weight" if dab else "query_position_and_content"
    queries = untraced.queries if two_stage else shape(renamed, learned)[0]
    if dab:
        return DABDeformableDETRConfig(backbone, transformer, queries, two_stage)
    # where boxes are refined, the originals name the box heads in the decoder too; in mmdet only the values tell
    refine = any(".decoder.bbox_embed." in key for key in state) or not heads_are_tied(renamed, transformer)
    return DeformableDETRConfig(backbone, transformer, queries, refine, two_stage)


def infer_transformer(renamed: Mapping[str, Tensor], base: TransformerConfig, untraced: Untraced, fusion: FusionKind) -> TransformerConfig:
    levels, width = shape(renamed, "level_embed")
    per_point = untraced.heads * levels
    return replace(
        base,
        width=width,
        heads=untraced.heads,
        ffn=shape(renamed, "encoder.layers.0.ffn.linear1.weight")[0],
        encoder_layers=count(renamed, "encoder.layers"),
        decoder_layers=count(renamed, "decoder.layers"),
        levels=levels,
        encoder_points=shape(renamed, "encoder.layers.0.attention.attention_weights.bias")[0] // per_point,
        decoder_points=shape(renamed, "decoder.layers.0.cross_attention.attention_weights.bias")[0] // per_point,
        fusion=fusion,
        fusion_norm=fusion == "none" or "encoder.fusions.0.norm.weight" in renamed,
        neck_bias=any(re.fullmatch(r"neck\.convs\.\d+\.bias", name) for name in renamed),
    )


def infer_fusion(keys: Iterable[str]) -> FusionKind:
    """Stable-DINO's memory fusion, by the names of the released code."""
    kinds = {"dense": "transformer.encoder.fusion_layer.", "simple": "transformer.fusion_run."}
    found = [kind for kind, prefix in kinds.items() if any(key.startswith(prefix) for key in keys)]
    return cast(FusionKind, "_".join(found) or "none")


def shape(renamed: Mapping[str, Tensor], name: str) -> torch.Size:
    if name not in renamed:
        raise ValueError(f"missing: {name}, whose shape tells a size of the detector")
    return renamed[name].shape


def count(renamed: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are below `prefix`."""
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in renamed if name.startswith(f"{prefix}.")})


def heads_are_tied(renamed: Mapping[str, Tensor], transformer: TransformerConfig) -> bool:
    """Whether every decoder stage has the same heads, as DINO's and plain Deformable DETR's have."""
    stages = range(transformer.decoder_layers)
    pairs = [(name, name.replace("_heads.0.", f"_heads.{i}.")) for name in renamed if "_heads.0." in name for i in stages]
    return all(other not in renamed or same(renamed[name], renamed[other]) for name, other in pairs)


def infer_backbone(renamed: Mapping[str, Tensor]) -> TimmBackboneConfig:
    """ResNet by its blocks, Swin by its width; random weights, because the file brings them."""
    maps = sum(1 for name, value in renamed.items() if re.fullmatch(r"neck\.convs\.\d+\.weight", name) and value.shape[-1] == 1)
    if any(name.startswith("backbone.body.layers_") for name in renamed):
        table = shape(renamed, "backbone.body.layers_0.blocks.0.attn.relative_position_bias_table")
        window = (int(table[0] ** 0.5) + 1) // 2
        kind = (shape(renamed, "backbone.body.patch_embed.proj.weight")[0], count(renamed, "backbone.body.layers_2.blocks"))
        if kind not in SWINS or window not in SWIN_IMAGES:
            raise ValueError(f"no known Swin has width {kind[0]}, {kind[1]} blocks in its third stage and windows of {window}")
        name = f"swin_{SWINS[kind]}_patch4_window{window}_{SWIN_IMAGES[window]}"
        return TimmBackboneConfig(name, tuple(range(4 - maps, 4)), weights="none", frozen_stages=0, output_norm=True)
    blocks = count(renamed, "backbone.body.layer3")
    resnet = (blocks, any(".conv3." in name for name in renamed))
    if blocks and resnet not in RESNETS:
        raise ValueError(f"no known ResNet has {blocks} blocks in its third stage")
    return TimmBackboneConfig(f"{RESNETS.get(resnet, 'resnet50')}.tv_in1k", tuple(range(5 - maps, 5)), weights="none")


def fill_tied_heads(renamed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face saves a head that all stages share once, as that of stage 0, even where other heads differ by stage."""
    filled = dict(renamed)
    for kind in ("class_heads", "box_heads"):
        if count(renamed, kind) == 1:
            own = {name: value for name, value in renamed.items() if name.startswith(f"{kind}.0.")}
            for stage in range(1, count(renamed, "decoder.layers")):  # copies: files of ours hold every tensor by itself
                filled |= {name.replace(f"{kind}.0.", f"{kind}.{stage}."): value.clone() for name, value in own.items()}
    return filled


def place(renamed: Mapping[str, Tensor], config: DeformableDetectorConfig) -> dict[str, Tensor]:
    """What is not one key to one parameter: heads, joint embeddings, separate attention projections."""
    state = dict(renamed)
    stages = config.transformer.decoder_layers
    tied = config.share_heads if isinstance(config, DINOConfig) else isinstance(config, DeformableDETRConfig) and not config.refine
    for key in [key for key in state if key.startswith(("class_heads.", "box_heads."))]:
        kind, number, rest = key.split(".", 2)
        value, i = state.pop(key), int(number)
        # heads after those of the decoder's stages are the encoder's
        name = f"proposal_head.{kind[:-1]}.{rest}" if i >= stages else f"decoder.{kind}.{0 if tied else i}.{rest}"
        if name in state and not same(state[name], value):
            raise ValueError(f"{key} differs from the head of another stage, but the config says that they are shared")
        state[name] = value
    if (joint := state.pop("query_position_and_content", None)) is not None:
        state["query_position.weight"], state["query_content.weight"] = joint.chunk(2, 1)
    for suffix in ("weight", "bias"):
        for key in [key for key in state if key.endswith(f"self_attention.q_{suffix}")]:
            names = [f"{key.removesuffix(f'q_{suffix}')}{letter}_{suffix}" for letter in "qkv"]
            if all(name in state for name in names):
                state[key.replace(f"q_{suffix}", f"in_proj_{suffix}")] = torch.cat([state.pop(name) for name in names])
    return state


def check_complete(state: Mapping[str, Tensor], config: DeformableDetectorConfig, num_classes: int, without_backbone: bool = False) -> None:
    """Every parameter of the detector is there, with its shape, and nothing else; counters of batch norms do not matter."""
    with torch.device("meta"):
        wanted = config.build(num_classes).state_dict()
    ignored = ("backbone.",) if without_backbone else ()
    wanted = {key: value for key, value in wanted.items() if not key.endswith("num_batches_tracked") and not key.startswith(ignored)}
    both = [(key, state[key].shape, value.shape) for key, value in wanted.items() if key in state]
    wrong = [f"{key} {list(ours)} for {list(theirs)}" for key, ours, theirs in both if ours != theirs]
    found = {"missing": sorted(wanted.keys() - state.keys()), "left over": sorted(state.keys() - wanted.keys()), "shapes": wrong}
    problems = [f"{what}: {listed(keys)}" for what, keys in found.items() if keys]
    if problems:
        raise ValueError(f"the file does not fit {type(config).__name__}: {'; '.join(problems)}")


def load_foreign(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or of a torch file, read without running code from it.

    A folder is that of a Hugging Face model. Where a file holds averaged weights too, they are taken.

    Raises:
        FileNotFoundError, ValueError: no such file, or it holds no state dict; says what it holds.
    """
    if path.is_dir():
        names = ("model.safetensors", "pytorch_model.bin")
        path = next((path / name for name in names if (path / name).exists()), path / names[0])
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return load_file(path)
    content = unwrap(_load_tensors(path))
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        found = listed(map(str, content), 12) or "nothing"
        raise ValueError(f"{path} holds no state dict but {found}; expected tensors by name, or such under one of {', '.join(WRAPPERS)}")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _load_tensors(path: Path) -> Any:
    try:
        # the originals save their command line, a plain namespace, beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a file of tensors ({type(error).__name__}: {str(error)[:300]}). If it holds other objects beside"
            " the weights and you trust it, save the weights alone: torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)"
        ) from error


def unwrap(content: Any) -> dict[str, Any]:
    """The state dict within the containers that projects put around it."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping) and content[name]), None)
        if inner is None:
            return dict(content)
        content = inner
    return {}


def convert_file(path: Path, output: Path, classes: str = "auto", untraced: Untraced = Untraced()) -> Converted:
    """Convert a checkpoint file and write it as one of ours.

    Args:
        classes: see `steadydetr.data.coco_classes.class_list`.

    Raises:
        FileExistsError: `output` is there already.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another folder")
    converted = convert_state_dict(load_foreign(path), untraced=untraced)
    names, category_ids = class_list(classes, converted.num_classes)
    save_detector(output, converted.state, DetectorCard(converted.config, names, category_ids, ShortestSide()))
    return converted
