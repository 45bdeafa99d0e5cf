"""Loading processes: they give what they are asked for, live across epochs, and end, with a reason, whatever happens."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from steadydetr.cli import main
from steadydetr.data import DataConfig, EvalLoader, FixedSize, FixedSizeTransform, TrainLoader, for_training
from steadydetr.data import check as check_module
from steadydetr.data.dataset import FolderDataset
from steadydetr.data.loading import Samples
from steadydetr.data.loading_processes import GRACE_SECONDS, PREFETCH, LoadingProcesses, check_script, cpu_share
from steadydetr.data.shapes import ShapesConfig, ShapesDataset
from steadydetr.data.transforms import EvalTransform, TrainTransform
from steadydetr.structures import Batch
from steadydetr.training import loop
from tests.test_train import tiny

CONFIG = DataConfig(transform=FixedSizeTransform(64, 64, transpose=0.5, zoom=0.7), resize=FixedSize(32, 64), workers=0)


def data(images: int = 13) -> Any:
    return for_training(ShapesDataset(ShapesConfig(size=64, images=images), "train"))[0]


def name(task: Any) -> str:
    return f"image {task}"


def act(task: Any) -> Any:
    """What the tests let a loading process do."""
    match task:
        case ("raise", error):
            raise error
        case ("raise unpicklable", _):
            raise type("Local", (Exception,), {})("of a class that nobody can import")
        case ("signal", number):
            faulthandler.disable()
            os.kill(os.getpid(), number)
        case ("exit", code):
            os._exit(code)
        case ("sleep", seconds):
            time.sleep(seconds)
        case ("threads", _):
            return torch.get_num_threads()
    return task, os.getpid()


@pytest.fixture
def processes() -> Iterator[LoadingProcesses[Any, Any]]:
    """Two, of which the first gets the first task."""
    started = LoadingProcesses(act, name, 2)
    yield started
    started.close()


def alive() -> set[int]:
    return {process.pid or 0 for process in multiprocessing.active_children()}


def assert_same(a: Batch, b: Batch) -> None:
    assert a.image_ids == b.image_ids and a.original_sizes == b.original_sizes and a.targets.counts == b.targets.counts
    for x, y in ((a.images, b.images), (a.padding, b.padding), (a.targets.boxes, b.targets.boxes), (a.targets.labels, b.targets.labels)):
        assert torch.equal(x, y) and x.dtype == y.dtype


@pytest.mark.parametrize("workers", [1, 3])
def test_processes_change_no_batch_in_any_epoch_and_after_one_that_was_left(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steadydetr.data.loading.cpu_share", lambda: 8)
    options = {"batch_size": 4, "accumulation": 2, "seed": 3}
    expected = TrainLoader(data(), CONFIG, **options)  # type: ignore[arg-type]
    loader = TrainLoader(data(), replace(CONFIG, workers=workers), **options)  # type: ignore[arg-type]
    next(loader.epoch(0))
    for epoch, start in ((0, 0), (1, 1), (2, 0)):
        found = list(loader.epoch(epoch, start))
        assert len(found) == 3 - start
        for step, wanted in zip(found, expected.epoch(epoch, start), strict=True):
            for a, b in zip(step, wanted, strict=True):
                assert_same(a, b)
    loader.close()


def test_the_same_processes_serve_every_epoch_until_the_loader_is_closed_or_dropped() -> None:
    before = alive()
    for loader in (TrainLoader(data(), replace(CONFIG, workers=1), 4), EvalLoader(data(), replace(CONFIG, workers=1), 4)):
        passes = [loader.epoch(epoch) for epoch in range(2)] if isinstance(loader, TrainLoader) else [loader, loader]
        seen = []
        for one in passes:
            assert list(one)
            seen.append(alive() - before)
        assert len(seen[0]) == 1 and seen[0] == seen[1]
        loader.close()
        assert alive() == before
    assert len(list(loader)) == 4 and alive() != before  # it can be used again
    del loader, passes, one
    gc.collect()
    assert alive() == before


def test_results_come_in_order_and_keep_what_they_hold(processes: LoadingProcesses[Any, Any]) -> None:
    tensors = [torch.arange(6).view(2, 3)[:, ::2], torch.zeros(0, 4), torch.tensor(7.5), torch.ones(2, dtype=torch.bool)]
    tasks: list[Any] = [{"n": n, "tensors": tensors} for n in range(9)]
    found = list(processes.map(iter(tasks)))
    assert [task["n"] for task, _ in found] == list(range(9)) and len({pid for _, pid in found}) == 2
    for sent, got in zip(tensors, found[4][0]["tensors"], strict=True):
        assert torch.equal(sent, got) and sent.dtype == got.dtype and sent.shape == got.shape
    assert list(processes.map([("threads", 0)])) == [1]


def test_some_are_begun_ahead(processes: LoadingProcesses[Any, Any]) -> None:
    begun: list[int] = []
    results = processes.map(begun.append(n) or n for n in range(20))  # type: ignore[func-returns-value]
    for taken in range(1, 4):
        next(results)
        assert len(begun) == 2 * PREFETCH + taken


def test_two_passes_at_once_do_not_mix(processes: LoadingProcesses[Any, Any]) -> None:
    """Matching is measured in the middle of an epoch."""
    first, second = processes.map(range(20)), processes.map("abcdefgh")
    pairs = [(next(first)[0], next(second)[0]) for _ in range(8)]
    assert pairs == list(zip(range(8), "abcdefgh", strict=True)) and [n for n, _ in first] == list(range(8, 20))


@pytest.mark.parametrize("error", [ValueError("cannot read a.jpg"), FileNotFoundError(2, "no such file", "a.jpg"), KeyError("a.jpg")])
def test_an_error_is_the_same_here_and_notes_where_it_comes_from(processes: LoadingProcesses[Any, Any], error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        list(processes.map([1, ("raise", error), 2]))
    assert str(caught.value) == str(error) and caught.value.args == error.args
    (note,) = caught.value.__notes__
    assert note.startswith("In loading process 1: Traceback") and "in act" in note
    assert [n for n, _ in processes.map([3, 4])] == [3, 4]  # the processes live on


def test_an_error_that_cannot_be_pickled_is_told_by_its_name(processes: LoadingProcesses[Any, Any]) -> None:
    with pytest.raises(RuntimeError, match="Local: of a class that nobody can import"):
        list(processes.map([("raise unpicklable", 0)]))


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (("signal", 9), r"loading process 1 was killed by signal 9, probably because memory ran out, while it loaded image .* fewer"),
        (("signal", 11), r"loading process 1 was ended by signal 11 \(Segmentation fault\) while it loaded image \('signal', 11\)$"),
        (("exit", 3), r"loading process 1 ended with exit code 3 while it loaded image \('exit', 3\)$"),
    ],
)
def test_a_process_that_ends_is_named_with_what_it_loaded(processes: LoadingProcesses[Any, Any], task: Any, text: str) -> None:
    before = time.monotonic()
    with pytest.raises(ChildProcessError, match=text):
        list(processes.map([1, task, *range(8)]))
    assert time.monotonic() - before < 4 and processes.closed


def test_one_that_was_killed_between_epochs_is_named_too(processes: LoadingProcesses[Any, Any]) -> None:
    (_, pid), _ = processes.map([0, 1])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="loading process 0 was killed by signal 9"):
        list(processes.map(range(4)))
    with pytest.raises(ChildProcessError, match=r"image 0\b.*ended|killed"):
        list(processes.map(range(4)))


def test_the_time_limit_names_what_was_waited_for_and_ends_what_hangs() -> None:
    started = LoadingProcesses(act, name, 1, timeout=0.2)
    before, clock = alive(), time.monotonic()
    with pytest.raises(ChildProcessError, match=r"has not loaded image \('sleep', 60\) within 0.2 seconds.*--data.timeout"):
        list(started.map([("sleep", 60)]))
    assert started.closed and not alive() & before and time.monotonic() - clock < 4


def test_no_result_is_waited_for_that_nobody_wants_any_more(processes: LoadingProcesses[Any, Any]) -> None:
    """It is asked while one is waited for."""
    stopped: list[int] = []
    assert [stopped.append(n) or n for n, _ in processes.map([0, ("sleep", 60), 2], lambda: bool(stopped))] == [0]  # type: ignore[func-returns-value]


def test_closing_waits_for_nobody_long(processes: LoadingProcesses[Any, Any]) -> None:
    results = processes.map([0, 1, ("sleep", 60), 3, 4, 5])
    next(results)
    before = time.monotonic()
    processes.close()
    assert time.monotonic() - before < GRACE_SECONDS + 3
    processes.close()


def test_after_an_interrupt_none_of_its_tasks_is_taken_for_another(processes: LoadingProcesses[Any, Any]) -> None:
    def tasks() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(processes.map(tasks()))
    assert processes.closed


def test_nothing_lies_in_shared_memory(processes: LoadingProcesses[Any, Any]) -> None:
    """Of which containers have 64 MB."""
    found = list(processes.map([torch.zeros(2**20, dtype=torch.uint8)] * 4))
    assert sum(task.sum() for task, _ in found) == 0
    for _, pid in found:
        for process in (str(pid), "self"):
            # semaphores lie there too, of a few bytes: those of tqdm, which other tests import
            mapped = [line for line in Path(f"/proc/{process}/maps").read_text().splitlines() if "/dev/shm" in line and "/sem." not in line]
            assert not mapped


def trainer(end: str, told: Connection) -> None:
    """A process that trains, and ends while its loading processes are busy."""
    processes = LoadingProcesses(act, name, 2)
    results = processes.map([0, 1, ("sleep", 60), ("sleep", 60)])
    told.send([next(results)[1] for _ in range(2)])
    if end == "fails":
        raise ValueError("as it should")
    os.kill(os.getpid(), signal.SIGKILL if end == "is killed" else signal.SIGTERM)


@pytest.mark.parametrize("end", ["is killed", "is ended", "fails"])
def test_no_process_outlives_the_trainer(end: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=trainer, args=(end, theirs))
    process.start()
    pids = ours.recv()
    process.join(8)
    assert process.exitcode and len(set(pids)) == 2
    deadline = time.monotonic() + 3
    while any(Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text() for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} one still lives"
        time.sleep(0.05)


@pytest.fixture
def spawned() -> Iterator[None]:
    """As on macOS, Windows and, nearly, Python 3.14."""
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method("fork", force=True)


@pytest.mark.slow
def test_processes_that_are_not_forked(spawned: None) -> None:
    (expected,) = EvalLoader(data(4), CONFIG)
    loader = EvalLoader(data(4), replace(CONFIG, workers=1))
    (found,) = loader
    assert_same(found, expected)
    loader.close()
    with pytest.raises(ValueError, match=r"what loads images cannot be sent to a loading process .*--data.workers 0"):
        LoadingProcesses(lambda task: task, name, 1)


def test_a_script_that_processes_cannot_import_is_told_so(spawned: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "mine.py"
    script.write_text("import steadydetr\nsteadydetr.train()\n")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(script), __spec__=None))
    with pytest.raises(ValueError, match=r'mine.py needs the line `if __name__ == "__main__":`.*data.workers = 0$'):
        TrainLoader(data(), replace(CONFIG, workers=1), 4)
    script.write_text('if __name__ == "__main__":\n    pass\n')
    check_script()
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())  # a notebook
    check_script()


@pytest.mark.parametrize(("local", "share"), [("1", 6), ("2", 3), ("8", 1)])
def test_processors_are_divided_among_the_ranks_of_a_machine(local: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    cpu_share.cache_clear()
    try:
        assert cpu_share() == share
        assert EvalLoader(data(40), replace(CONFIG, workers=4), 4).workers == min(4, share)
    finally:
        cpu_share.cache_clear()


@dataclass(frozen=True)
class Faulty(TrainTransform, EvalTransform):
    """A plugin's, with a fault, and with draws from other generators than torch's."""

    fails: bool = False

    def build(self) -> v2.Transform:
        def work(*inputs: Any) -> Any:
            if not isinstance(inputs[0], dict):  # the size alone is asked for
                return inputs[0]
            if self.fails:
                raise ZeroDivisionError("of a\nplugin")
            image = inputs[0]["image"]
            image[0], image[1] = int(np.random.randint(100)), random.randrange(100)
            return inputs[0]

        return work  # type: ignore[return-value]

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        return size


@pytest.mark.parametrize("workers", [0, 1])
def test_any_error_of_a_transform_names_the_file_in_one_line(workers: int) -> None:
    loader = EvalLoader(data(), replace(CONFIG, resize=Faulty(fails=True), workers=workers), 4)
    with pytest.raises(ValueError) as caught:
        list(loader)
    assert str(caught.value) == "shapes-train: shapes/train/000000 cannot be prepared: ZeroDivisionError: of a plugin"
    loader.close()


def test_draws_of_numpy_and_python_do_not_depend_on_processes() -> None:
    state = random.getstate(), np.random.get_state()[1].sum()  # type: ignore[union-attr]
    batches = []
    for workers in (0, 1):
        loader = TrainLoader(data(), replace(CONFIG, transform=Faulty(), workers=workers), 6)
        batches.append([batch for epoch in (0, 1) for step in loader.epoch(epoch) for batch in step])
        loader.close()
    for a, b in zip(*batches, strict=True):
        assert_same(a, b)
    drawn = torch.cat([batch.images[:, :2, 0, 0] for batch in batches[0]])  # [24, 2]
    assert all(len(drawn[:, generator].unique()) > 12 for generator in (0, 1))
    assert state[0] == random.getstate() and state[1] == np.random.get_state()[1].sum()  # type: ignore[union-attr]


@pytest.mark.parametrize(("field", "value"), [("workers", -1), ("timeout", -1.0), ("timeout", float("nan"))])
def test_settings_that_mean_nothing_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"data.{field} = {value}"):
        replace(CONFIG, **{field: value})  # type: ignore[arg-type]


def test_an_error_in_training_ends_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = alive(), []

    def fail(*_: Any) -> None:
        seen.append(alive() - before)
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(loop, "train_step", fail)
    recipe = tiny("small-dino")
    with pytest.raises(RuntimeError, match="a kernel failed") as caught:
        loop.train(replace(recipe, data=replace(recipe.data, workers=1)), tmp_path / "run", device="cpu")
    assert len(seen[0]) == 1 and alive() == before and caught.tb  # what went wrong may still refer to the loader


@pytest.mark.parametrize(("split", "batch", "steps"), [("train", 6, 2), ("val", 1, 6)])
def test_a_signal_does_not_wait_for_a_batch_that_hangs(
    split: str, batch: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while a batch is loaded that never will be; two batches are a step."""
    original, recipe, trainer, begun = Samples.batch, tiny("small-dino", accumulation=2, stability_images=0), os.getpid(), []

    def hang(samples: Samples, keys: Any) -> Batch:
        begun.append(keys)  # in the loading process
        if samples.dataset.name.endswith(split) and len(begun) == batch:
            os.kill(trainer, signal.SIGTERM)
            time.sleep(60)
        return original(samples, keys)

    monkeypatch.setattr(Samples, "batch", hang)
    summary = loop.train(replace(recipe, data=replace(recipe.data, workers=1, timeout=10.0)), tmp_path / "run", device="cpu")
    assert (summary["finished"], summary["step"]) == (False, steps)


def test_a_bad_image_in_a_loading_process_is_one_line(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, before = shared / "cases/data/26-bad-image-in-a-loader-process/data", alive()
    words = f"train small-dino --data {bad} --output {tmp_path / 'run'} --training.epochs 1 --training.batch-size 2 --device cpu"
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--data.workers", "1", "--training.stability-images", "0"])
    assert ended.value.code == 2 and alive() == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("steadydetr train: ") and "t3.jpg" in line


def test_check_does_not_go_on_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []

    def look(dataset: Any, position: int) -> None:
        looked_at.append(position)
        time.sleep(0.01)
        if position == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(check_module, "_check_image", look)
    with pytest.raises(KeyboardInterrupt):
        check_module._check_images(FolderDataset(data(40).index, tmp_path, "many"), 1)
    assert len(looked_at) < 20
