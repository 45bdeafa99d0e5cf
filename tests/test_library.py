"""The package in other people's programs: names, several runs in one process, threads, and systems that lack what Unix has."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psutil  # noqa: F401  # which on Linux needs the module that is taken away
import pytest
import torch

import steadydetr
import steadydetr.data
import steadydetr.detectors
from steadydetr import lazy
from steadydetr.boxes import inverse_sigmoid
from steadydetr.training import log
from tests.test_train import tiny

SHORT = tiny(epochs=1, stability_images=0)


def test_no_public_name_is_a_modules() -> None:
    """Importing `steadydetr.x` sets the attribute x of the package, which would take the place of a function of that name."""
    public = set(steadydetr.__all__)
    assert public.isdisjoint(module.name for module in pkgutil.iter_modules(steadydetr.__path__))
    for module in pkgutil.walk_packages(steadydetr.__path__, "steadydetr."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert not [name for name in public if isinstance(getattr(steadydetr, name), ModuleType)]


@pytest.mark.slow
def test_several_runs_in_one_process(tmp_path: Path) -> None:
    """Of other precisions too, which accelerate keeps for a process; the folder may be a string."""
    for precision in ("no", "bf16", "no"):
        recipe = replace(SHORT, training=replace(SHORT.training, precision=precision))
        assert steadydetr.train(recipe, str(tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}"), device="cpu")["finished"]


def test_a_run_in_a_thread(tmp_path: Path) -> None:
    """Python lets only the main thread handle signals."""
    found = []
    thread = threading.Thread(target=lambda: found.append(steadydetr.train(SHORT, tmp_path / "run", device="cpu")))
    thread.start()
    thread.join()
    assert found and found[0]["finished"]


UNIX_ONLY = """
import os, signal, sys
import accelerate, matplotlib.pyplot, psutil, timm, torchvision  # which know that this is no Windows
for name in ("resource", "fcntl", "termios", "pwd", "grp", "tty"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "pthread_sigmask"):
    delattr(signal, name)
for name in ("fork", "getuid", "geteuid", "killpg", "setsid"):
    delattr(os, name)
from steadydetr.cli import main
main(sys.argv[1:])
"""


def without_unix(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A command where what only Unix has is missing, as on Windows."""
    return subprocess.run([sys.executable, "-c", UNIX_ONLY, *words], cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_nothing_that_only_unix_has_is_needed(tmp_path: Path) -> None:
    sizes = [word for part in ("transform", "resize") for side in ("height", "width") for word in (f"--data.{part}.{side}", "64")]
    size = ["--data", "shapes:size=64,images=8", "--data.workers", "0", *sizes]
    short = ["--training.epochs", "1", "--training.stability-images", "0", "--device", "cpu", "--output", "run"]
    done = without_unix(["train", "small-dino", *size, *short], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_memory_where_there_is_no_such_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert log.peak_memory(torch.device("cpu")) > 2**20


@pytest.mark.slow
def test_a_run_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    """Otherwise every experiment of a script that draws between two runs draws the same."""
    states = []
    for name in ("first", "second"):
        states.append(torch.get_rng_state())
        steadydetr.train(SHORT, tmp_path / name, device="cpu")
        assert torch.equal(torch.get_rng_state(), states[-1])
        torch.rand(1)
    assert not torch.equal(*states)


def test_what_is_imported_at_its_first_use_is_the_module_itself() -> None:
    assert lazy.torch.zeros is torch.zeros and lazy.F.relu is torch.nn.functional.relu and lazy.nn.Linear is torch.nn.Linear
    for package in (steadydetr, steadydetr.data, steadydetr.detectors):
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'DNIO'"):
            _ = package.DNIO


def test_what_is_imported_at_its_first_use_can_be_compiled() -> None:
    """Without a break in the graph, because compiled layers of a plugin may use it."""
    boxes = torch.rand(3, 4)
    compiled = torch.compile(inverse_sigmoid, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(boxes), inverse_sigmoid(boxes), rtol=0, atol=0)
