"""The command `steadydetr`. Each subcommand is a file and imports what it needs, so that help comes at once."""

from __future__ import annotations

import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence

from steadydetr.cli.words import take_flag
from steadydetr.files import one_line, printable
from steadydetr.kinds import nearest, use

HELP = """steadydetr: train, evaluate and use detectors of the DETR family

  steadydetr check DATA                      look for what is wrong with a data set before training
  steadydetr recipes [NAME]                  list the recipes, or show one in full
  steadydetr train RECIPE --data DATA        train one; every field of a recipe is a flag
  steadydetr finetune WEIGHTS --data DATA    train a trained detector on, for the classes of your data
  steadydetr distill RECIPE --teacher RUN    train one with a trained detector as its teacher
  steadydetr eval CHECKPOINT --data DATA     COCO and VOC metrics of a run, its best or last, or a converted checkpoint
  steadydetr stability CHECKPOINT DATA       how steadily its queries keep their targets, between stages and models
  steadydetr compare RECIPE RECIPE ...       train several with several seeds, and tell which differences are real
  steadydetr report RUN [RUN ...]            one HTML page: curves, AP, stability, losses, predictions, what differs
  steadydetr figures RUN [RUN ...]           the papers' figures of these runs as files
  steadydetr predict CHECKPOINT IMAGES       detections as pictures and as COCO results
  steadydetr cost RECIPE                     its parameters and GFLOPs, and what distillation adds to a training step
  steadydetr paper [TABLE]                   the papers' tables with the command of each row, and what runs measured
  steadydetr weights [NAME]                  list official checkpoints of other projects, or fetch one
  steadydetr convert FILE OUTPUT             a checkpoint of another project to ours; its --help names the projects

DATA is a folder of COCO, Pascal VOC, YOLO, CVAT, LVIS, Open Images, Label Studio, labelme or Hugging Face, as most tools export these
(recognised by itself), a data.yaml or a JSON file of COCO, hf:owner/name, or the word shapes: generated images.

  steadydetr train quickstart                learns on generated images within minutes, without a GPU
  steadydetr COMMAND --help                  explains a command
  --plugin MODULE                            anywhere: with the parts of another package, mylab or path/to/mylab.py
  --debug                                    anywhere: full tracebacks instead of one line
  --version"""

COMMANDS = {
    "check": "check",
    "recipes": "recipes",
    "train": "train",
    "finetune": "finetune",
    "distill": "distill",
    "eval": "evaluate",
    "stability": "stability",
    "compare": "compare",
    "report": "report",
    "figures": "figures",
    "predict": "predict",
    "cost": "cost",
    "paper": "paper",
    "weights": "weights",
    "convert": "convert",
}
USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError, EOFError, OverflowError)
DEVICE_ERRORS = (  # of drivers and of their libraries, which torch raises as a plain RuntimeError
    "CUDA error",
    "CUDA driver",
    "NVIDIA driver",
    "No CUDA GPUs",
    "not compiled with CUDA",
    "cuDNN error",
    "CUBLAS_STATUS",
    "NCCL error",
    "HIP error",
    "MPS backend",
)
LESS_MEMORY = {  # what lowers the memory that a command takes
    "train": "lower --training.batch-size, or raise --training.accumulation (the same result); --detector.transformer.checkpointing and"
    " --training.precision bf16 save more",
    "predict": "lower --batch-size, or use --device cpu",
    "figures": "use --device cpu",
    "cost": "lower --size",
}
LESS_MEMORY |= dict.fromkeys(("finetune", "distill", "compare"), LESS_MEMORY["train"]) | dict.fromkeys(
    ("eval", "stability"), LESS_MEMORY["predict"]
)
BUG = """
steadydetr {command}: this is a mistake in steadydetr itself or in a plugin, not in what you gave it. Please report the text above, with
the command and what `pip list` says of steadydetr and torch."""


def main(words: Sequence[str] | None = None) -> None:
    """Entry point. An error that a user can mend is one line on stderr and exit code 2; a mistake of ours is a traceback and 3."""
    words = list(sys.argv[1:] if words is None else words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that the terminal has not are no reason to stop, as on stderr
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    words, plugins = take_plugins(words)
    command = words[0] if words else ""
    try:
        answer(words, plugins)
        flush()
    except Exception as error:
        if debug:
            raise
        raise SystemExit(tell(error, printable(command))) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"steadydetr {command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def answer(words: Sequence[str], plugins: Sequence[str]) -> None:
    """Show help or version, or run the command."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if words[0] in ("-V", "--version"):
        from steadydetr import __version__

        print(__version__)
        return
    for plugin in plugins:
        use(plugin)
    run_command(words[0], words[1:])


def tell(error: Exception, command: str) -> int:
    """Say what went wrong, and give the exit code."""
    if getattr(error, "said_elsewhere", False):  # by another process of the run
        return 2
    if isinstance(error, BrokenPipeError):  # whoever read our output, such as `head`, has ended
        drop_output()
        return 141  # as of a program that the signal of a broken pipe has ended
    if is_out_of_memory(error):
        print(f"steadydetr {command}: out of memory; {LESS_MEMORY.get(command, 'close other programs')}", file=sys.stderr)
        return 2
    if is_of_device(error):
        print(f"steadydetr {command}: {one_line(error, 400)}; try again, or another --device, such as cpu", file=sys.stderr)
        return 2
    if isinstance(error, USER_ERRORS) or type(error).__module__.startswith("PIL."):
        print(f"steadydetr {command}: {one_line(error)}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    print(BUG.format(command=command), file=sys.stderr)
    return 3


def flush() -> None:
    """Write what is still in memory, so that a full disk or a pipe that has ended is an error here, and not at the end of Python."""
    try:
        print(end="", flush=True)
    except OSError:
        drop_output()
        raise


def drop_output() -> None:
    """Write nothing more: at its end Python would try once more, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_out_of_memory(error: Exception) -> bool:
    """Of the machine, whose allocator raises a plain RuntimeError in torch, or of a GPU."""
    texts = ("DefaultCPUAllocator", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))


def is_of_device(error: Exception) -> bool:
    """Whether a GPU, its driver or one of its libraries failed. A failed assertion on a device is a mistake of ours."""
    text = str(error)
    return isinstance(error, RuntimeError) and "device-side assert" not in text and any(part in text for part in DEVICE_ERRORS)


def take_plugins(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without every `--plugin MODULE`, and the modules."""
    plugins: list[str] = []
    plugin, rest = take_flag(words, "--plugin")
    while plugin is not None:
        plugins.append(plugin)
        plugin, rest = take_flag(rest, "--plugin")
    return rest, plugins


def run_command(command: str, words: Sequence[str]) -> None:
    """The function `run` of the command's file, on the words after it."""
    if command not in COMMANDS:
        raise ValueError(f"there is no such command{nearest(command, list(COMMANDS))}")
    importlib.import_module(f"steadydetr.cli.{COMMANDS[command]}").run(words)
