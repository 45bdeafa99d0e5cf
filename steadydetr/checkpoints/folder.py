"""Detectors on disk: a folder with model.safetensors and config.json; a run's checkpoints add what resuming needs.

Folders are written beside their place and renamed, so that there is always a whole one.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from steadydetr.config import FORMAT, check_format, from_plain, to_plain, write_json
from steadydetr.data.transforms import EvalTransform, ShortestSide
from steadydetr.detectors import Detector, DetectorConfig
from steadydetr.kinds import register

WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "training_state.pt"


@register("detector-card")
@dataclass(frozen=True)
class DetectorCard:
    """What a detector's weights need beside them to be used."""

    detector: DetectorConfig
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # results are written with these
    resize: EvalTransform = ShortestSide()
    top: int = 300
    nms: float | None = None


@dataclass(frozen=True)
class LoadedDetector:
    detector: Detector
    card: DetectorCard


def save_detector(folder: Path, state: Mapping[str, Tensor], card: DetectorCard, extra: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint folder; an older one in its place stays until the new one is whole.

    Args:
        extra: what resuming needs, saved by `torch.save` and read back with `weights_only`.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, fresh / WEIGHTS)
    write_json(fresh / CONFIG, {"format": FORMAT} | to_plain(card, "the checkpoint's config"))
    if extra is not None:
        torch.save({"format": FORMAT} | dict(extra), fresh / STATE)
    for path in fresh.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    _replace_folder(fresh, folder)


def _replace_folder(fresh: Path, folder: Path) -> None:
    """Folders cannot be exchanged in one call: between the two renames the old one is at `.NAME.old`, where `find` looks too."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(path: Path, prefer: tuple[str, ...] = ("best", "last")) -> Path:
    """The checkpoint folder that is meant: the folder itself, or a run's.

    Raises:
        FileNotFoundError: there is none; says what was looked for.
    """
    candidates = [path, *(path / name for name in prefer), *(path / f".{name}.old" for name in prefer)]
    for candidate in candidates:
        if (candidate / WEIGHTS).exists() and (candidate / CONFIG).exists():
            return candidate
    if path.is_file():
        raise FileNotFoundError(
            f"{path} is a file; a checkpoint is a folder with {WEIGHTS} and {CONFIG}. `steadydetr convert {path} FOLDER` makes one of a"
            " checkpoint of Deformable DETR, DINO, detrex, mmdet or Hugging Face"
        )
    where = f"{path} holds no checkpoint" if path.exists() else f"{path} does not exist"
    raise FileNotFoundError(f"{where}: expected {WEIGHTS} and {CONFIG} in it, or in {' or '.join(prefer)} below it")


def choose_device(name: torch.device | str) -> torch.device:
    """`auto` is a GPU if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> LoadedDetector:
    """The detector of a run (its best), of one checkpoint folder or of a converted one, in evaluation mode.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: the folder is damaged or of another version; says which file.
    """
    folder = find_checkpoint(Path(path).expanduser())
    card = read_card(folder)
    detector = card.detector.without_pretrained().build(len(card.classes))
    load_weights(detector, folder)
    return LoadedDetector(detector.eval().to(choose_device(device)), card)


def read_card(folder: Path) -> DetectorCard:
    try:
        card = from_plain(json.loads((folder / CONFIG).read_text()), str(folder / CONFIG))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(card, DetectorCard):
        raise ValueError(f"{folder / CONFIG} is not that of a checkpoint but a {type(card).__name__}")
    return card


def load_weights(detector: Detector, folder: Path) -> None:
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    missing, unexpected = detector.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{folder / WEIGHTS} does not fit its {CONFIG}: missing {missing}, left over {unexpected}")


def load_training_state(folder: Path) -> dict[str, Any]:
    """What `extra` of `save_detector` was.

    Raises:
        FileNotFoundError: the checkpoint can be used but not resumed from.
    """
    if not (folder / STATE).exists():
        raise FileNotFoundError(f"{folder} has no {STATE}: it can be evaluated but not resumed from")
    state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    check_format(state, str(folder / STATE))
    return state


def average_state(extra: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The averaged weights in a training state: of their own, or the teacher's, which they are until it is frozen; None: there are none."""
    if extra["average"] is not None:
        return extra["average"]
    prefix = "teachers.ema.model."
    found = {name.removeprefix(prefix): value for name, value in extra["method"].items() if name.startswith(prefix)}
    return found or None


def load_models(folder: Path, device: str) -> dict[str, Detector]:
    """A checkpoint's trained weights and, where it keeps them, their average."""
    loaded = load_detector(folder, device)
    models = {"model": loaded.detector}
    average = average_state(load_training_state(folder)) if (folder / STATE).exists() else None
    if average is not None:
        models["ema"] = copy.deepcopy(loaded.detector)
        models["ema"].load_state_dict(average)
    return models
