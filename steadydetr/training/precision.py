"""How exactly a run computes: in bfloat16 or float32, and on GPUs products of float32 in TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from steadydetr.runs.training_config import TrainingConfig


def precision_of(device: torch.device) -> Literal["no", "bf16"]:
    """bf16 on a GPU that computes with bfloat16 itself; else no, on the CPU too."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def autocast(training: TrainingConfig, device: torch.device) -> torch.autocast:
    """The context in which a run computes what its precision allows in bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16")


@contextmanager
def tf32_on_gpus(allowed: bool) -> Iterator[None]:
    """Within the block, GPUs may compute products and convolutions of float32 in TF32, or may not. Nothing changes on the CPU."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32, convolutions.allow_tf32 = allowed, allowed
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def precision_remarks(training: TrainingConfig, device: torch.device) -> list[str]:
    """How exactly a GPU computes, where that is less than in float32."""
    if device.type != "cuda":
        return []
    found = ["What can be is computed in bfloat16 (training.precision)"] if training.precision == "bf16" else []
    return [*found, "Products of float32 are computed in TF32; --training.no-tf32 computes them in full"] if training.tf32 else found
