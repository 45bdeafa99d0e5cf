"""Files from the network, from a server on this machine: whole and checked, or not at all, and an error at once where nothing answers."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import pytest

from steadydetr import fetching
from steadydetr.fetching import cache_folder, check_digest, check_reachable, fetch_file, hub_folder, hub_or_cache
from tests.servers import COMMIT, closed_port, of_repository, serving, use_hub

CONTENT = b"weights " * 400_000  # several parts
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def left_in(folder: Path) -> list[str]:
    """What is in the folder besides the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != fetching.LOCK) if folder.exists() else []


@pytest.mark.parametrize("digest", ["", DIGEST[:8], DIGEST])
def test_a_file_is_fetched_once(digest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"/a.pth": CONTENT}) as server:
        for _ in range(2):
            fetch_file(f"{server.address}/a.pth", tmp_path / "x" / "a.pth", len(CONTENT), digest, scheme="http")
        assert server.asked == ["GET /a.pth"]
    assert (tmp_path / "x" / "a.pth").read_bytes() == CONTENT and left_in(tmp_path / "x") == ["a.pth"]
    assert capsys.readouterr().err == f"fetching {server.address}/a.pth, 3 MB\n"


def test_another_digest_is_not_kept(tmp_path: Path) -> None:
    with serving({"/a.pth": CONTENT}) as server, pytest.raises(ValueError, match=rf"has the SHA-256 {DIGEST} instead of {'0' * 64}"):
        fetch_file(f"{server.address}/a.pth", tmp_path / "a.pth", len(CONTENT), "0" * 64, scheme="http")
    assert left_in(tmp_path) == []
    (tmp_path / "a.pth").write_bytes(CONTENT)
    check_digest(tmp_path / "a.pth", DIGEST[:8])
    with pytest.raises(ValueError, match=r"a\.pth has the SHA-256 .* instead of 1234"):
        check_digest(tmp_path / "a.pth", "1234")


def test_a_connection_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / ".a.pth.killed.unfinished").write_bytes(b"of a process that was killed")
    with serving({"/a.pth": CONTENT}) as server:
        server.claimed["/a.pth"] = len(CONTENT) + 7
        with pytest.raises(ConnectionError, match=rf"ended after {len(CONTENT)} of {len(CONTENT) + 7} bytes"):
            fetch_file(f"{server.address}/a.pth", tmp_path / "a.pth", 10**9, scheme="http")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("told", [True, False])
def test_a_file_that_is_too_large_is_not_kept(told: bool, tmp_path: Path) -> None:
    with serving({"/a.pth": CONTENT}) as server:
        if not told:
            server.claimed["/a.pth"] = 0
        with pytest.raises(ValueError, match="has more than 2 MB"):
            fetch_file(f"{server.address}/a.pth", tmp_path / "a.pth", 2 * 10**6, scheme="http")
    assert left_in(tmp_path) == []


def test_what_is_not_there(tmp_path: Path) -> None:
    with serving({}) as server, pytest.raises(ConnectionError, match=r"/a\.pth cannot be fetched \(Not Found\)"):
        fetch_file(f"{server.address}/a.pth", tmp_path / "a.pth", 10**6, scheme="http")
    assert left_in(tmp_path) == []


def test_only_https_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1/a\.pth is no https address"):
        fetch_file("http://127.0.0.1/a.pth", tmp_path / "a.pth", 10**6)
    with serving({}) as server:
        server.moved = {"/a.pth": "ftp://127.0.0.1/a.pth", "/b.pth": "https://127.0.0.1:1/b.pth"}
        for name in ("a", "b"):
            with pytest.raises(ValueError, match=rf"//127\.0\.0\.1.*{name}\.pth is no http address"):
                fetch_file(f"{server.address}/{name}.pth", tmp_path / "a.pth", 10**6, scheme="http")
    assert left_in(tmp_path) == []


def test_an_address_that_leads_to_another(tmp_path: Path) -> None:
    with serving({"/there/a.pth": CONTENT}) as server:
        server.moved = {"/a.pth": f"{server.address}/there/a.pth"}
        fetch_file(f"{server.address}/a.pth", tmp_path / "a.pth", len(CONTENT), DIGEST, scheme="http")
    assert (tmp_path / "a.pth").read_bytes() == CONTENT


FETCH = """
import sys
from pathlib import Path
from steadydetr.fetching import fetch_file
fetch_file(sys.argv[1], Path(sys.argv[2]), 10**9, sys.argv[3], scheme="http")
"""


def test_of_several_processes_one_fetches(tmp_path: Path) -> None:
    with serving({"/a.pth": CONTENT}) as server:
        words = [sys.executable, "-c", FETCH, f"{server.address}/a.pth", str(tmp_path / "a.pth"), DIGEST]
        processes = [subprocess.Popen(words, stderr=subprocess.PIPE) for _ in range(3)]
        assert [process.communicate() and process.returncode for process in processes] == [0, 0, 0]
        assert server.asked == ["GET /a.pth"]
    assert (tmp_path / "a.pth").read_bytes() == CONTENT and left_in(tmp_path) == ["a.pth"]


def test_a_host_that_does_not_answer_is_named_at_once(tmp_path: Path) -> None:
    address = closed_port()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1 cannot be reached \(Connection refused\)"):
        fetch_file(f"{address}/a.pth", tmp_path / "x" / "a.pth", 10**6, scheme="http")
    assert left_in(tmp_path) == []


def test_a_look_up_of_a_name_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = Event()

    def hang(*_: object) -> None:
        forever.wait()
        raise OSError("too late")

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setattr(fetching, "REACH_SECONDS", 0.01)
    with pytest.raises(ConnectionError, match=r"example\.org cannot be reached \(no answer within 0\.01 seconds\)"):
        check_reachable("https://example.org/a.pth")
    forever.set()


def test_behind_a_proxy_the_proxy_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving({}) as server:
        monkeypatch.setenv("https_proxy", server.address)
        check_reachable("https://host.invalid/a.pth")
    monkeypatch.setenv("https_proxy", closed_port())
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1 cannot be reached"):
        check_reachable("https://host.invalid/a.pth")


def test_where_fetched_files_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("STEADYDETR_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "steadydetr"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "steadydetr"
    monkeypatch.setenv("STEADYDETR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def repository(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_of_a_repository_only_what_is_needed_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"config__json": b"{}", "model__safetensors": b"a", "pytorch_model__bin": b"b", "optimizer__pt": b"c"}
    with serving(of_repository("owner/name", repository(tmp_path / "repository", **files))) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        folder = hub_folder("owner/name")
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
        with pytest.raises(ValueError, match="the Hub has no model owner/other, or it is private"):
            hub_folder("owner/other")


def test_weights_are_not_fetched_where_the_configs_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        raise ValueError(f"not {(folder / 'config.json').read_text()}")

    files = {"config__json": b"{}", "preprocessor_config__json": b"[]", "pytorch_model__bin": b"b"}
    with serving(of_repository("owner/name", repository(tmp_path / "repository", **files))) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        with pytest.raises(ValueError, match=r"not \{\}"):
            hub_folder("owner/name", accept=refuse)
        assert not [line for line in server.asked if "model" in line]
        assert sorted(path.name for path in hub_folder("owner/name").iterdir()) == [
            "config.json", "preprocessor_config.json", "pytorch_model.bin"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model__safetensors": b"a"}, "owner/name has no config.json"),
        ({"config__json": b"{}"}, r"owner/name has no model\.safetensors or pytorch_model\.bin; weights in several files"),
    ],
)
def test_a_repository_that_lacks_something(files: dict[str, bytes], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(of_repository("owner/name", repository(tmp_path / "repository", **files))) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        with pytest.raises(ValueError, match=message):
            hub_folder("owner/name")


def test_a_hub_that_hangs_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serving(of_repository("owner/name", repository(tmp_path / "repository", config__json=b"{}", model__safetensors=b"a"))) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        server.hung_up = {f"/owner/name/resolve/{COMMIT}/model.safetensors"}
        with pytest.raises(ConnectionError, match="owner/name cannot be fetched"):
            hub_folder("owner/name")


@pytest.mark.parametrize("weights", ["model__safetensors", "pytorch_model__bin"])
def test_a_repository_in_the_cache_needs_no_network(weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"config__json": b"{}", weights: b"a"}
    with serving(of_repository("owner/name", repository(tmp_path / "repository", **files))) as server:
        use_hub(monkeypatch, server.address, tmp_path / "cache")
        fetched = hub_folder("owner/name")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it tries again"))
    assert hub_folder("owner/name") == fetched
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1 cannot be reached \(Connection refused\)"):
        hub_folder("owner/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        hub_folder("owner/other")


def test_the_hub_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    use_hub(monkeypatch, closed_port(), tmp_path)
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), hub_or_cache() as why:
        assert constants.HF_HUB_OFFLINE and "Connection refused" in why
        raise KeyError
    assert before == constants.HF_HUB_OFFLINE


def test_no_import_of_torch() -> None:
    code = "import sys, steadydetr.fetching, steadydetr.cli.weights; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
