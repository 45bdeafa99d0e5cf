"""What a run's folder is made of, and whether a new run can begin in one: known without importing anything that trains."""

from __future__ import annotations

import os
from pathlib import Path

from steadydetr.files import folder_made_by, is_free, listed

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
LAST, BEST, AVERAGE = "last", "best", "ema"
COMMAND = "train"  # whose mark a run's folder carries


def refuse_another_run(folder: Path) -> None:
    """Raise FileExistsError unless a new run can be started in the folder: it is not there, empty, or was claimed and left so.

    Between claiming it and config.json nothing of a run is written, so that a folder with more has lost its config.json.
    """
    if (folder / CONFIG).exists():
        raise FileExistsError(f"{folder} already holds a run: go on with it by --resume, or choose another --output")
    if folder_made_by(folder) != COMMAND and not is_free(folder):
        what = "not empty, and what it holds is no run" if folder.is_dir() else "not a folder"
        raise FileExistsError(f"{folder} is {what}: choose another --output")
    if left := [name for name in (LAST, BEST, AVERAGE, METRICS, SUMMARY) if os.path.lexists(folder / name)]:
        what = f"{folder} holds {listed(left)} of a run, but its {CONFIG} is gone"
        raise FileExistsError(f"{what}: bring that back to go on by --resume, or choose another --output")
