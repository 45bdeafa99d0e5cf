"""Numeric cases of the original code: where they are, how they are read, and which of them a test knows.

The folder is $STEADYDETR_GOLDEN, by default ../shared/golden beside the repository.
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
GOLDEN = Path(os.environ.get("STEADYDETR_GOLDEN", ROOT.parent / "shared" / "golden"))
CLAIMED: list[str] = []  # patterns that some test runs


def cases(*patterns: str) -> list[Any]:
    """A test parameter for every file that matches a pattern relative to the golden folder; a skip where there is none."""
    CLAIMED.extend(patterns)
    found = sorted(path for pattern in patterns for path in GOLDEN.glob(pattern))
    if not found:
        reason = f"no golden case matches {', '.join(patterns)} in {GOLDEN}"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id=patterns[0])]
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in found]


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata's config and all tensors."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def unclaimed() -> list[Any]:
    """Files that no pattern covers, each as a parameter that says so by name."""
    files = sorted(path for path in GOLDEN.glob("*/*.safetensors"))
    names = [f"{path.parent.name}/{path.name}" for path in files]
    return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in CLAIMED)]
