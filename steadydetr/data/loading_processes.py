"""The processes that load images: started, watched, and ended together with the process that trains, however that ends.

Each has a socket of its own, over which batches come as their bytes, and a thread receives them ahead of time. So nothing lies in
shared memory, of which containers have little, and no lock is shared that a killed process could take with it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import multiprocessing
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from steadydetr.data.transport import receive, send
from steadydetr.kinds import plugins_in_use, use

Task = TypeVar("Task")
Result = TypeVar("Result")

PREFETCH = 2  # tasks that every process is given in advance
GRACE_SECONDS = 1.0  # that a process has to end by itself
POLL_SECONDS = 0.2  # between two looks at `stopped` and the time limit, while a result is waited for
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
FEWER_WORKERS = "use fewer loading processes (--data.workers, in eval and stability --workers; 0: none)"


@functools.cache
def cpu_share() -> int:
    """Processors for each of the training processes on this machine, at least 1; torchrun says how many processes there are."""
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class LoadingProcesses(Generic[Task, Result]):
    """Processes that call one function on task after task.

    They ignore SIGTERM, SIGHUP and Ctrl-C: schedulers and terminals signal the whole group, and the trainer wants to end its step. They
    end by `close`, when nobody refers to this object any more, and when the process that started them exits or is killed.

    Args:
        load: the function. Where processes are not forked it is pickled, once for each.
        name: gives the name of what a task loads, for error messages.
        count: processes.
        timeout: seconds that a result is waited for; 0: no limit.
        pin: receive tensors into page-locked memory.

    Raises:
        ChildProcessError: the system starts no further process.
        ValueError: `load` cannot be pickled.
    """

    def __init__(
        self, load: Callable[[Task], Result], name: Callable[[Task], str], count: int, timeout: float = 0.0, pin: bool = False
    ) -> None:
        self._name, self._timeout, self._sent = name, timeout, 0
        self._workers: list[_Worker] = []
        # This priority runs it at exit before multiprocessing waits for all processes that still live
        self._closing = Finalize(self, _end, (self._workers,), exitpriority=10)
        try:
            for number in range(count):
                _start(load, number, self._workers)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=_receive_all, args=(self._workers, pin), daemon=True).start()

    def map(self, tasks: Iterable[Task], stopped: Callable[[], bool] = lambda: False) -> Iterator[Result]:
        """The results in the order of the tasks. Every process gets up to `PREFETCH` tasks in advance.

        Args:
            stopped: called while a result is waited for; the results end if it returns True.

        Raises:
            ChildProcessError: a process has ended, or a result has not come in time; names what was loaded. All processes are ended.
            Exception: what `load` raised, with the traceback of its process as a note.
        """
        begun: deque[tuple[_Worker, Task, Future[Result]]] = deque()
        try:
            for task in tasks:
                begun.append(self._submit(task))
                if len(begun) > PREFETCH * len(self._workers):
                    yield self._result(*begun.popleft(), stopped)
            while begun:
                yield self._result(*begun.popleft(), stopped)
        except _StoppedError:
            return
        except (ChildProcessError, KeyboardInterrupt):  # an interrupt may have left a task half sent
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return not self._closing.still_active()

    def close(self) -> None:
        """End the processes; returns when they have ended."""
        self._closing()

    def _submit(self, task: Task) -> tuple[_Worker, Task, Future[Result]]:
        worker = self._workers[self._sent % len(self._workers)]
        self._sent += 1
        return worker, task, worker.submit(task)

    def _result(self, worker: _Worker, task: Task, future: Future[Result], stopped: Callable[[], bool]) -> Result:
        deadline = time.monotonic() + (self._timeout or math.inf)
        while not wait([future], POLL_SECONDS).done:
            if stopped():
                raise _StoppedError
            if time.monotonic() > deadline:
                raise ChildProcessError(
                    f"loading process {worker.number} has not loaded {self._name(task)} within {self._timeout:g} seconds:"
                    " look whether these files can be read, or allow more time by --data.timeout"
                )
        try:
            return future.result()
        except _HasEndedError:
            raise ChildProcessError(_why_it_ended(worker, self._name(task))) from None


def check_script() -> None:
    """Raise a ValueError if loading processes cannot be started from the user's script.

    Where processes are not forked, each begins by importing the script, and would then do all that the script does.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if multiprocessing.get_start_method() == "fork" or getattr(main, "__spec__", None) is not None or file is None:
        return
    with suppress(OSError):
        if b"__main__" not in Path(file).read_bytes():
            raise ValueError(
                f'{file} needs the line `if __name__ == "__main__":` above what it does, because every loading process begins by importing'
                " it; or load without processes, data.workers = 0"
            )


# In the process that trains


class _HasEndedError(Exception):
    """The process ended before it sent the result."""


class _StoppedError(Exception):
    """`stopped` has become true while a result was waited for."""


@dataclass
class _Worker:
    """A loading process as the training process sees it."""

    number: int
    process: BaseProcess
    connection: socket.socket
    waiting: deque[Future[Any]] = field(default_factory=deque)  # of the tasks that were sent, in order
    has_begun: bool = False  # it has sent a result

    def submit(self, task: Any) -> Future[Any]:
        """Send a task; the future gets its result."""
        future: Future[Any] = Future()
        self.waiting.append(future)
        try:
            send(self.connection, task)
        except OSError:
            self.give_up(_HasEndedError())
        return future

    def receive(self, pin: bool) -> None:
        """Receive one result, which belongs to the task that waits longest. Raises EOFError or OSError if the process has ended."""
        result = receive(self.connection, pin)
        self.has_begun = True
        if isinstance(result, _Failure):
            self.waiting.popleft().set_exception(result.error)
        else:
            self.waiting.popleft().set_result(result)

    def give_up(self, error: Exception) -> None:
        """End all futures with `error`, because no more results come."""
        with suppress(IndexError):  # two threads may empty it: that which submits and that which receives
            while True:
                self.waiting.popleft().set_exception(error)


def _start(load: Callable[[Any], Any], number: int, workers: list[_Worker]) -> None:
    """Start one more process and append it to `workers`."""
    forked = multiprocessing.get_start_method() == "fork"
    ours, theirs = socket.socketpair()
    # Linux ends a process with the thread that started it; the main thread lives as long as the process
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
    arguments = _ProcessArguments(number, theirs, tuple(plugins_in_use), load if forked else None, forked, parent)
    inherited = [ours, *(worker.connection for worker in workers)] if forked else []
    process = multiprocessing.Process(target=_serve, args=(arguments, inherited), daemon=True)
    try:
        with _held_signals():
            process.start()
    except OSError as error:
        ours.close()
        raise ChildProcessError(f"loading process {number} could not be started ({error}): {FEWER_WORKERS}") from error
    finally:
        theirs.close()
    workers.append(_Worker(number, process, ours))
    if not forked:
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has ended; the first result that is waited for tells why
                send(ours, load)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"what loads images cannot be sent to a loading process ({error}); --data.workers 0 needs none") from error


@contextmanager
def _held_signals() -> Iterator[None]:
    """Block the stop signals while a process is started, so that none reaches it before it ignores them."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _receive_all(workers: list[_Worker], pin: bool) -> None:
    """Receive results until every connection has ended, tensors into page-locked memory if `pin`."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.connection, selectors.EVENT_READ, worker)
        while selector.get_map():
            for key, _ in selector.select():
                worker = key.data
                try:
                    worker.receive(pin)
                except (EOFError, OSError):
                    selector.unregister(worker.connection)
                    worker.give_up(_HasEndedError())
                except Exception as error:  # such as a lack of memory; where the next result begins is then unknown
                    selector.unregister(worker.connection)
                    worker.give_up(error)


def _end(workers: list[_Worker]) -> None:
    """End the processes. Those that do not end by themselves are killed. None is waited for without limit."""
    for worker in workers:
        with suppress(OSError):
            worker.connection.shutdown(socket.SHUT_RDWR)
    for seconds, force in ((GRACE_SECONDS, False), (5 * GRACE_SECONDS, True)):
        deadline = time.monotonic() + seconds
        for worker in workers:
            if force and worker.process.is_alive():
                worker.process.kill()
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        worker.connection.close()


def _why_it_ended(worker: _Worker, what: str) -> str:
    """The error message for a process that has ended: why, what it loaded, and what to do."""
    worker.process.join(GRACE_SECONDS)
    code, who = worker.process.exitcode, f"loading process {worker.number}"
    if code == -9:
        return f"{who} was killed by signal 9, probably because memory ran out, while it loaded {what}: {FEWER_WORKERS} or a smaller batch"
    if code is not None and code < 0:
        return f"{who} was ended by signal {-code} ({signal.strsignal(-code)}) while it loaded {what}"
    if not worker.has_begun and multiprocessing.get_start_method() != "fork":
        script = getattr(sys.modules["__main__"], "__file__", "the script")
        return (
            f"{who} ended with exit code {code} as it started; what it printed above tells why. It imports {script}: what that does"
            f' must stand below `if __name__ == "__main__":`. Or {FEWER_WORKERS}'
        )
    return f"{who} ended with exit code {code} while it loaded {what}"


# In a loading process


@dataclass(frozen=True)
class _ProcessArguments:
    """What a loading process gets when it is started."""

    number: int
    connection: socket.socket
    plugins: tuple[str, ...]
    load: Callable[[Any], Any] | None  # None: it comes over the connection, after the plugins that it may need
    forked: bool
    parent: int | None  # the process to end with


@dataclass(frozen=True)
class _Failure:
    """Sent in place of a result: what `load` raised."""

    error: Exception


def _serve(arguments: _ProcessArguments, inherited: list[socket.socket]) -> None:
    """Receive tasks and send their results until the connection ends.

    Args:
        inherited: sockets of the training process, of which a fork has copies; they are closed here.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    _die_with(arguments.parent)
    for connection in inherited:
        connection.close()
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):
        load = arguments.load or _receive_load(arguments)
        while True:
            send(arguments.connection, _attempt(load, receive(arguments.connection), arguments.number))


def _die_with(parent: int | None) -> None:
    """Let Linux kill this process when its parent ends. Other systems end it when it finds its connection closed."""
    if sys.platform == "linux" and parent is not None and multiprocessing.get_start_method() != "forkserver":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _receive_load(arguments: _ProcessArguments) -> Callable[[Any], Any]:
    """The function to call; if it cannot be read, a function that raises the reason for every task."""
    try:
        for plugin in arguments.plugins:
            use(plugin)
        return receive(arguments.connection)
    except (EOFError, ConnectionError):
        raise
    except Exception as error:
        message = f"what loads images cannot be read in a loading process ({error}); --data.workers 0 needs none"

    def fail(task: Any) -> Any:
        raise ValueError(message)

    return fail


def _attempt(load: Callable[[Any], Any], task: Any, number: int) -> Any:
    """The result of a task, or what it raised as a `_Failure`, with the traceback as a note."""
    try:
        return load(task)
    except Exception as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        with suppress(Exception):  # some exceptions cannot be pickled, or come back from it
            error.add_note(f"In loading process {number}: {trace}")
            pickle.loads(pickle.dumps(error))
            return _Failure(error)
        replacement = RuntimeError(f"{type(error).__name__}: {error}")
        replacement.add_note(f"In loading process {number}: {trace}")
        return _Failure(replacement)
