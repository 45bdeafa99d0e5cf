"""The last net of the command line: what users can mend is one line, a full pipe is quiet, a mistake of ours tells how to report it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from steadydetr.cli import main
from steadydetr.config import from_plain, to_plain
from steadydetr.devices import choose_device
from steadydetr.files import one_line, parse_json, read_json
from steadydetr.recipes import find
from steadydetr.training.processes import DEVICE, _device_named, make_accelerator


def said(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """What a command writes to stderr before it ends with that exit code."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == code
    return capsys.readouterr().err


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: str, words: list[str]) -> None:
        raise error

    monkeypatch.setattr("steadydetr.cli.run_command", run)


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "foo", "meta", "cpu:x", ""])
def test_devices_that_are_not_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.startswith("cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no driver\nno driver")))
    with pytest.raises(ValueError, match=rf"^--device {device}: .*use --device cpu,? ") as error:
        choose_device(device)
    assert "\n" not in str(error.value) and ("no GPU" in str(error.value)) == device.startswith("cuda")


def test_devices_that_are_there_are_chosen() -> None:
    assert choose_device("cpu").type == "cpu" and choose_device(torch.device("cpu")).type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


@pytest.mark.parametrize(
    ("command", "error", "option"),
    [
        ("train", MemoryError(), "--training.batch-size"),
        ("distill", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "--training.accumulation"),
        ("eval", RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
        ("cost", MemoryError(), "--size"),
    ],
)
def test_out_of_memory_names_what_lowers_it(
    command: str, error: Exception, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(error, monkeypatch)
    line = said([command], capsys)
    assert line.count("\n") == 1 and line.startswith(f"steadydetr {command}: out of memory; ") and option in line


@pytest.mark.parametrize(
    "error",
    [
        OSError(36, "File name too long", "x" * 300),
        OSError(28, "No space left on device", "run/metrics.jsonl"),
        NotADirectoryError(20, "Not a directory", "a/b"),
        ValueError("a\nb\x1b[31m\u202e" + "x" * 10_000),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        EOFError("Ran out of input"),
        OverflowError("int too large to convert to float"),
        Image.DecompressionBombError("Image size (400000000 pixels) exceeds limit"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device\nFor debugging consider"),
        RuntimeError("Found no NVIDIA driver on your system."),
    ],
)
def test_what_a_user_can_mend_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(error, monkeypatch)
    line = said(["eval", "run"], capsys)
    assert line.startswith("steadydetr eval: ") and line.count("\n") == 1 and len(line) < 5000
    assert "\x1b" not in line and "\u202e" not in line
    with pytest.raises(type(error)):
        main(["--debug", "eval", "run"])


@pytest.mark.parametrize("text", ["CUDA error: device-side assert triggered", "Expected all tensors on the same device, cuda:0 and cpu"])
def test_a_mistake_of_ours_on_a_device_is_not_taken_for_the_devices(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(RuntimeError(text), monkeypatch)
    assert "a mistake in steadydetr itself" in said(["train"], capsys, 3)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "nonsense", "mps"])
@pytest.mark.parametrize("words", ["train small-dino --data shapes --output run", "compare small-dino small-od-dino --output run"])
@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="a machine without a GPU")
def test_a_training_names_a_device_that_is_not_there(
    words: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = said([*words.split(), "--device", device], capsys)
    assert f"--device {device}: " in line and "use --device cpu" in line and line.count("\n") == 1
    assert not (tmp_path / "run/config.json").exists()


def test_one_of_several_processes_does_not_take_a_single_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steadydetr.training.processes.choose_device", torch.device)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for device in ("cuda:1", "mps"):
        with pytest.raises(ValueError, match=rf"--device {device} is one device, but several processes train"), _device_named(device):
            pass
    with _device_named("cuda"):
        assert DEVICE not in os.environ


def test_accelerate_is_told_of_the_device_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steadydetr.training.processes.choose_device", torch.device)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert make_accelerator("cuda:1").device == torch.device("cuda:1") == chosen[0]
    assert DEVICE not in os.environ and make_accelerator("cpu").device.type == "cpu"


def test_a_mistake_of_ours_shows_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(KeyError("lost"), monkeypatch)
    text = said(["train"], capsys, 3)
    assert "KeyError: 'lost'" in text and "in raising" not in text and "test_errors.py" in text
    assert "a mistake in steadydetr itself or in a plugin" in text and "report the text above" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict run a.png --batch-size 0", "--batch-size 0 must lie in 1 .."),
        ("eval run --data d --batch-size -1", "--batch-size -1 must lie in 1 .."),
        ("eval run --data d --workers -1", "--workers -1 must lie in 0 .."),
        ("eval run --data d --nms nan", "--nms nan must lie in 0 .. 1"),
        ("stability run d --images 0", "--images 0 must lie in 1 .."),
        ("figures run --objects 0", "--objects 0 must lie in 1 .."),
        ("convert a.pth out --heads 0", "--heads 0 must lie in 1 .."),
        ("convert a.pth out --queries -1", "--queries -1 must lie in 1 .."),
        ("compare a b --seeds 0", "--seeds 0 must lie in 1 .."),
        ("compare a b --jobs 0", "--jobs 0 must lie in 1 .."),
        ("cost small-dino --size 0 0", "--size 0 0 must be sides in 32 .."),
        ("cost small-dino --classes 0", "--classes 0 must lie in 1 .."),
        ("train quickstart --top 0", "--top 0 must lie in 1 .."),
        ("train quickstart --nms -1", "--nms -1.0 must lie in 0 .. 1"),
        ("train quickstart --seed -1", "training.seed = -1 must lie in 0 .."),
        ("train quickstart --training.lr nan", "training.lr = nan must lie in 0 .."),
        ("train quickstart --training.batch-size 0", "training.batch_size = 0 must be at least 1"),
        ("train quickstart --training.clip -1", "training.clip = -1.0 must lie in 0 .."),
        ("train quickstart --detector.queries 0", "detector.queries = 0 must lie in 1 .."),
        ("train quickstart --detector.transformer.dropout 2", "transformer.dropout = 2.0 must lie in 0 .. 1"),
        ("train quickstart --detector.transformer.heads 0", "transformer.heads = 0 must lie in 1 .."),
        ("train quickstart --data.transform.height 0", "data.transform.height = 0 must lie in 1 .."),
        ("train quickstart --objectives.denoising.number -1", "objectives.denoising.number = -1 must lie in 0 .."),
        ("train quickstart --device cuda", "device"),
        ("eval run --data d --batch-size 1e9", "--batch-size"),
    ],
)
def test_numbers_that_cannot_be_name_the_option(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # away from the runs/quickstart that `make quickstart` left here
    line = said(words.split(), capsys)
    assert message in line and line.count("\n") == 1


def command(words: str) -> str:
    return f"{sys.executable} -m steadydetr {words}"


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_a_reader_that_leaves_is_no_error() -> None:
    for words in ("--help", "predict --help", "recipes"):
        script = f"{{ {command(words)}; echo code $? >&2; }} | true"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.stderr.strip() == "code 141", done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_below_the_output_is_one_line() -> None:
    done = subprocess.run(["bash", "-c", f"{command('--help')} > /dev/full"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


# files


def test_a_module_of_the_package_runs_nothing() -> None:
    """Importing `steadydetr.__main__` is not running it, and a file cannot name it."""
    code = "import sys; sys.argv = ['host', '--version']; import steadydetr.__main__; print('nothing happened')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "nothing happened"
    with pytest.raises(ValueError, match=r"there is no 'steadydetr\.__main__'"):
        from_plain({"kind": "steadydetr.__main__"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"[" * 200 + b"]" * 200, "nested more than 64 deep"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested more than 64 deep"),
        (b"1" * 10_000, "no JSON can be read from it: Exceeds the limit"),
        (b"\xff\xfe\x00", "no JSON can be read from it"),
        (b"{", "no JSON can be read from it"),
        (b"", "no JSON can be read from it"),
    ],
)
def test_damaged_json_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json is damaged.*{message}"):
        read_json(path)


def test_json_that_is_large_or_no_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2, 3]")
    with pytest.raises(ValueError, match=r"config\.json has .* MiB; at most"):
        read_json(path, limit=5)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"config\.json is a pipe, not a file"):
        read_json(path)


def test_what_is_nested_but_not_deep_is_read() -> None:
    assert parse_json(b"[" + b"[1]," * 500 + b"[2]]", "x")[-1] == [2]
    assert from_plain(to_plain(find("small-stable-dino"))) == find("small-stable-dino")


def test_a_message_of_many_lines_becomes_one_printable_line() -> None:
    assert one_line("  a\n\n  b \t c\r\nd") == "a b \\t c d"
    assert one_line("x" * 50, 10) == "xxxxxxxxxx ... (50 characters)"
    assert one_line("\x1b[31mred\u202e, Ü, 猫") == "\\x1b[31mred\\u202e, Ü, 猫"
