"""Servers on this machine that stand for others: of plain files, and of the Hugging Face Hub as far as downloads need it."""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Server:
    """What is served, and what was asked for."""

    address: str
    files: dict[str, bytes]  # by path, with the first slash
    moved: dict[str, str] = field(default_factory=dict)  # paths that lead to another address
    claimed: dict[str, int] = field(default_factory=dict)  # sizes that are told instead of the true ones; 0: none is
    hung_up: set[str] = field(default_factory=set)  # paths that are not answered at all
    asked: list[str] = field(default_factory=list)  # method and path of every request


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        served: Server = self.server.served  # type: ignore[attr-defined]
        served.asked.append(f"{self.command} {self.path}")
        if self.path in served.hung_up:
            self.close_connection = True
            return
        content = served.files.get(self.path)
        if self.path in served.moved:
            self.send_response(302)
            self.send_header("Location", served.moved[self.path])
            self.send_header("Content-Length", "0")
        elif content is None:
            known = any(path.startswith("/".join(self.path.split("/")[:3]) + "/") for path in served.files)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
        else:
            tag, part = hashlib.sha1(content).hexdigest(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if part:
                content = content[int(part[1]) : int(part[2]) + 1]
            self.send_response(206 if part else 200)
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if size := served.claimed.get(self.path, len(content)):
                self.send_header("Content-Length", str(size))
        self.send_header("Connection", "close")
        self.end_headers()
        if body and content is not None:
            self.wfile.write(content)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    """A server of these files, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    served = Server(f"http://127.0.0.1:{server.server_address[1]}", files)
    server.served = served  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def closed_port() -> str:
    """An address on this machine at which nothing answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Let huggingface_hub ask this address, with a cache of its own."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def of_repository(name: str, folder: Path) -> dict[str, bytes]:
    """The files of a folder as the Hub serves them, for its main branch and for its one commit."""
    return {f"/{name}/resolve/{r}/{path.name}": path.read_bytes() for path in folder.iterdir() for r in ("main", COMMIT)}
