"""Detectors on disk: a folder with model.safetensors and config.json, and in checkpoints of a run training_state.pt to resume from.

A folder is written completely under another name and then renamed. If the program is stopped meanwhile, the older checkpoint is still
there.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from steadydetr.checkpoints.layouts import known_layouts
from steadydetr.config import FORMAT, check_format, from_plain, to_plain
from steadydetr.data.transforms import EvalTransform, ShortestSide
from steadydetr.detectors import Detector, DetectorConfig
from steadydetr.files import UNFINISHED, first_line, remove_tree, umask, write_bytes, write_json
from steadydetr.finite import tensors_in, where_not_finite
from steadydetr.kinds import register

WEIGHTS, CONFIG, STATE, PROGRESS = "model.safetensors", "config.json", "training_state.pt", "progress.pt"


@register("detector-card")
@dataclass(frozen=True)
class DetectorCard:
    """What config.json holds: all that is needed beside the weights to use a detector."""

    detector: DetectorConfig
    classes: tuple[str, ...]  # names of the classes, in the order of their logits
    category_ids: tuple[int, ...]  # of the same classes in the annotations of the data, and therefore in COCO results
    resize: EvalTransform = ShortestSide()
    top: int = 300  # detections of an image at most
    nms: float | None = None  # IoU above which the lower-scored of two detections of a class is removed; None: none is


@dataclass(frozen=True)
class LoadedDetector:
    """A detector in evaluation mode and the card from beside its weights."""

    detector: Detector
    card: DetectorCard


def save_detector(
    folder: Path,
    state: Mapping[str, Tensor],
    card: DetectorCard,
    extra: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder. An older one in its place is removed only when the new one is complete.

    Args:
        extra: the state of the training, for resuming. `load_training_state` reads it with `weights_only`, so it may hold only tensors
            and plain values.
        progress: where the run is, of the same kinds of values; `save_progress` can replace it without the rest.

    Raises:
        OSError: it cannot be written, because the disk is full for instance; what was there is as it was.
    """
    with reported_writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=UNFINISHED, dir=folder.parent))
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, fresh / WEIGHTS)
            write_json(fresh / CONFIG, {"format": FORMAT} | to_plain(card, "the checkpoint's config"))
            if extra is not None:
                torch.save({"format": FORMAT} | dict(extra), fresh / STATE)
            if progress is not None:
                torch.save({"format": FORMAT} | dict(progress), fresh / PROGRESS)
            for path in fresh.iterdir():
                path.chmod(0o666 & ~umask())
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            fresh.chmod(0o777 & ~umask())
            _replace_folder(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def save_progress(folder: Path, progress: Mapping[str, Any]) -> None:
    """Replace only where the run is, in a checkpoint that `save_detector` wrote; the weights stay."""
    content = io.BytesIO()
    torch.save({"format": FORMAT} | dict(progress), content)
    with reported_writing(folder):
        write_bytes(folder / PROGRESS, content.getvalue())


@contextmanager
def reported_writing(folder: Path) -> Iterator[None]:
    """Whatever a library raises where it cannot write becomes an OSError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "write" not in str(error):
            raise
        reason = first_line(error)
        raise OSError(f"the checkpoint {folder} cannot be written: {reason}. What was saved before is as it was") from error


def _replace_folder(fresh: Path, folder: Path) -> None:
    """Put the folder `fresh` in the place of `folder`; a link there is replaced, what it leads to stays as it is.

    This takes two renames. If the program is stopped between them, the old folder is left at `.NAME.old`, where `find_checkpoint` looks
    too.
    """
    old = folder.with_name(f".{folder.name}.old")
    remove_tree(old)
    if os.path.lexists(folder):
        os.rename(folder, old)
    os.rename(fresh, folder)
    remove_tree(old)


def find_checkpoint(path: Path, prefer: tuple[str, ...] = ("best", "last")) -> Path:
    """The checkpoint folder for a path that a user gave: the path itself, or if it is the folder of a run, a checkpoint in it.

    Args:
        prefer: names of a run's checkpoints; the first that exists is taken.

    Raises:
        FileNotFoundError: there is no checkpoint; says what was looked for.
    """
    candidates = [path, *(path / name for name in prefer), *(path / f".{name}.old" for name in prefer)]
    for candidate in candidates:
        if (candidate / WEIGHTS).exists() and (candidate / CONFIG).exists():
            return candidate
    if path.is_file():
        raise FileNotFoundError(
            f"{path} is a file; a checkpoint is a folder with {WEIGHTS} and {CONFIG}. `steadydetr convert {path} FOLDER` makes one of a"
            f" checkpoint of another project: {known_layouts()}"
        )
    where = f"{path} holds no checkpoint" if path.exists() else f"{path} does not exist"
    raise FileNotFoundError(f"{where}: expected {WEIGHTS} and {CONFIG} in it, or in {' or '.join(prefer)} below it")


def choose_device(name: torch.device | str) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one, otherwise the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> LoadedDetector:
    """The detector of a run (its best checkpoint) or of a checkpoint folder, in evaluation mode.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file of it is damaged or of another version; says which.
    """
    folder = find_checkpoint(Path(path).expanduser())
    card = read_card(folder)
    detector = card.detector.without_pretrained().build(len(card.classes))
    load_weights(detector, folder)
    return LoadedDetector(detector.eval().to(choose_device(device)), card)


def read_card(folder: Path) -> DetectorCard:
    """The card of a checkpoint folder.

    Raises:
        ValueError: config.json is damaged, of another version, or not that of a checkpoint.
    """
    try:
        card = from_plain(json.loads((folder / CONFIG).read_text()), str(folder / CONFIG))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(card, DetectorCard):
        raise ValueError(f"{folder / CONFIG} is not that of a checkpoint but a {type(card).__name__}")
    return card


def load_weights(detector: Detector, folder: Path) -> None:
    """Load a checkpoint folder's weights into a detector.

    Raises:
        ValueError: the file is damaged, holds NaN or infinite values, or has other parameters than the detector; lists them.
    """
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    _refuse_not_finite(state, folder / WEIGHTS)
    missing, unexpected = detector.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{folder / WEIGHTS} does not fit its {CONFIG}: missing {missing}, left over {unexpected}")


def load_training_state(folder: Path) -> dict[str, Any]:
    """The state of the training that `save_detector` was given as `extra`.

    Raises:
        FileNotFoundError: there is none: the detector can be used, but its training cannot be resumed.
        ValueError: it holds NaN or infinite values, or is of a newer format.
    """
    if not (folder / STATE).exists():
        raise FileNotFoundError(f"{folder} has no {STATE}: it can be evaluated but not resumed from")
    state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    check_format(state, str(folder / STATE))
    _refuse_not_finite(dict(tensors_in(state)), folder / STATE)
    return state


def _refuse_not_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError if one of the tensors that were read from the file is not finite."""
    if found := where_not_finite(tensors):
        raise ValueError(f"{path} is of no use: {found} hold NaN or infinite values. Take an earlier checkpoint, such as best of the run")


def load_progress(folder: Path) -> dict[str, Any]:
    """Where the run was when a checkpoint of it was written; version 0.1 kept it in the state of the training.

    Raises:
        FileNotFoundError: the folder is no checkpoint of a run.
    """
    if not (folder / PROGRESS).exists():
        progress: dict[str, Any] = load_training_state(folder)["state"]
        return progress
    progress = torch.load(folder / PROGRESS, map_location="cpu", weights_only=True)
    check_format(progress, str(folder / PROGRESS))
    return {name: value for name, value in progress.items() if name != "format"}
