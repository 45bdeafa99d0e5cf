"""What happens to a run's folder: whose it is, who writes into it, what a kill, a full disk or a signal leaves of it."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import steadydetr.training.loop
import steadydetr.training.pictures
import steadydetr.training.run
import steadydetr.training.validation
from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.checkpoints.folder import load_detector, save_detector
from steadydetr.cli import main
from steadydetr.cli.train import default_output
from steadydetr.files import MARKER, UNFINISHED, claim_folder, is_free
from steadydetr.runs.folder import RunFolder
from steadydetr.runs.lock import FolderLock
from steadydetr.training.loop import train
from tests.kills import assert_equal_runs, in_a_process, kill_before_change, live, records
from tests.test_train import tiny

SHORT = tiny(epochs=1, stability_images=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(tiny(), folder, device="cpu")
    return folder


# whose folder it is


@pytest.mark.parametrize("name", ["best/model.safetensors", "last/notes.txt", "summary.json", "metrics.jsonl", "photos/a.jpg"])
def test_what_a_user_has_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for resume in (False, "auto"):
        with pytest.raises(FileExistsError, match="is not empty, and what it holds is no run: choose another --output"):
            train(SHORT, tmp_path, resume=resume, device="cpu")
    with pytest.raises(FileNotFoundError, match="holds no run, so there is nothing to resume"):
        train(SHORT, tmp_path, resume=True, device="cpu")
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / MARKER).exists()


def test_an_empty_folder_and_one_that_was_only_claimed_are_free(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_text("")
    RunFolder(tmp_path).claim(FolderLock(tmp_path))
    for resume in (False, True, "auto"):
        assert not RunFolder(tmp_path).goes_on(resume)


@pytest.mark.parametrize("name", ["best/model.safetensors", "last/notes.txt", "summary.json", "metrics.jsonl"])
def test_a_run_that_lost_its_config_is_not_written_over(tmp_path: Path, name: str) -> None:
    """A stranger's folder may have our mark too, and links in the place of files."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    RunFolder(folder).claim(lock := FolderLock(folder))
    lock.release()
    elsewhere.write_text("mine")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(elsewhere)
    for resume in (False, True, "auto"):
        with pytest.raises(FileExistsError, match=rf"holds {name.split('/')[0]} of a run, but its config.json is gone: bring that back"):
            train(SHORT, folder, resume=resume, device="cpu")
    assert (folder / name).is_symlink() and elsewhere.read_text() == "mine"


def test_unfinished_files_of_others_are_theirs(tmp_path: Path) -> None:
    """What was being written counts for nothing, and is removed, only where a command of ours wrote it."""
    (tmp_path / "mine/.thesis.unfinished").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="is not empty, and what it holds is no run"):
        RunFolder(tmp_path / "mine").claim(FolderLock(tmp_path / "mine"))
    with pytest.raises(FileExistsError, match="no command of steadydetr has made it"):
        claim_folder(tmp_path / "mine", "predict")
    assert (tmp_path / "mine/.thesis.unfinished").is_dir()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / f".{MARKER}.x{UNFINISHED}").write_text("")  # in the middle of its first file
    assert is_free(tmp_path / "killed")
    claim_folder(tmp_path / "killed", "predict")
    (tmp_path / "killed" / f".results.json.x{UNFINISHED}").write_text("[")
    claim_folder(tmp_path / "killed", "predict")


def test_what_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match="choose another --output"):
            train(SHORT, tmp_path / name, device="cpu")
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["/home/x", "../..", "..", ".hidden", "a/b", "", "a\nb", "x" * 300])
def test_the_name_of_a_strangers_recipe_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be that of a folder in runs/: give --output") as caught:
        default_output(replace(SHORT, name=name))
    assert "\n" not in str(caught.value)


def test_files_follow_the_umask(trained: Path) -> None:
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in trained.rglob("*") if path.is_file() and not path.name.startswith(".lock")}
    mask = os.umask(0)
    os.umask(mask)
    assert set(modes.values()) == {0o666 & ~mask}, modes


# one command for the first start and every other


def test_one_command_starts_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist, so there is nothing to resume"):
        train(SHORT, tmp_path / "run", resume=True, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(steadydetr.training.loop, "save", lambda *_: pytest.fail("stopped before the first checkpoint"))
        with pytest.raises(pytest.fail.Exception):
            train(SHORT, tmp_path / "run", resume="auto", device="cpu")
    assert (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/last").exists()
    with pytest.raises(FileExistsError, match="already holds a run: go on with it by --resume"):
        train(SHORT, tmp_path / "run", device="cpu")
    assert train(SHORT, tmp_path / "run", resume="auto", device="cpu")["finished"]
    assert "was stopped before its first checkpoint, so it starts anew" in capsys.readouterr().out
    assert [record["step"] for record in records(tmp_path / "run") if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert train(SHORT, tmp_path / "run", resume="auto", device="cpu")["finished"]  # a finished run stays finished


def test_resume_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        steadydetr.training.loop, "train", lambda recipe, output, resume, device: asked.append(resume) or {"finished": False}
    )
    for words in ([], ["--resume"], ["--resume", "auto"], ["--resume=auto"], ["--resume", "--seed", "1"], ["--resume", "yes"]):
        main(["train", "small-dino", *words])
    assert asked == [False, True, "auto", "auto", True, True]


def test_a_second_process_is_refused_with_the_first_ones_id(tmp_path: Path, trained: Path) -> None:
    lock = FolderLock(trained)
    lock.take()
    try:
        with pytest.raises(FileExistsError, match=rf"is in use by process {os.getpid()} on \S+, since .*: wait until that has ended"):
            train(tiny(), trained, resume=True, device="cpu")
    finally:
        lock.release()
    assert train(tiny(), trained, resume=True, device="cpu")["finished"]


def take_and_die(folder: Path) -> None:
    FolderLock(folder).take()
    os._exit(0)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    assert in_a_process(take_and_die, tmp_path) == 0
    FolderLock(tmp_path).take()


# what a run that goes on may have another value of


def test_what_decides_nothing_may_change(tmp_path: Path) -> None:
    data = tmp_path / "here"
    write_voc(data)
    recipe = replace(SHORT, data=replace(SHORT.data, source=str(data), same_images="allow"))
    train(recipe, tmp_path / "run", device="cpu")
    data.rename(tmp_path / "there")
    training = replace(recipe.training, log_every=7, eval_every=3, save_every=2, eval_batch_size=2, accumulation=2, stability_images=3)
    moved = replace(recipe, data=replace(recipe.data, source=f"{tmp_path}/there/", workers=1), training=training, notes="mine")
    assert train(moved, tmp_path / "run", resume=True, device="cpu")["finished"]
    assert json.loads((tmp_path / "run/config.json").read_text())["recipe"]["data"]["source"] == f"{tmp_path}/there/"
    write_voc(tmp_path / "there", right=41)
    with pytest.raises(ValueError, match=r"data\.train: '4 images, 4 annotations, digest \w+' -> '4 images, 4 annotations, digest \w+'"):
        train(moved, tmp_path / "run", resume=True, device="cpu")
    with pytest.raises(ValueError, match=r"recipe\.training\.epochs: 1 -> 4; recipe\.training\.lr: 0\.001 -> 0\.1|data"):
        train(replace(moved, training=replace(training, epochs=4, lr=0.1)), tmp_path / "run", resume=True, device="cpu")


def write_voc(folder: Path, right: int = 40) -> None:
    """Four images with one object each, to train on and to validate on."""
    from PIL import Image

    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    names = [f"a{k}" for k in range(4)]
    for name in names:
        Image.new("RGB", (64, 64), "white").save(folder / f"JPEGImages/{name}.jpg")
        box = f"<bndbox><xmin>9</xmin><ymin>9</ymin><xmax>{right}</xmax><ymax>40</ymax></bndbox>"
        size = "<size><width>64</width><height>64</height><depth>3</depth></size>"
        body = f"<filename>{name}.jpg</filename>{size}<object><name>cat</name>{box}</object>"
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{body}</annotation>")
    for split in ("train", "val"):
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")


# kills


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "whole"
    assert live(KILLED, folder)
    return folder


KILLED = tiny(ema_decay=0.9, stability_images=4)


@pytest.mark.parametrize("at", [2, 9, *(pytest.param(at, marks=pytest.mark.slow) for at in (14, 25))])
def test_a_kill_at_any_change_of_the_folder_loses_nothing(whole: Path, tmp_path: Path, at: int) -> None:
    """`python tests/kills.py --operations` kills at all of them."""
    assert kill_before_change(KILLED, tmp_path / "run", at)
    assert_equal_runs(whole, tmp_path / "run")


def test_best_is_the_best_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between the evaluation that found a new best and the writing of `best`."""
    recipe, aps, original = tiny(epochs=3, stability_images=0), {1: 10.0, 2: 20.0, 3: 15.0}, steadydetr.training.loop.save

    def measured(run, detector):  # type: ignore[no-untyped-def]
        found = steadydetr.training.validation.evaluate_detector(run, detector)
        return replace(found, values=found.values | {"ap": aps[run.state.epochs_done]})

    def interrupted(run, name, weights="model"):  # type: ignore[no-untyped-def]
        if name == "best" and run.state.epochs_done == 2:
            raise KeyboardInterrupt
        original(run, name, weights)

    monkeypatch.setattr(steadydetr.training.loop, "evaluate_detector", measured)
    with monkeypatch.context() as patch:
        patch.setattr(steadydetr.training.loop, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", device="cpu")
    assert train(recipe, tmp_path / "run", resume=True, device="cpu")["best_ap"] == 20
    best = torch.load(tmp_path / "run/best/progress.pt", weights_only=True)
    assert (best["best_ap"], best["epochs_done"]) == (20.0, 2)
    assert [record["ap"] for record in records(tmp_path / "run") if record["kind"] == "eval"] == [10, 20, 15]


def test_best_that_was_removed_is_measured_anew(trained: Path, tmp_path: Path) -> None:
    assert RunFolder(trained).best_progress() is not None and RunFolder(tmp_path).best_progress() is None


@pytest.mark.parametrize("name", ["last", pytest.param("best", marks=pytest.mark.slow), "ema"])
def test_a_kill_while_a_checkpoint_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Between the two renames, where only the older checkpoint is there. `last` is gone on from, though `best` is older still."""
    recipe, original = tiny(ema_decay=0.5, stability_images=0, save_every=2), os.rename
    train(recipe, tmp_path / "run", device="cpu")
    before = (tmp_path / f"run/{name}/model.safetensors").read_bytes()
    original(tmp_path / f"run/{name}", tmp_path / f"run/.{name}.old")
    if name == "last":
        assert RunFolder(tmp_path / "run").find_checkpoint() == tmp_path / "run/.last.old"
        monkeypatch.setattr(steadydetr.training.loop, "train_step", lambda *_: pytest.fail("a step is repeated"))
    if name == "best":
        assert find_checkpoint(tmp_path / "run") == tmp_path / "run/.best.old"
    assert train(recipe, tmp_path / "run", resume=True, device="cpu")["finished"]
    assert (tmp_path / f"run/{name}/model.safetensors").read_bytes() == before and not (tmp_path / f"run/.{name}.old").exists()


def test_a_checkpoint_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`best` is of the same weights as the `last` before it."""
    saved, looked_at = [], []
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda _, name, *rest: saved.append(name))
    monkeypatch.setattr(RunFolder, "save_progress", lambda *_: None)
    monkeypatch.setattr(steadydetr.training.run, "where_not_finite", lambda tensors: looked_at.append(len(saved)) or "")
    train(SHORT, tmp_path / "run", device="cpu")
    assert saved == ["last", "best"] and looked_at == [0]


def test_what_is_saved_reaches_the_disk(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows writes out no file that is open for reading only."""
    fcntl = pytest.importorskip("fcntl")
    flags: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: flags.append(fcntl.fcntl(file, fcntl.F_GETFL)))
    found = load_detector(trained)
    save_detector(tmp_path / "saved", found.detector.state_dict(), found.card)
    assert len(flags) >= 2 and all(flag & (os.O_WRONLY | os.O_RDWR) for flag in flags)


# signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_during_an_evaluation_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    """And the command that is shown at the end goes on."""
    recipe, original = tiny(stability_images=0), steadydetr.training.loop.evaluate_detector
    before = signal.signal(number, signal.default_int_handler)  # shells let what runs in the background ignore Ctrl-C

    def signalled(run, detector):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), number)
        return original(run, detector)

    with monkeypatch.context() as patch:
        patch.setattr(steadydetr.training.loop, "evaluate_detector", signalled)
        assert train(recipe, tmp_path / "run", device="cpu") == {"finished": False, "step": 6, "output": str(tmp_path / "run")}
    signal.signal(number, before)
    assert not [record for record in records(tmp_path / "run") if record["kind"] == "eval"]
    shown = capsys.readouterr().out.partition("or with: steadydetr ")[2].partition("\n")[0]
    main([*shlex.split(shown), "--device", "cpu"])
    assert [record["epoch"] for record in records(tmp_path / "run") if record["kind"] == "eval"] == [1, 2]


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `nohup` asks for it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    original = steadydetr.training.loop.evaluate_detector
    monkeypatch.setattr(
        steadydetr.training.loop, "evaluate_detector", lambda *words: os.kill(os.getpid(), signal.SIGHUP) or original(*words)
    )
    try:
        assert train(SHORT, tmp_path / "run", device="cpu")["finished"]
    finally:
        signal.signal(signal.SIGHUP, before)


def train_into_a_closed_pipe(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    assert train(SHORT, folder, device="cpu")["finished"]
    print("a summary")


def test_a_closed_pipe_does_not_end_a_run(tmp_path: Path) -> None:
    assert in_a_process(train_into_a_closed_pipe, tmp_path / "run") == 0
    assert (tmp_path / "run/summary.json").exists()


# disks and links


def train_on_a_small_disk(folder: Path, errors: Path) -> None:
    """No file may grow beyond 30 KB, as weights do; a full disk gives the same kinds of errors."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    try:
        train(SHORT, folder, device="cpu")
    except OSError as error:
        errors.write_text(str(error))


def test_a_full_disk_is_named_and_the_run_goes_on_from_where_it_was(tmp_path: Path) -> None:
    assert in_a_process(train_on_a_small_disk, tmp_path / "run", tmp_path / "errors") == 0
    said = (tmp_path / "errors").read_text()
    assert said.startswith(f"the checkpoint {tmp_path / 'run/last'} cannot be written: ") and "\n" not in said
    assert said.endswith("What was saved before is as it was")
    assert not list((tmp_path / "run").glob(".*unfinished"))
    assert train(SHORT, tmp_path / "run", resume=True, device="cpu")["finished"]


def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    recipe = tiny(stability_images=0)
    train(recipe, tmp_path / "run", device="cpu")
    (tmp_path / "run/last").rename(tmp_path / "moved")
    (tmp_path / "run/last").symlink_to(tmp_path / "moved")
    (tmp_path / "run/.last.old").symlink_to(elsewhere)
    (tmp_path / "run/metrics.jsonl").rename(tmp_path / "metrics")
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "metrics")
    before = (tmp_path / "metrics").read_text()
    assert train(recipe, tmp_path / "run", resume=True, device="cpu")["finished"]
    assert (elsewhere / "mine").read_text() == "mine" and (tmp_path / "metrics").read_text() == before
    assert not (tmp_path / "run/metrics.jsonl").is_symlink()


def test_half_a_line_is_left_out_when_the_run_goes_on(tmp_path: Path) -> None:
    recipe = tiny(stability_images=0)
    train(recipe, tmp_path / "run", device="cpu")
    before = records(tmp_path / "run")
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert train(recipe, tmp_path / "run", resume=True, device="cpu")["finished"]
    assert records(tmp_path / "run") == before


# decoration


@pytest.mark.parametrize("name", ["draw_curves", "draw_first_predictions", "draw_sampling_points"])
def test_a_picture_that_cannot_be_drawn_does_not_fail_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(steadydetr.training.pictures, name, broken)
    assert train(SHORT, tmp_path / "run", device="cpu")["finished"]
    assert "was not drawn, the run itself is complete: RuntimeError: no font" in " ".join(capsys.readouterr().out.split())
    assert len([path for path in (tmp_path / "run").glob("*.png")]) == 2
