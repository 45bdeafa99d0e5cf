"""What the processes of a run have to agree on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

T = TypeVar("T")


def main_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What `decide` gives in the main process, in all processes; an exception of it is raised in all, so that none waits for ever."""
    if accelerator.num_processes == 1:
        return decide()
    outcome: list[Any] = [None, None]  # the value, an exception
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process. All must call this at the same point."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([int(flag)], device=accelerator.device)).max())
