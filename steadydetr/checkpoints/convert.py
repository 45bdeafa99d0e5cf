"""Official checkpoints of other projects, translated to our detectors.

`steadydetr.checkpoints.key_maps` renames the keys one by one. Every registered detector config is then asked whether it recognises the
tensors (`DetectorConfig.from_tensors`), tensors that are not one parameter of ours each are placed, and the result is checked: keys that
are left over or missing are an error that lists them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.finding import CONFIG, replaced_place
from steadydetr.checkpoints.folder import save_detector
from steadydetr.checkpoints.hugging_face_config import HuggingFaceConfig, is_hugging_face, read_hugging_face_config
from steadydetr.checkpoints.key_maps import missing_copies, recognise, rename
from steadydetr.checkpoints.layouts import BY_NAME
from steadydetr.data.coco_classes import NAMES, class_list
from steadydetr.data.transforms import ShortestSide
from steadydetr.detectors import DeformableDETRConfig, Detector, DetectorConfig
from steadydetr.files import listed, printable, read_json_object
from steadydetr.finite import where_not_finite
from steadydetr.kinds import options
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.nn.named_tensors import USUAL, NamedTensors, Untraced, same
from steadydetr.tensor_files import read_pickled, read_tensors

# what projects call the state dict in a file; averaged weights come first, because the numbers that are reported belong to them
HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
WRAPPERS = ("ema_model", "ema_state", "ema_state_dict", "state_dict_ema", "teacher", "model", "state_dict")


@dataclass(frozen=True)
class Converted:
    """A detector's config with the tensors of all its parameters."""

    config: DetectorConfig
    state: dict[str, Tensor]
    num_classes: int
    layout: str


def convert_state_dict(
    state: Mapping[str, Tensor],
    config: DetectorConfig | None = None,
    untraced: Untraced = USUAL,
    without_backbone: bool = False,
) -> Converted:
    """A state dict of another project as our detector's config and state.

    Args:
        config: what the file was trained as, which is then only checked; inferred from names and shapes if not given.
        without_backbone: the file has no backbone, as in tests that give its feature maps, and none is asked for.

    Raises:
        ValueError: the layout or the detector is not recognised, keys are left over or missing, shapes are wrong, or parameters that the
            detector shares have different values in the file; lists the keys.
    """
    layout = recognise(state)
    tensors = NamedTensors(rename(state, layout), layout, state.keys(), untraced)
    if BY_NAME[layout].tied_heads_once:
        tensors = copy_tied_heads(tensors)
    elif copies := missing_copies(state):
        raise ValueError(f"missing: {listed(copies)}")
    if config is None:
        config = infer_config(tensors)
    num_classes = tensors.shape("class_heads.0.bias")[0]
    with torch.device("meta"):
        detector = config.build(num_classes)
    placed = place(tensors.tensors, config, detector.stages)
    check_complete(placed, config, detector, without_backbone)
    return Converted(config, placed, num_classes, layout)


def infer_config(tensors: NamedTensors) -> DetectorConfig:
    """The config of the one detector that recognises the tensors.

    Raises:
        ValueError: none or several do, or a tensor is missing that tells a size of the detector; names them.
    """
    registered = cast(dict[str, type[DetectorConfig]], options(DetectorConfig))
    # a config that inherits the method from another detector would recognise every file of that detector
    asked = {word: kind for word, kind in registered.items() if "from_tensors" in vars(kind)}
    found = {word: config for word, kind in asked.items() if (config := kind.from_tensors(tensors)) is not None}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ValueError(
            f"several detectors recognise this file of the layout {tensors.layout}: {', '.join(found)}. Leave out the plugin that is not"
            " meant, or give `convert_state_dict` the config"
        )
    parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in tensors.tensors)
    raise ValueError(
        f"no detector recognises this file of the layout {tensors.layout}: not {', '.join(asked)}. Its tensors are those of {listed(parts)}"
    )


def copy_tied_heads(tensors: NamedTensors) -> NamedTensors:
    """A head that the file holds once, for stage 0, because all decoder stages share it, is copied for every stage.

    Hugging Face writes such files. The class heads may be shared where the box heads are not.
    """
    filled = dict(tensors.tensors)
    for kind in ("class_heads", "box_heads"):
        if tensors.count(kind) == 1:
            for name in tensors.names(f"{kind}.0."):
                for stage in range(1, tensors.count("decoder.layers")):
                    # a copy in memory too, because a .safetensors file cannot hold one tensor under two names
                    filled[name.replace(f"{kind}.0.", f"{kind}.{stage}.")] = tensors.tensors[name].clone()
    return replace(tensors, tensors=filled)


def place(renamed: Mapping[str, Tensor], config: DetectorConfig, stages: int) -> dict[str, Tensor]:
    """The tensors by the names of our parameters: heads are placed, and what is split or joined in our detectors is split or joined.

    Args:
        stages: of the decoder. Heads with higher numbers are the encoder's.

    Raises:
        ValueError: the config's detector shares its heads, but those in the file differ; names one.
    """
    state = dict(renamed)
    for key in [key for key in state if key.startswith(("class_heads.", "box_heads."))]:
        kind, number, rest = key.split(".", 2)
        value, stage = state.pop(key), int(number)
        own = 0 if config.shares_heads else stage
        name = f"decoder.{kind}.{own}.{rest}" if stage < stages else f"proposal_head.{kind[:-1]}.{rest}"
        if name in state and not same(state[name], value):
            raise ValueError(f"{key} differs from the head of another stage, but the config says that they are shared")
        state[name] = value
    if (joint := state.pop("query_position_and_content", None)) is not None:
        state |= config.split_queries(joint)
    return config.rearranged(join_projections(state))


def join_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the separate projections of a self-attention's queries, keys and values as torch's one parameter for all three."""
    joined = dict(state)
    for suffix in ("weight", "bias"):
        for key in [key for key in joined if key.endswith(f"self_attention.q_{suffix}")]:
            names = [f"{key.removesuffix(f'q_{suffix}')}{letter}_{suffix}" for letter in "qkv"]
            if all(name in joined for name in names):
                joined[key.replace(f"q_{suffix}", f"in_proj_{suffix}")] = torch.cat([joined.pop(name) for name in names])
    return joined


def check_complete(state: Mapping[str, Tensor], config: DetectorConfig, detector: Detector, without_backbone: bool = False) -> None:
    """Raise a ValueError unless the state holds every parameter of the detector, with its shape, and nothing else.

    The counters of batch norms are not asked for: they are of no use after training.
    """
    ignored = ("backbone.",) if without_backbone else ()
    wanted = {
        key: value.shape
        for key, value in detector.state_dict().items()
        if not key.endswith("num_batches_tracked") and not key.startswith(ignored)
    }
    wrong = [
        f"{key} {list(state[key].shape)} for {list(shape)}" for key, shape in wanted.items() if key in state and state[key].shape != shape
    ]
    found = {"missing": sorted(wanted.keys() - state.keys()), "left over": sorted(state.keys() - wanted.keys()), "shapes": wrong}
    problems = [f"{what}: {listed(keys)}" for what, keys in found.items() if keys]
    if problems:
        raise ValueError(f"the file does not fit {type(config).__name__}: {'; '.join(problems)}")


def load_foreign(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file, by the keys of its project. No code that a file may contain is run.

    A folder is taken for that of a Hugging Face model. Where a file holds averaged weights too, they are taken.

    Raises:
        FileNotFoundError, ValueError: no such file, it is a checkpoint of ours, or it holds no state dict; says what it holds.
    """
    if is_ours(folder := path if path.is_dir() else path.parent):
        raise ValueError(f"{folder} is of steadydetr already and needs no conversion: `steadydetr eval {folder} --data DATA` takes it")
    if path.is_dir():
        places = [path / name for name in HUGGING_FACE_FILES]
        path = next((place for place in places if place.exists()), places[0])
    if (parts := path.with_name(f"{path.name}.index.json")).exists() and not path.exists():
        raise ValueError(f"{parts} tells of a model in several files: save it in one, as by save_pretrained(..., max_shard_size='1000GB')")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return {plain_key(key): value for key, value in read_tensors(path).items()}
    content = unwrap(_load_pickled(path))
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        found = printable(listed((str(key)[:60] for key in content), 12)) or "nothing"
        raise ValueError(f"{path} holds no state dict but {found}; expected tensors by name, or such under one of {', '.join(WRAPPERS)}")
    return {plain_key(key): value for key, value in content.items()}


def is_ours(folder: Path) -> bool:
    """Whether a folder is a run or a checkpoint of steadydetr, by its config.json."""
    config = folder / CONFIG
    return config.is_file() and not {"recipe", "category_ids"}.isdisjoint(read_json_object(config))


def plain_key(key: Any) -> str:
    """A key without what torch puts into it where a model is wrapped for several processes, or compiled."""
    return str(key).replace("_orig_mod.", "").removeprefix("module.")


def _load_pickled(path: Path) -> Any:
    try:
        return read_pickled(path)
    except ValueError as error:
        raise ValueError(
            f"{error}. If it holds other objects beside the weights and you trust it, save the weights alone:"
            " torch.save(torch.load(FILE, weights_only=False)['model'], NEW_FILE)"
        ) from None


def unwrap(content: Any) -> dict[str, Any]:
    """The state dict in the dictionaries that projects put around it; empty if the content is no dictionary."""
    for _ in range(len(WRAPPERS)):  # and no more: a dictionary may hold itself
        inner = [content[name] for name in WRAPPERS if isinstance(content.get(name), Mapping)] if isinstance(content, Mapping) else []
        content = next(filter(None, inner), content)
    return dict(content) if isinstance(content, Mapping) else {}


def config_beside(path: Path) -> HuggingFaceConfig | None:
    """What the configs of transformers tell in a folder, or beside one of its files; None where there are none."""
    folder = path if path.is_dir() else path.parent
    asked = path.is_dir() or path.name in HUGGING_FACE_FILES
    return read_hugging_face_config(folder) if asked and is_hugging_face(folder) else None


def untraced_of(path: Path, **known: float) -> Untraced:
    """What the tensors at `path` do not tell: fields that are known, then what a config beside them tells, then what is usual."""
    told = config_beside(path)
    return replace(told.untraced if told else USUAL, **known)  # type: ignore[arg-type]


def read_foreign(path: Path, classes: str = "auto", untraced: Untraced | None = None) -> tuple[Converted, DetectorCard]:
    """A checkpoint of another project, converted, and the card of its detector.

    Args:
        path: a file, or the folder of a Hugging Face model, whose configs are read too.
        classes: see `steadydetr.data.coco_classes.class_list`; auto: the names that a config beside the file tells go first.
        untraced: None: as `untraced_of` has it.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is not understood, or holds NaN or infinite values; names it.
    """
    told = config_beside(path)
    state = load_foreign(path)
    try:
        converted = convert_state_dict(state, untraced=untraced or untraced_of(path))
        config = converted.config
        if told and isinstance(config, DeformableDETRConfig) and (told.refine, told.two_stage) != (config.refine, config.two_stage):
            # equal heads of all stages need not be tied: so they are where training with refinement starts
            converted = convert_state_dict(state, replace(config, refine=told.refine, two_stage=told.two_stage))
    except ValueError as error:
        raise ValueError(f"{printable(path)}: {error}") from None
    if found := where_not_finite(converted.state):
        raise ValueError(f"{path} is of no use: {found} hold NaN or infinite values")
    if told:
        converted = replace(converted, config=normalised_by(converted.config, told))
    names, category_ids = _classes(classes, told, converted.num_classes, path)
    return converted, DetectorCard(converted.config, names, category_ids, told.resize if told else ShortestSide())


def normalised_by(config: DetectorConfig, told: HuggingFaceConfig) -> DetectorConfig:
    """The detector with pixels normalised as the config beside its tensors tells."""
    backbone = getattr(config, "backbone", None)
    return config.changed(backbone=replace(backbone, mean=told.mean, std=told.std)) if isinstance(backbone, TimmBackboneConfig) else config


def _classes(classes: str, told: HuggingFaceConfig | None, rows: int, path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and category ids for a detector with `rows` class rows; the ids of names that a config tells are the numbers of the rows."""
    if classes != "auto" or told is None or told.classes is None or told.classes == NAMES:
        return class_list(classes, rows)
    if len(told.classes) != rows:
        raise ValueError(f"{printable(path)} has {rows} class rows, but id2label in {CONFIG} names {len(told.classes)} classes")
    return told.classes, tuple(range(rows))


def convert_file(path: Path, output: Path, classes: str = "auto", untraced: Untraced | None = None) -> Converted:
    """Convert a checkpoint and write it as one of ours. Arguments and errors as of `read_foreign`.

    Raises:
        FileExistsError: `output` is there already, or the hidden name beside it that a folder has while it is replaced.
    """
    check_free(output)
    converted, card = read_foreign(path, classes, untraced)
    save_detector(output, converted.state, card)
    return converted


def check_free(output: Path) -> None:
    """Raise FileExistsError where a new checkpoint folder would meet something."""
    for place in (output, replaced_place(output)):
        if os.path.lexists(place):
            raise FileExistsError(f"{place} exists already: choose another folder")
