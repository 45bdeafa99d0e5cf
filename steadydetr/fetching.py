"""Files from the network: fetched whole and checked, or not at all; where there is no network, an error within seconds.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener, getproxies, proxy_bypass

from filelock import FileLock

from steadydetr.files import one_line, printable, remove_unfinished, replacing

REACH_SECONDS = 5.0  # within which a host must answer
PAUSE_SECONDS = 30.0  # that may pass between two parts of a file
PART = 2**20  # bytes that are read at once
LOCK = ".lock"  # in the folder of a file: held by the process that fetches it
HUB_CONFIGS = ("config.json", "preprocessor_config.json")
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that a repository has


def cache_folder() -> Path:
    """Where fetched files lie: $STEADYDETR_CACHE, or else steadydetr/ in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("STEADYDETR_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "steadydetr"


def check_reachable(address: str) -> None:
    """Raise ConnectionError where the host of an address, or the proxy before it, does not answer within REACH_SECONDS.

    A thread waits for it, because looking up a name has time limits of its own.
    """
    host, port = _first_host(address)
    reached: list[bool] = []
    failed: list[OSError] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), REACH_SECONDS).close()
            reached.append(True)
        except OSError as error:
            failed.append(error)

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    if not reached:
        why = one_line(failed[0].strerror or failed[0], 100) if failed else f"no answer within {REACH_SECONDS:g} seconds"
        raise ConnectionError(f"{host} cannot be reached ({why})")


def _first_host(address: str) -> tuple[str, int]:
    """The host that a connection to an address is made to, and its port; a proxy where the environment names one."""
    parts = urlsplit(address)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def fetch_file(address: str, place: Path, most: int, sha256: str = "", scheme: str = "https") -> None:
    """Fetch the file at an address to `place`, unless it is there. Of several processes one fetches it, and the others wait.

    Args:
        most: bytes that it may have.
        sha256: of its content, or how that begins; empty: not known.
        scheme: which the address must have, and those that it leads to; tests take http.

    Raises:
        ValueError: another scheme, a file that is too large or has another digest. Nothing is kept.
        OSError: it cannot be fetched or written, or ended too early. Nothing is kept.
    """
    _check_scheme(address, scheme)
    if place.exists():
        return
    check_reachable(address)
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / LOCK):
        if place.exists():
            return
        remove_unfinished(place.parent)
        with replacing(place) as file:
            found = _download(address, file, most, scheme)
            if not found.startswith(sha256):
                raise ValueError(f"{address} has the SHA-256 {found} instead of {sha256}: it is damaged, or another file; it was not kept")


def _check_scheme(address: str, scheme: str) -> None:
    if urlsplit(address).scheme != scheme:
        raise ValueError(f"{printable(address)} is no {scheme} address, and others are not fetched")


class _OneScheme(HTTPRedirectHandler):
    """Follows an address that leads to another only to one of the same scheme."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        _check_scheme(newurl, self.scheme)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(address: str, file: IO[bytes], most: int, scheme: str) -> str:
    """Write what lies at an address into a file, and give its SHA-256."""
    digest, read = hashlib.sha256(), 0
    try:
        request = Request(address, headers={"User-Agent": "steadydetr"})
        with build_opener(_OneScheme(scheme)).open(request, timeout=PAUSE_SECONDS) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            with _progress(address, size) as advance:
                while size <= most and (part := answer.read(PART)):
                    read += len(part)
                    if read > most:
                        break
                    digest.update(part)
                    file.write(part)
                    advance(len(part))
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"{address} cannot be fetched ({network_reason(error)})") from None
    if max(size, read) > most:
        raise ValueError(f"{address} has more than {most / 1e6:.0f} MB, which it should not: it was not kept")
    if read < size:
        raise ConnectionError(f"{address} ended after {read} of {size} bytes")
    return digest.hexdigest()


def network_reason(error: Exception) -> str:
    """Why something of the network cannot be had, in one line, from an error of urllib."""
    return one_line(getattr(error, "reason", None) or error, 200) or type(error).__name__


@contextmanager
def _progress(address: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, or where that is no terminal one line; gives what counts further bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        print(f"fetching {address}" + (f", {size / 1e6:.0f} MB" if size else ""), file=sys.stderr)
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(address.rpartition("/")[2], total=size or None)
        yield lambda count: bar.advance(task, count)


def check_digest(path: Path, sha256: str) -> None:
    """Raise ValueError for a file whose SHA-256 does not begin with `sha256`."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise ValueError(f"{path} has the SHA-256 {found} instead of {sha256}: it is damaged, or another file")


@contextmanager
def hub_or_cache() -> Iterator[str]:
    """Within the block, huggingface_hub takes what is in its cache where the Hub cannot be reached, instead of trying for a minute.

    Gives why the Hub cannot be reached; empty where it can.
    """
    from huggingface_hub import constants

    before, why = constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set"
    if not before:
        try:
            check_reachable(constants.ENDPOINT)
            why = ""
        except ConnectionError as error:
            why = str(error)
    constants.HF_HUB_OFFLINE = bool(why)
    try:
        yield why
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_folder(repository: str, revision: str | None = None, accept: Callable[[Path], None] = lambda folder: None) -> Path:
    """The folder in the cache of huggingface_hub with the configs and the weights of a repository; fetched where they are not there.

    Args:
        revision: a branch, tag or commit; None: the main branch.
        accept: is given the folder when the configs are in it, and raises where the weights are not to be fetched.

    Raises:
        ValueError: there is no such repository or revision, or it lacks a file; names what is missing.
        OSError: it is neither in the cache nor to be reached, or cannot be fetched.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    with hub_or_cache() as why:
        try:
            folder = _hub_files(repository, revision, accept, offline=bool(why))
        except LocalEntryNotFoundError as error:
            raise ConnectionError(why or one_line(error, 300)) from None
        except GatedRepoError:
            raise ValueError(f"{repository} asks for consent: give it on its page, and run `hf auth login`") from None
        except RepositoryNotFoundError:
            raise ValueError(f"the Hub has no model {repository}, or it is private: `hf auth login` gives access to yours") from None
        except RevisionNotFoundError:
            raise ValueError(f"{repository} has no branch, tag or commit {revision}") from None
        except HFValidationError as error:
            raise ValueError(one_line(error, 300)) from None
        except (ValueError, FileNotFoundError):
            raise
        except Exception as error:  # of the libraries by which it speaks to the network, which have changed more than once
            raise ConnectionError(f"{repository} cannot be fetched ({type(error).__name__}: {one_line(error, 300)})") from None
    return folder


def _hub_files(repository: str, revision: str | None, accept: Callable[[Path], None], offline: bool) -> Path:
    config = _hub_file(repository, HUB_CONFIGS[0], revision)
    if config is None:
        raise ValueError(f"{repository} has no {HUB_CONFIGS[0]}, which tells what its weights are")
    commit = config.parent.name  # all files are of one commit, also where the branch moves on meanwhile
    for name in HUB_CONFIGS[1:]:
        _hub_file(repository, name, commit, may_lack=offline)
    accept(config.parent)
    for name in HUB_WEIGHTS:
        if _hub_file(repository, name, commit, may_lack=offline and name != HUB_WEIGHTS[-1]) is not None:
            return config.parent
    raise ValueError(f"{repository} has no {' or '.join(HUB_WEIGHTS)}; weights in several files are not read")


def _hub_file(repository: str, name: str, revision: str | None, may_lack: bool = False) -> Path | None:
    """The place of a file in the cache; None where the repository has no such file, or where the cache may lack it and does."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError:
        if may_lack:
            return None
        raise
    except EntryNotFoundError:
        return None
