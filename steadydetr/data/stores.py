"""Where images lie if not as files in the data folder: in tar files, or at an address that fsspec knows, or both."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from steadydetr.data.folder import DataFolder
from steadydetr.data.picture_inputs import is_address
from steadydetr.data.reading import expanded
from steadydetr.fetching import check_reachable
from steadydetr.files import one_line, printable
from steadydetr.limits import Limits

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

TIMES = ("mtime", "LastModified", "last_modified", "updated", "created", "ETag", "etag")  # what file systems call what changes with a file
Stamp = str  # size and time of a file, by which it is known not to have changed


class Store(Protocol):
    """Files in one place. It holds no connection, because loading processes take it along."""

    def tars(self) -> list[str]:
        """The tar files of the place in the order of their names; none where it is a folder of other files."""

    def stamp(self, file: str) -> Stamp: ...

    def open(self, file: str) -> IO[bytes]: ...

    def read(self, file: str, start: int = 0, length: int | None = None, stamp: Stamp = "") -> bytes:
        """A part of a file, or all of it. Raises ValueError where it cannot be read, or has changed since it had this stamp."""


def store_of(where: str, limits: Limits) -> Store:
    """The store at a path or an address: a folder, a tar file, or a pattern of tar files such as `shards/*.tar`."""
    return Remote(where, limits) if is_address(where) else Local(str(expanded(where)), limits)


@contextmanager
def named_errors(file: str) -> Iterator[None]:
    """Within the block, what is wrong with a file is a ValueError that names it. The libraries of fsspec raise exceptions of any class."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"there is no file {printable(file)}") from None
    except ValueError as error:
        raise error if printable(file) in str(error) else ValueError(f"cannot read {printable(file)}: {one_line(error, 300)}") from error
    except Exception as error:
        raise ValueError(f"cannot read {printable(file)}: {one_line(error, 300) or type(error).__name__}") from error


@dataclass(frozen=True)
class Local:
    """On this machine."""

    where: str
    limits: Limits

    def tars(self) -> list[str]:
        names = glob.glob(os.path.join(glob.escape(self.where), "*.t*") if os.path.isdir(self.where) else self.where)
        return sorted(name for name in names if _is_tar(name))

    def stamp(self, file: str) -> Stamp:
        with named_errors(file):
            self._check(file)
            return _stamp(os.stat(file))

    def open(self, file: str) -> IO[bytes]:
        return open(file, "rb")

    def read(self, file: str, start: int = 0, length: int | None = None, stamp: Stamp = "") -> bytes:
        with named_errors(file), open(file, "rb") as opened:
            found = os.fstat(opened.fileno())
            if stamp and _stamp(found) != stamp:
                raise ValueError(f"{printable(file)} has changed since the run has begun: start again")
            opened.seek(start)
            return opened.read(found.st_size if length is None else length)

    def _check(self, file: str) -> None:
        """A link among the tar files leads nowhere else, unless that is allowed."""
        root = self.where if os.path.isdir(self.where) else os.path.dirname(self.where.partition("*")[0]) or "."
        DataFolder(Path(root), self.limits).check_inside(Path(file))


def _stamp(found: os.stat_result) -> Stamp:
    return f"{found.st_size} {found.st_mtime_ns}"


@dataclass(frozen=True)
class Remote:
    """At an address. The user's own words alone may name one (D-94)."""

    where: str
    limits: Limits

    def tars(self) -> list[str]:
        with named_errors(self.where):
            if self.where.lower().startswith(("http://", "https://")):
                check_reachable(self.where)
            if "*" not in self.where:  # a folder is not listed, which can take minutes
                return [self.where] if _is_tar(self.where) else []
            system, place = self._system()
            return sorted(system.unstrip_protocol(name) for name in system.glob(place) if _is_tar(name))

    def stamp(self, file: str) -> Stamp:
        with named_errors(file):
            info = self._system()[0].info(file)
            return " ".join(str(info[name]) for name in ("size", *TIMES) if info.get(name))

    def open(self, file: str) -> IO[bytes]:
        opened: IO[bytes] = self._system()[0].open(file, "rb")
        return opened

    def read(self, file: str, start: int = 0, length: int | None = None, stamp: Stamp = "") -> bytes:
        with named_errors(file):
            end = None if length is None else start + length
            content: bytes = self._system()[0].cat_file(file, start or None, end)
            return content

    def _system(self) -> tuple[AbstractFileSystem, str]:
        """The file system, which fsspec keeps for each process, and the path in it."""
        try:
            import fsspec
        except ImportError as error:
            raise ValueError(f"{printable(self.where)} needs the package fsspec: pip install 'steadydetr[fsspec]'") from error
        found: tuple[Any, str] = fsspec.url_to_fs(self.where)
        return found


def names_tar_files(where: str) -> bool:
    """Whether a place names tar files, rather than a folder."""
    return "*" in where or _is_tar(where)


def _is_tar(name: str) -> bool:
    """Whether a file is called as tar files are, compressed ones too, which are then refused by name."""
    return name.lower().endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"))
