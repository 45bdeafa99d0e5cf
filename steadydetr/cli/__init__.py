"""The command `steadydetr`. Each subcommand is a file and imports what it needs, so that help comes at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from steadydetr.cli.words import take_flag
from steadydetr.kinds import nearest, use

HELP = """steadydetr: train, evaluate and use detectors of the DETR family

  steadydetr check DATA                      look for what is wrong with a data set before training
  steadydetr recipes [NAME]                  list the recipes, or show one in full
  steadydetr train RECIPE --data DATA        train one; every field of a recipe is a flag
  steadydetr distill RECIPE --teacher RUN    train one with a trained detector as its teacher
  steadydetr eval CHECKPOINT --data DATA     COCO and VOC metrics of a run, its best or last, or a converted checkpoint
  steadydetr stability CHECKPOINT DATA       how steadily its queries keep their targets, between stages and models
  steadydetr compare RECIPE RECIPE ...       train several with several seeds, and tell which differences are real
  steadydetr report RUN [RUN ...]            one HTML page: curves, AP, stability, losses, predictions, what differs
  steadydetr figures RUN [RUN ...]           the papers' figures of these runs as files
  steadydetr predict CHECKPOINT IMAGES       detections as pictures and as COCO results
  steadydetr cost RECIPE                     its parameters and GFLOPs, and what distillation adds to a training step
  steadydetr convert FILE OUTPUT             a checkpoint of another project to ours; its --help names the projects

DATA is a folder in COCO, Roboflow COCO or Pascal VOC layout (recognised by itself), or the word shapes: generated images.

  steadydetr train quickstart                learns on generated images within minutes, without a GPU
  steadydetr COMMAND --help                  explains a command
  --plugin MODULE                            anywhere: with the parts of another package, mylab or path/to/mylab.py
  --debug                                    anywhere: full tracebacks instead of one line
  --version"""

COMMANDS = {
    "check": "check",
    "recipes": "recipes",
    "train": "train",
    "distill": "distill",
    "eval": "evaluate",
    "stability": "stability",
    "compare": "compare",
    "report": "report",
    "figures": "figures",
    "predict": "predict",
    "cost": "cost",
    "convert": "convert",
}
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    PermissionError,
    ChildProcessError,
    FloatingPointError,
    ImportError,
)


def main(words: Sequence[str] | None = None) -> None:
    """Entry point. An error that a user can mend is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    words, plugins = take_plugins(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if words[0] in ("-V", "--version"):
        from steadydetr import __version__

        print(__version__)
        return
    try:
        for plugin in plugins:
            use(plugin)
        run_command(words[0], words[1:])
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"steadydetr {words[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"steadydetr {words[0]}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


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
