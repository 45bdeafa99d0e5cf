"""Checkpoints: folders with the weights of a detector, and in a run with what training needs to go on.

model.safetensors    the weights of the detector
config.json          its `DetectorCard`
training_state.pt    in a run: the method, the optimiser and the averaged weights
progress.pt          in a run: where it was, and what it had evaluated

A checkpoint is written completely under another name and then renamed, so that the older one is lost at no moment.
"""

from __future__ import annotations

import io
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
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from steadydetr.checkpoints.card import DetectorCard, read_card
from steadydetr.checkpoints.finding import CONFIG, WEIGHTS, find_checkpoint, replaced_place
from steadydetr.config import FORMAT, check_format, holds_foreign_part, to_plain
from steadydetr.detectors import Detector
from steadydetr.devices import choose_device
from steadydetr.files import (
    UNFINISHED,
    listed,
    one_line,
    printable,
    remove_tree,
    umask,
    write_bytes,
    write_json,
)
from steadydetr.finite import tensors_in, where_not_finite
from steadydetr.tensor_files import read_pickled, read_tensors, tensor_shapes

STATE, PROGRESS = "training_state.pt", "progress.pt"
PARAMETERS_PER_TENSOR = 8  # that a detector may make while it is built, for every tensor in its file
STATE_PARTS: dict[str, Any] = {"method": dict, "optimiser": dict, "average": (dict, type(None))}  # names and types in a training state


@dataclass(frozen=True)
class LoadedDetector:
    """A detector in evaluation mode and the card from beside its weights."""

    detector: Detector
    card: DetectorCard


def save_detector(
    folder: Path,
    state: Mapping[str, Tensor],
    card: DetectorCard,
    training_state: Mapping[str, Any] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder. An older one in its place is removed only when the new one is complete.

    Args:
        training_state: what resuming needs. `load_training_state` reads it with `weights_only`, so it may hold only tensors and plain
            values.
        progress: where the run is, of the same kinds of values; `save_progress` can replace it without the rest.

    Raises:
        OSError: it cannot be written, because the disk is full for instance; what was there is as it was.
    """
    with named_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=UNFINISHED, dir=folder.parent))
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, fresh / WEIGHTS)
            write_json(fresh / CONFIG, {"format": FORMAT} | to_plain(card, "the checkpoint's config"))
            if training_state is not None:
                torch.save({"format": FORMAT} | dict(training_state), fresh / STATE)
            if progress is not None:
                torch.save({"format": FORMAT} | dict(progress), fresh / PROGRESS)
            for path in fresh.iterdir():
                with open(path, "r+b") as file:  # Windows writes out no file that is open for reading only
                    os.fsync(file.fileno())
                path.chmod(0o666 & ~umask())
            fresh.chmod(0o777 & ~umask())
            _replace_folder(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def save_progress(folder: Path, progress: Mapping[str, Any]) -> None:
    """Replace the progress in a checkpoint that `save_detector` wrote; the weights and the training state stay."""
    content = io.BytesIO()
    torch.save({"format": FORMAT} | dict(progress), content)
    with named_write_errors(folder):
        write_bytes(folder / PROGRESS, content.getvalue())


@contextmanager
def named_write_errors(folder: Path) -> Iterator[None]:
    """Within the block, an error of a library that cannot write becomes an OSError that names the checkpoint's folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "write" not in str(error):
            raise
        reason = one_line(error, 300).rstrip(".")
        raise OSError(f"the checkpoint {folder} cannot be written: {reason}. What was saved before is as it was") from error


def _replace_folder(fresh: Path, folder: Path) -> None:
    """Put the folder `fresh` in the place of `folder`; a link there is replaced, what it leads to stays as it is.

    This takes two renames. If the program is stopped between them, the old folder is left at `.NAME.old`, where `find_checkpoint` looks
    too, and from where `restore_replaced` brings it back.
    """
    old = replaced_place(folder)
    remove_tree(old)
    if os.path.lexists(folder):
        os.rename(folder, old)
    os.rename(fresh, folder)
    remove_tree(old)


def restore_replaced(folder: Path) -> None:
    """Rename an older checkpoint back, if the program was killed between the two renames of `_replace_folder`."""
    old = replaced_place(folder)
    if old.is_dir() and not old.is_symlink() and not os.path.lexists(folder):
        os.rename(old, folder)


def load_detector(path: str | Path, device: torch.device | str = "cpu") -> LoadedDetector:
    """The detector of a run (its best checkpoint) or of a checkpoint folder, in evaluation mode.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file of it is damaged or of another version, or there is no such device; says which.
    """
    chosen = choose_device(device)
    folder = find_checkpoint(Path(path).expanduser())
    card = read_card(folder)
    check_sizes(card, folder)
    detector = card.detector.without_pretrained().build(len(card.classes))
    load_weights(detector, folder)
    return LoadedDetector(detector.eval().to(chosen), card)


def check_sizes(card: DetectorCard, folder: Path) -> None:
    """Compare what config.json would build with the header of the weights, before either takes memory.

    Raises:
        ValueError: the header is damaged, or tells of other parameters; lists them.
    """
    shapes = tensor_shapes(folder / WEIGHTS)
    try:
        with torch.device("meta"), at_most_parameters(PARAMETERS_PER_TENSOR * len(shapes) + 1000):
            planned = card.detector.without_pretrained().build(len(card.classes))
    except Exception as error:
        if holds_foreign_part(card.detector):
            return  # not every plugin's detector can be built without values; its sizes are its own affair
        raise ValueError(f"{printable(folder / CONFIG)}: its detector cannot be built: {one_line(error, 500)}") from None
    check_fit({name: tuple(tensor.shape) for name, tensor in planned.state_dict().items()}, shapes, folder / WEIGHTS)


def read_checkpoint(folder: Path) -> tuple[DetectorCard, dict[str, Tensor]]:
    """The card and the tensors of a checkpoint folder, which fit each other; no detector is built.

    Raises:
        ValueError: a file of it is damaged or of another version, they do not fit, or a value is not finite; says which.
    """
    card = read_card(folder)
    check_sizes(card, folder)
    state = read_tensors(folder / WEIGHTS)
    _refuse_not_finite(state, folder / WEIGHTS)
    return card, state


@contextmanager
def at_most_parameters(number: int) -> Iterator[None]:
    """Within the block, ValueError as soon as more than `number` parameters have been made, before they fill the memory."""
    left = number

    def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it has more than {number} parameters, many more than {WEIGHTS} has")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_fit(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Compare the tensors of a detector with those of a file, by name and shape.

    Raises:
        ValueError: tensors are missing, left over or of another shape; lists them and names the file at `path`.
    """
    wrong = [f"{name} {list(found[name])} for {list(shape)}" for name, shape in wanted.items() if name in found and found[name] != shape]
    problems = {"missing": sorted(wanted.keys() - found.keys()), "left over": sorted(found.keys() - wanted.keys()), "shapes": wrong}
    if any(problems.values()):
        lists = "; ".join(f"{what}: {listed(names, 10)}" for what, names in problems.items() if names)
        raise ValueError(f"{printable(path)} does not fit its {CONFIG}: {printable(lists)}")


def load_weights(detector: Detector, folder: Path) -> None:
    """Load a checkpoint folder's weights into a detector.

    Raises:
        ValueError: the file is damaged, holds NaN or infinite values, or has other parameters than the detector; lists them.
    """
    load_state(detector, read_tensors(folder / WEIGHTS), folder / WEIGHTS)


def load_state(detector: Detector, state: Mapping[str, Any], path: Path) -> None:
    """Load tensors that were read from `path`; a ValueError lists those that are missing, left over, of another shape or not finite."""
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{printable(path)} is damaged: it holds weights that are no tensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_fit({name: tuple(tensor.shape) for name, tensor in detector.state_dict().items()}, shapes, path)
    _refuse_not_finite(state, path)
    detector.load_state_dict(state)


def load_training_state(folder: Path) -> dict[str, Any]:
    """What `save_detector` was given as `training_state`.

    Raises:
        FileNotFoundError: there is none: the detector can be used, but its training cannot be resumed.
        ValueError: it is damaged, of another version, or holds NaN or infinite values; names it.
    """
    path = folder / STATE
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {STATE}: it can be evaluated but not resumed from")
    state = _read_dictionary(path)
    if wrong := [name for name, kind in STATE_PARTS.items() if not isinstance(state.get(name, ...), kind)]:
        raise ValueError(f"{printable(path)} is damaged, or of an unknown version: its {', '.join(wrong)} is missing or no dictionary")
    _refuse_not_finite(dict(tensors_in(state)), path)
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
        progress = load_training_state(folder).get("state")
        if not isinstance(progress, dict):
            raise ValueError(f"{printable(folder / STATE)} is damaged: it does not say where the run was")
        return progress
    return {name: value for name, value in _read_dictionary(folder / PROGRESS).items() if name != "format"}


def _read_dictionary(path: Path) -> dict[str, Any]:
    """What `save_detector` or `save_progress` wrote with torch; a ValueError names a damaged file or one of another version."""
    content = read_pickled(path)
    if not isinstance(content, dict):
        raise ValueError(f"{printable(path)} is damaged: it holds a {type(content).__name__} instead of a dictionary")
    check_format(content, printable(path))
    return content
