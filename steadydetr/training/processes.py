"""What the processes of a run share: decisions, errors, waiting for the main process, and the report of a process that is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import distributed

from steadydetr.devices import choose_device

T = TypeVar("T")
STEP_LIMIT = timedelta(minutes=30)  # that a process waits for the others in a step; more than loading may take (data.timeout)
MAIN_WORK_LIMIT = timedelta(hours=24)  # that the others wait while the main process measures and saves
DEVICE = "ACCELERATE_TORCH_DEVICE"  # as accelerate is told which one to use
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # environment variables in which torchrun gives a process its place
LAUNCHERS = (  # those of Open MPI, of Intel MPI and MPICH, and of srun, which sets them for the tasks of a step, not for the job's script
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def make_accelerator(device: str | None) -> Accelerator:
    """The device of this process and its connection to the others, as torchrun, srun or mpirun has started them.

    accelerate keeps the device of a process's first run; it is reset, because a later run may have another.

    Args:
        device: None or "auto" for what accelerate finds, a GPU if there is one.

    Raises:
        ValueError: there is no such device, or it is a single GPU and several processes train; says what to use.
    """
    AcceleratorState._reset_state(reset_partial_state=not distributed.is_initialized())
    translate_launcher(os.environ)
    limits = InitProcessGroupKwargs(timeout=STEP_LIMIT)
    with _device_named(None if device in (None, "auto", "cpu") else str(device)):
        return Accelerator(mixed_precision="no", cpu=device == "cpu", step_scheduler_with_optimizer=False, kwargs_handlers=[limits])


@contextmanager
def _device_named(name: str | None) -> Iterator[None]:
    """Let accelerate take the device of that name inside of the block; of several processes each takes a GPU of its own."""
    if name is None:
        yield
        return
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        device = choose_device(name)
        if several and (device.index is not None or device.type != "cuda"):
            raise ValueError(f"--device {name} is one device, but several processes train, each on its own: give cuda, auto or cpu")
    except ValueError as error:
        raise error if os.environ.get("RANK", "0") == "0" else said_elsewhere(error) from None
    if several:
        yield
        return
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # compiled kernels are started on the current one
    before = os.environ.get(DEVICE)
    os.environ[DEVICE] = str(device)
    try:
        yield
    finally:
        os.environ.pop(DEVICE)
        if before is not None:
            os.environ[DEVICE] = before


def translate_launcher(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables from those of srun or mpirun. Without them, every process would train a run of its own.

    Raises:
        ValueError: they are on several machines, and MASTER_ADDR does not say where the first of them is.
    """
    if "RANK" in environment:
        return
    for names in LAUNCHERS:
        if all(name in environment for name in names) and int(environment[names[1]]) > 1:
            rank, world, local_rank, local_world = (environment[name].partition("(")[0].partition(",")[0] for name in names)  # 4(x2),1
            if world != local_world and "MASTER_ADDR" not in environment:
                error = ValueError(f"{world} processes on several machines: set MASTER_ADDR to the name of the first one, or use torchrun")
                raise error if rank == "0" else said_elsewhere(error)
            environment.setdefault("MASTER_ADDR", "127.0.0.1")
            environment.setdefault("MASTER_PORT", "29500")
            environment.update(zip(TORCHRUN, (rank, world, local_rank, local_world), strict=True))
            return


def main_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Call `decide` in the main process alone and return its result in all. An exception is raised in all, so that none waits for ever."""
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
    """Call `work` in every process and return its own result. If it fails in some, all raise the exception of the first of these."""
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
    """Call `read` in every process. Where one does not see the folder `place`, the main process reads and sends the result to all."""
    if any_process(accelerator, not place.exists()):
        return main_decides(accelerator, read)
    return together(accelerator, read)


def said_elsewhere(error: Exception) -> Exception:
    """Mark an exception that another process prints, so that the command line prints it only once."""
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
        self.group = distributed.new_group(backend="gloo", timeout=MAIN_WORK_LIMIT) if accelerator.num_processes > 1 else None

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.group is not None:
            distributed.barrier(cast(distributed.ProcessGroup, self.group))


class LostProcessError(ChildProcessError):
    """The connection to another process of the run ended, and so has that process."""


@contextmanager
def report_lost_process(accelerator: Accelerator) -> Iterator[None]:
    """Within the block, an error of the connection between processes becomes a LostProcessError, which the main process prints."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if accelerator.num_processes == 1 or not (isinstance(error, distributed.DistError) or "gloo" in text or "Connection" in text):
            raise
        lost = LostProcessError(f"process {accelerator.process_index} has lost another one, which failed or was killed: see its message")
        raise (lost if accelerator.is_main_process else said_elsewhere(lost)) from error
