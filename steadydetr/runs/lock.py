"""The lock of a run's folder, so that only one process writes into it."""

from __future__ import annotations

import os
import socket
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from steadydetr.files import printable, read_json, write_json

LOCK, HOLDER = ".lock", ".lock-holder.json"


class FolderLock:
    """The right to write into a folder, given back by `release`, by leaving a `with`, and by the end of the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / LOCK, thread_local=False)

    def take(self) -> None:
        """Take the lock of the folder, which must be there; nothing happens where it is taken already.

        Raises:
            FileExistsError: another process has it; names its host, its id and since when.
        """
        if self._lock.is_locked:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where the file system knows no locks, filelock makes one out of a file's existence
                self._lock.acquire(timeout=0)
        except Timeout:
            busy = f"{self.folder} is in use by {self.holder()}"
            raise FileExistsError(f"{busy}: wait until that has ended, or choose another --output") from None
        started = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        write_json(self.folder / HOLDER, {"host": socket.gethostname(), "pid": os.getpid(), "since": started})

    def holder(self) -> str:
        """Who has the lock, in words."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = read_json(self.folder / HOLDER, 10_000)
            return printable(f"process {holder['pid']} on {holder['host']}, since {holder['since']}")
        return "another process"

    def release(self) -> None:
        if self._lock.is_locked:
            (self.folder / HOLDER).unlink(missing_ok=True)
            self._lock.release(force=True)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
