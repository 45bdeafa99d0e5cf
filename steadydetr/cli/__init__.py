"""The command `steadydetr`. Each subcommand imports what it needs, so that help comes quickly."""

from __future__ import annotations

import sys

HELP = """steadydetr: train, evaluate and use detectors of the DETR family

  steadydetr check DATA                      look for what is wrong with a data set before training
  steadydetr recipes [NAME]                  list the recipes, or show one in full
  steadydetr train RECIPE --data DATA        train one; every field of a recipe is a flag
  steadydetr eval CHECKPOINT --data DATA     COCO and VOC metrics of a run, its best or last, or a converted checkpoint
  steadydetr predict CHECKPOINT IMAGES       detections as pictures and as COCO results
  steadydetr convert FILE OUTPUT             an official checkpoint (Deformable DETR, DINO, detrex, mmdet, Hugging Face) to ours

DATA is a folder in COCO, Roboflow COCO or Pascal VOC layout (recognised by itself), or the word shapes.
`steadydetr COMMAND --help` explains a command. --debug before the command shows full tracebacks."""


def main() -> None:
    """Entry point. Errors that a user can mend are one line and exit code 2."""
    words = sys.argv[1:]
    debug = words[:1] == ["--debug"]
    words = words[1:] if debug else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if words[0] in ("-V", "--version"):
        from steadydetr import __version__

        print(__version__)
        return
    try:
        _run(words[0], words[1:])
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError, ImportError) as error:
        if debug:
            raise
        print(f"steadydetr {words[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(command: str, words: list[str]) -> None:
    from steadydetr.cli import commands
    from steadydetr.config import nearest

    known = {"check": commands.check, "recipes": commands.recipes, "train": commands.train, "eval": commands.evaluate}
    known |= {"predict": commands.predict, "convert": commands.convert}
    if command not in known:
        raise ValueError(f"there is no such command{nearest(command, list(known))}")
    known[command](words)
