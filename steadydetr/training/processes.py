"""What the processes of a run do together: decide, fail, wait for the main one, and notice that one is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import distributed

T = TypeVar("T")
STEP_LIMIT = timedelta(minutes=30)  # that a process waits for the others in a step; more than loading may take (data.timeout)
LONE_WORK_LIMIT = timedelta(hours=24)  # that the others wait while the main process measures and saves


def make_accelerator(precision: str, device: str | None) -> Accelerator:
    """The device and the other processes of this one, which torchrun or the like has told it of.

    accelerate keeps the precision and the device of the first run of a process, which a later one may want otherwise.
    """
    AcceleratorState._reset_state(reset_partial_state=not distributed.is_initialized())
    limits = InitProcessGroupKwargs(timeout=STEP_LIMIT)
    return Accelerator(mixed_precision=precision, cpu=device == "cpu", step_scheduler_with_optimizer=False, kwargs_handlers=[limits])


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
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1] if accelerator.is_main_process else said_elsewhere(outcome[1])
    return outcome[0]  # type: ignore[no-any-return]


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` gives in this process. If it fails in any, all raise what the first of them has met."""
    if accelerator.num_processes == 1:
        return work()
    value, own = None, None
    try:
        value = work()
    except Exception as error:
        own = error
    errors: list[Exception | None] = [None] * accelerator.num_processes
    distributed.all_gather_object(errors, own)
    for process, found in enumerate(errors):
        if found is not None:
            raise own if own is not None and process == accelerator.process_index else said_elsewhere(found)
    return value  # type: ignore[return-value]


def read_everywhere(accelerator: Accelerator, place: Path, read: Callable[[], T]) -> T:
    """What `read` reads from `place`, in all processes; from the main one where another does not see the place."""
    if any_process(accelerator, not place.exists()):
        return main_decides(accelerator, read)
    return together(accelerator, read)


def said_elsewhere(error: Exception) -> Exception:
    """The exception, marked as one that another process tells the user of."""
    error.said_elsewhere = True  # type: ignore[attr-defined]
    return error


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in any process. All must call this at the same point."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.gather(torch.tensor([int(flag)], device=accelerator.device)).max())


class MainWork:
    """Work that the main process does alone, for as long as it takes, while the others wait."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.group = distributed.new_group(backend="gloo", timeout=LONE_WORK_LIMIT) if accelerator.num_processes > 1 else None

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.group is not None:
            distributed.barrier(cast(distributed.ProcessGroup, self.group))


class LostProcessError(ChildProcessError):
    """The connection to another process of the run ended, and so has that process."""


@contextmanager
def losses_of_processes_named(accelerator: Accelerator) -> Iterator[None]:
    """An exception of the network inside becomes one line, which the main process says."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if accelerator.num_processes == 1 or not (isinstance(error, distributed.DistError) or "gloo" in text or "Connection" in text):
            raise
        lost = LostProcessError(f"process {accelerator.process_index} has lost another one, which failed or was killed: see its message")
        raise (lost if accelerator.is_main_process else said_elsewhere(lost)) from error
