"""Numeric cases of the original code: where they are, how they are read, and which of them a test knows.

A few that decide are in the folder `golden` beside this file. All of them are outside the repository: in $STEADYDETR_GOLDEN, by default
../shared/golden beside it, if that is there.
"""

from __future__ import annotations

import fnmatch
import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).with_name("golden")
OUTSIDE = Path(os.environ.get("STEADYDETR_GOLDEN", ROOT.parent / "shared" / "golden"))
CLAIMED: list[str] = []  # patterns that some test runs


def files(*patterns: str) -> list[Path]:
    """The files that match a pattern relative to their folder, sorted by that name; one that both folders have is taken from outside."""
    found = {path.relative_to(folder): path for folder in (INSIDE, OUTSIDE) for pattern in patterns for path in folder.glob(pattern)}
    return [found[name] for name in sorted(found)]


def cases(*patterns: str) -> list[Any]:
    """A test parameter for every file that matches a pattern; a skip where there is none."""
    CLAIMED.extend(patterns)
    found = files(*patterns)
    if not found:
        reason = f"no golden case matches {', '.join(patterns)} in {INSIDE} or {OUTSIDE}"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id=patterns[0])]
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in found]


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata's config and all tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def case_names() -> list[str]:
    """Every case that is there, as `folder/file`."""
    return [f"{path.parent.name}/{path.name}" for path in files("*/*.safetensors")]


def is_claimed(name: str) -> bool:
    """Whether some test runs the case; the modules of those tests must have been imported."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in CLAIMED)
