"""Two processes of one run, on the CPU: one dies, fails, is asked to stop, or does not see the run's folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn

import steadydetr.training.loop
import steadydetr.training.preparation
import steadydetr.training.validation
from steadydetr.cli import tell
from steadydetr.detectors import Detector
from steadydetr.objectives import SetPrediction
from steadydetr.training.loop import train
from steadydetr.training.processes import translate_launcher
from tests.test_train import assert_close_weights, tiny, without_batch_norm

RECIPE = without_batch_norm(tiny(stability_images=0))
RECIPES = {  # by what the processes meet, where it is another one
    "digests": tiny("small-od-dino", stability_images=0, ema_decay=0.9),
    "no denoising": replace(RECIPE, objectives=(SetPrediction(),)),
}


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
OTHERS = {
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "mpiexec": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
}


def one_of_two(process: int, port: int, place: Path, resume: bool, what: str, said: Path) -> None:
    """A process of two, the second of which meets something. Leaves in a file what it comes to."""
    where = dict(zip(OTHERS.get(what, TORCHRUN), (process, process, 2, 2), strict=True))
    os.environ.update({name: str(value) for name, value in (where | {"MASTER_PORT": port}).items()})
    if what not in OTHERS:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    os.chdir(place)
    if process == 1 or what == "digests":
        MEETS.get(what, lambda: None)()
    start, code, found = time.monotonic(), 0, ""
    try:
        found = json.dumps(train(RECIPES.get(what, RECIPE), "run", resume=resume, device="cpu"))
    except Exception as error:
        elsewhere = getattr(error, "said_elsewhere", False)
        found, code = f"{type(error).__name__}{' (said elsewhere)' if elsewhere else ''}: {error}", 2
        assert not elsewhere or tell(error, "train") == 2
    said.write_text(f"{time.monotonic() - start:.0f}\n{found}")
    os._exit(code)


def at_step(step: int, meet: Any) -> None:
    """Do something before a step, counted from 0."""
    original = steadydetr.training.loop.train_step

    def met(run: Any, batches: Any) -> Any:
        if run.state.step == step:
            meet()
        return original(run, batches)

    steadydetr.training.loop.train_step = met


def fail() -> None:
    raise ValueError("photo.jpg is truncated")


def fail_at_the_data() -> None:
    steadydetr.training.preparation.open_both = lambda *_: fail()


def stop_after_the_last_step() -> None:
    """By a signal that comes when the processes have agreed to go on after an epoch."""
    original = steadydetr.training.loop.save

    def signalled(run: Any, name: str, weights: str = "model") -> None:
        if run.state.step == 6 and name == "last":
            os.kill(os.getpid(), signal.SIGTERM)
        original(run, name, weights)

    steadydetr.training.loop.save = signalled


def keep_digests() -> None:
    """Of the detectors that a process evaluates, in files beside the run."""
    original = steadydetr.training.validation.prediction_function

    def kept(detector: Detector, *words: Any, **options: Any) -> Any:
        with open(f"digests{os.environ['RANK']}", "a") as file:
            file.write(" ".join(f"{name}={float(tensor.double().sum())!r}" for name, tensor in detector.state_dict().items()) + "\n")
        return original(detector, *words, **options)

    steadydetr.training.validation.prediction_function = kept


MEETS = {
    "nothing": lambda: None,
    "digests": keep_digests,
    "kill": lambda: at_step(2, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "error": lambda: at_step(2, fail),
    "data": fail_at_the_data,
    "signal": stop_after_the_last_step,
}


def run_two(folder: Path, what: str, places: tuple[Path, Path] | None = None, resume: bool = False) -> list[tuple[int, float, str]]:
    """Of each process its exit code, how long it trained, and what it came to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.kills"])
    said = [folder / f"said{number}" for number in (0, 1)]
    where = places or (folder, folder)
    processes = [context.Process(target=one_of_two, args=(k, port, where[k], resume, what, said[k])) for k in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        assert process.exitcode is not None, "a process waits for ever"
    found = [path.read_text().split("\n", 1) if path.exists() else ("0", "") for path in said]
    return [(int(process.exitcode or 0), float(seconds), text) for process, (seconds, text) in zip(processes, found, strict=True)]


@pytest.mark.parametrize(("what", "code"), [("kill", -signal.SIGKILL), ("error", 2)])
def test_when_one_ends_the_other_ends_too(tmp_path: Path, what: str, code: int) -> None:
    (main_code, seconds, main_said), (other_code, _, other_said) = run_two(tmp_path, what)
    assert main_code == 2 and seconds < 60 and main_said.startswith("LostProcessError: process 0 has lost another one")
    assert other_code == code and (what == "kill" or other_said == "ValueError: photo.jpg is truncated")


def test_an_error_before_the_first_step_is_said_once(tmp_path: Path) -> None:
    found = run_two(tmp_path, "data")
    assert [text for _, _, text in found] == [f"ValueError{more}: photo.jpg is truncated" for more in (" (said elsewhere)", "")]
    assert not (tmp_path / "run").exists()


def test_a_signal_to_one_stops_both_after_the_evaluation(tmp_path: Path) -> None:
    found = run_two(tmp_path, "signal")
    assert [code for code, *_ in found] == [0, 0]
    assert [json.loads(text)["step"] for *_, text in found] == [6, 6] and not json.loads(found[0][2])["finished"]
    evaluated = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"eval"' in line]
    assert len(evaluated) == 1


@pytest.mark.slow
def test_only_the_main_process_needs_the_folder_and_their_number_may_change(tmp_path: Path) -> None:
    """Stopped as two, gone on as two of which one does not see the folder, and as one."""
    run_two(tmp_path, "signal")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "one")
    assert train(RECIPE, tmp_path / "one", resume=True, device="cpu")["finished"]
    found = run_two(tmp_path, "nothing", (tmp_path, tmp_path / "elsewhere"), resume=True)
    assert [code for code, *_ in found] == [0, 0], found
    assert json.loads(found[0][2])["finished"] and not list((tmp_path / "elsewhere").iterdir())
    assert_close_weights(tmp_path / "one/last", tmp_path / "run/last")


def test_processes_evaluate_one_model(tmp_path: Path) -> None:
    """Trained and averaged weights of trained batch norms, whose statistics every process has of its own images."""
    found = run_two(tmp_path, "digests")
    assert [code for code, *_ in found] == [0, 0], found
    main, other = ((tmp_path / f"digests{number}").read_text().splitlines() for number in (0, 1))
    assert len(main) == 4 and main == other


@pytest.mark.slow
def test_without_denoising_dino_trains_all_that_is_used(tmp_path: Path) -> None:
    """DistributedDataParallel would wait for the gradient of the label embedding."""
    found = run_two(tmp_path, "no denoising")
    assert [code for code, *_ in found] == [0, 0], found


def test_processes_that_srun_started_are_one_run(tmp_path: Path) -> None:
    found = run_two(tmp_path, "srun")
    assert [code for code, *_ in found] == [0, 0], found
    steps = [line for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert len(steps) == json.loads(found[0][2])["step"] == 12


@pytest.mark.parametrize("launcher", OTHERS)
def test_launchers_tell_a_process_where_it_is(launcher: str) -> None:
    rank, local_rank, world, local_world = OTHERS[launcher]
    told = {rank: "3", local_rank: "1", world: "4", local_world: "2(x2)" if launcher == "srun" else "2", "PMI_SPAWNED": "0"}
    translate_launcher(there := told | {"MASTER_ADDR": "first", "MASTER_PORT": "1234"})
    assert {name: there[name] for name in TORCHRUN} == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert (there["MASTER_ADDR"], there["MASTER_PORT"]) == ("first", "1234")
    with pytest.raises(ValueError, match="4 processes on several machines: set MASTER_ADDR") as caught:
        translate_launcher(dict(told))
    assert getattr(caught.value, "said_elsewhere", False)
    for alone in ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}, {**told, world: "1"}, told | {"RANK": "0"}):
        translate_launcher(there := dict(alone))
        assert there == alone


def test_synchronised_batch_norm_keeps_activations() -> None:
    """Of timm's backbones, whose batch norms hold them; torch's own conversion would leave them out."""
    model = convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4), nn.BatchNorm2d(4)))
    assert isinstance(model[0], SyncBatchNormAct) and isinstance(model[0].act, nn.ReLU)
    assert type(model[1]) is nn.SyncBatchNorm
    assert steadydetr.training.preparation.convert_sync_batchnorm is convert_sync_batchnorm
