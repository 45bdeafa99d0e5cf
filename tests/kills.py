"""Kills a small run at chosen moments, lets it go on, and compares what it leaves with a run that was never killed.

    python tests/kills.py                            50 kills at random moments of one run
    python tests/kills.py --kills 200 --seed 1
    python tests/kills.py --operations               one kill before every change that a run makes to its folder

Every life of the run is a process of its own and dies by SIGKILL.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from steadydetr.recipes.base import Recipe
from steadydetr.training.loop import train

CHANGES = ("os.rename", "os.replace", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open")  # audit events of Python


@dataclass
class BeforeChange:
    """Kills the process before it makes the change number `at`, counted from 0, to files and folders below `folder`."""

    folder: Path
    at: int
    seen: int = 0

    def begin(self) -> None:
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or not arguments or not str(arguments[0]).startswith(str(self.folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1


@dataclass
class AfterSeconds:
    """Kills the process after so many seconds."""

    seconds: float

    def begin(self) -> None:
        threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def in_a_process(work: Callable[..., object], *arguments: object) -> int:
    """Do the work in a new process, and give its exit code: 1 if the work raises, -9 if the process is killed.

    The process is forked from a server that has imported everything and started no threads, because a fork of a process that has trained
    would hang.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kills"])
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join()
    return int(process.exitcode or 0)


def one_life(recipe: Recipe, folder: Path, killer: BeforeChange | AfterSeconds | None) -> None:
    """In a process of its own: start the run or go on with it, until it ends or is killed."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    torch.set_num_threads(1)
    if killer is not None:
        killer.begin()
    train(recipe, folder, resume="auto", device="cpu")
    os._exit(0)  # no thread of a killer is waited for


def live(recipe: Recipe, folder: Path, killer: BeforeChange | AfterSeconds | None = None) -> bool:
    """One life of the run; whether it came to its end."""
    code = in_a_process(one_life, recipe, folder, killer)
    assert code in (0, -signal.SIGKILL), f"a life of the run ended with code {code}"
    return code == 0


def assert_equal_runs(whole: Path, parts: Path) -> None:
    """The same weights to the bit in every checkpoint, the same records, and a best that is the best."""
    for name in ("last", "best", "ema"):
        if (whole / name).exists() or (parts / name).exists():
            first, second = (load_file(folder / name / "model.safetensors") for folder in (whole, parts))
            assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), name
    assert records(whole) == records(parts)
    best = max(record["ap"] for record in records(parts) if record["kind"] == "eval")
    summary = json.loads((parts / "summary.json").read_text())
    progress = torch.load(parts / "best/progress.pt", weights_only=True)
    assert summary["best_ap"] == progress["best_ap"] == best
    left = [path.name for path in parts.iterdir() if path.name.endswith((".unfinished", ".old"))]
    assert not left, f"left behind: {left}"


def records(run: Path) -> list[dict[str, Any]]:
    """The records of a run without speed and memory, which differ between runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "memory_gib")} for line in lines]


def kill_at_random(recipe: Recipe, whole: Path, kills: int, seed: int, longest: float) -> int:
    """Kill a run that often, after random times of up to `longest` seconds. When a run ends, it is checked and another one is started.

    Returns:
        How many runs there were.
    """
    chance, killed, runs = random.Random(seed), 0, 1
    folder = whole.with_name(f"{whole.name}-killed{runs}")
    while killed < kills or not (folder / "summary.json").exists():
        ended = live(recipe, folder, AfterSeconds(chance.uniform(0, longest)) if killed < kills else None)
        killed += not ended
        if ended:
            assert_equal_runs(whole, folder)
            if killed < kills:
                runs += 1
                folder = whole.with_name(f"{whole.name}-killed{runs}")
    return runs


def kill_before_change(recipe: Recipe, folder: Path, at: int) -> bool:
    """Kill a run before one of its changes to the folder, and let it go on to its end. False if it makes fewer changes than `at` + 1."""
    ended = live(recipe, folder, BeforeChange(folder, at))
    assert ended or live(recipe, folder)
    return not ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operations", action="store_true", help="a kill before every change of the folder, each in a run of its own")
    options = parser.parse_args()
    from tests.test_train import tiny

    recipe = tiny(ema_decay=0.9, save_every=4)
    with tempfile.TemporaryDirectory() as place:
        whole, start = Path(place) / "whole", time.monotonic()
        assert live(recipe, whole)
        seconds = time.monotonic() - start
        if options.operations:
            at = 0
            while kill_before_change(recipe, run := Path(place) / f"killed{at}", at):
                assert_equal_runs(whole, run)
                at += 1
            print(f"{at} changes of the folder, a kill before each: every run ended like one that was not killed")
        else:
            runs = kill_at_random(recipe, whole, options.kills, options.seed, 0.7 * seconds)
            print(f"{options.kills} kills: {runs} runs, each ended like one that was not killed")


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = root = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, root)
    main()
