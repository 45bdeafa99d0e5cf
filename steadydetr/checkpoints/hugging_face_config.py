"""What the config.json and preprocessor_config.json of Hugging Face transformers tell of a detector beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from steadydetr.checkpoints.finding import CONFIG
from steadydetr.data.transforms import SIDE, EvalTransform, FixedSize, ShortestSide
from steadydetr.files import listed, printable, read_json_object
from steadydetr.nn.configs import IMAGENET_MEAN, IMAGENET_STD, Channels
from steadydetr.nn.named_tensors import Untraced

PREPROCESSOR = "preprocessor_config.json"
ARCHITECTURES = {"deformable_detr": "DeformableDetrForObjectDetection", "conditional_detr": "ConditionalDetrForObjectDetection"}
BUILT = {"position_embedding_type": "sine", "activation_function": "relu", "num_channels": 3}  # the values that we know
DILATED = "conditional_detr"  # what may have a dilated backbone, DC5
NOT_NAMED = "N/A"  # how COCO's unused ids are called there


@dataclass(frozen=True)
class HuggingFaceConfig:
    """What two files tell; None: they do not."""

    untraced: Untraced
    refine: bool
    two_stage: bool
    classes: tuple[str, ...] | None  # in the order of the class rows, whose numbers are the category ids
    resize: EvalTransform
    mean: Channels  # by which pixels in 0..1 are normalised
    std: Channels


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder has the config.json of a transformers model."""
    return (folder / CONFIG).is_file() and "model_type" in read_json_object(folder / CONFIG)


def read_hugging_face_config(folder: Path) -> HuggingFaceConfig:
    """The configs of a folder in the layout of transformers.

    Raises:
        ValueError: it is another model than those of `ARCHITECTURES`, or one with options that are not built here; names the field.
    """
    path = folder / CONFIG
    config, where = read_json_object(path), printable(path)
    kind = config.get("model_type")
    read = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    architectures = config.get("architectures")
    if architectures is None:  # of a config that was saved without a model
        architectures = [read] if read else []
    if read is None or read not in _list(architectures):
        found = listed(map(printable, _list(architectures)), 3) or printable(config.get("model_type", "none"))[:100]
        known = " and ".join(ARCHITECTURES.values())
        raise ValueError(f"{where} is that of another architecture, {found}; of transformers, {known} alone are read")
    for name, value in (BUILT if kind == DILATED else BUILT | {"dilation": False}).items():
        if config.get(name, value) != value:
            raise ValueError(f"{where} has {name} = {printable(config[name])[:100]}, which is not built here; only {value} is")
    heads = {name: _number(config, name, 8, where) for name in ("encoder_attention_heads", "decoder_attention_heads")}
    if len(set(heads.values())) > 1:
        raise ValueError(f"{where} has different numbers of heads in encoder and decoder, {heads}, which is not built here")
    return HuggingFaceConfig(
        Untraced(
            heads=next(iter(heads.values())),
            queries=_number(config, "two_stage_num_proposals", 300, where),
            output_stride=16 if config.get("dilation") is True else 32,
        ),
        config.get("with_box_refine") is True,
        config.get("two_stage") is True,
        _classes(config.get("id2label"), where),
        _resize(folder / PREPROCESSOR),
        *_normalisation(folder / PREPROCESSOR),
    )


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _number(config: Mapping[str, Any], name: str, default: int, where: str) -> int:
    value = config.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**6:
        raise ValueError(f"{where} is damaged: {name} = {printable(value)[:100]} is no number from 1 to {10**6}")
    return value


def _classes(names: Any, where: str) -> tuple[str, ...] | None:
    """The names in `id2label`; None where there are none, or only the placeholders LABEL_0, LABEL_1, ..."""
    if names is None:
        return None
    rows = range(len(names)) if isinstance(names, dict) else range(0)
    if not rows or not all(isinstance(names.get(str(row)), str) for row in rows):
        raise ValueError(f"{where} is damaged: id2label does not name the classes 0, 1, 2, ... one after the other")
    found = [names[str(row)] for row in rows]
    if all(name == f"LABEL_{row}" for row, name in enumerate(found)):
        return None
    found = [f"unused {row}" if name == NOT_NAMED else name for row, name in enumerate(found)]
    if twice := sorted({name for name in found if found.count(name) > 1}):
        raise ValueError(f"{where} gives several classes one name in id2label: {printable(listed(twice, 5))}")
    return tuple(found)


def _normalisation(path: Path) -> tuple[Channels, Channels]:
    """Mean and deviation of pixels in 0..1. ImageNet's, where there is no such file, or where it tells of none."""
    config = read_json_object(path) if path.is_file() else {}
    if config.get("do_normalize", True) is not True:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    found = config.get("image_mean", list(IMAGENET_MEAN)), config.get("image_std", list(IMAGENET_STD))
    for name, values, least in zip(("image_mean", "image_std"), found, (-1e3, 1e-3), strict=True):
        numbers = [value for value in _list(values) if type(value) in (int, float) and least <= value <= 1e3]
        if len(numbers) != 3 or numbers != values:
            raise ValueError(f"{printable(path)} is damaged: {name} = {printable(values)[:100]} is not three numbers in {least} .. 1000")
    mean, std = (tuple(map(float, values)) for values in found)
    return cast(Channels, mean), cast(Channels, std)


def _resize(path: Path) -> EvalTransform:
    """How images are resized for it. Ours, 800 x 1333, where there is no such file, or where it tells of no size."""
    if not path.is_file():
        return ShortestSide()
    config, where = read_json_object(path), printable(path)
    size = config.get("size")
    if isinstance(size, dict):
        shortest, longest = size.get("shortest_edge"), size.get("longest_edge", config.get("max_size"))
        height, width = size.get("height"), size.get("width")
    else:  # of versions before 4.27
        shortest, longest, height, width = size, config.get("max_size"), None, None
    try:
        if isinstance(height, int) and isinstance(width, int):
            return FixedSize(height, width)
        if isinstance(shortest, int):
            return ShortestSide(shortest, longest if isinstance(longest, int) else SIDE[1])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return ShortestSide()
