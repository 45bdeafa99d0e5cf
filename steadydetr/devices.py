"""The device that a user names."""

from __future__ import annotations

import torch

from steadydetr.files import one_line


def choose_device(name: torch.device | str) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one, Apple's too, otherwise the CPU.

    Raises:
        ValueError: torch does not know it, or this machine has none; says what to use.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device has errors of its own
        if str(name).startswith("cuda"):
            found = torch.cuda.device_count() if torch.cuda.is_available() else 0
            have = f"there is no GPU here that torch can use ({str(error).partition('.')[0]})"
            have = f"this machine has the GPUs cuda:0 to cuda:{found - 1}" if found else have
            raise ValueError(one_line(f"--device {name}: {have}; use --device cpu or auto", 400)) from None
        raise ValueError(one_line(f"--device {name}: torch has no such device here; use --device cpu, cuda or auto", 400)) from None
    return device
