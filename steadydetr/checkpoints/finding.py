"""Where a checkpoint is, for a path that a user gave: known without importing anything that reads weights."""

from __future__ import annotations

from pathlib import Path

from steadydetr.checkpoints.layouts import known_layouts

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def replaced_place(folder: Path) -> Path:
    """Where the checkpoint `folder` is while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def find_checkpoint(path: Path, prefer: tuple[str, ...] = ("best", "last")) -> Path:
    """The checkpoint folder for a path that a user gave: the path itself, or if it is the folder of a run, a checkpoint in it.

    Args:
        prefer: names of a run's checkpoints; the first that exists is taken.

    Raises:
        FileNotFoundError: there is no checkpoint; says what was looked for.
    """
    candidates = [path, *(place for name in prefer for place in (path / name, replaced_place(path / name)))]
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
