"""`steadydetr weights`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from steadydetr.checkpoints.official import HUB, OfficialWeights, fetch_official, find_official, official_weights
from steadydetr.cli.console import PlainConsole
from steadydetr.cli.parsing import parse

DESCRIPTION = """List official checkpoints of other projects that can be fetched and converted by their name, show one, or fetch it.

  steadydetr weights
  steadydetr weights dino-4scale-r50-24ep-detrex
  steadydetr weights dino-4scale-r50-24ep-detrex --fetch
  steadydetr weights hub:SenseTime/deformable-detr --output runs/official

Files are kept in ~/.cache/steadydetr/weights, or in $STEADYDETR_CACHE/weights; those of the Hugging Face Hub (hub:owner/name) in its own
cache. Where a digest is known, they are verified."""

BESIDE = 95  # columns for what stands beside the names


@dataclass(frozen=True)
class WeightsArguments:
    name: tyro.conf.Positional[str] = ""
    """A name of the list; with --output also hub:owner/name, or hub:owner/name@revision. All are listed if not given."""
    fetch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Fetch it, if it is not there yet."""
    output: Path | None = None
    """Fetch and convert it, and write it into this new folder as a checkpoint of ours, for eval, predict and the like."""


def run(words: Sequence[str]) -> None:
    arguments = parse(WeightsArguments, words, "weights", DESCRIPTION)
    if not arguments.name:
        if arguments.fetch or arguments.output:
            raise ValueError("name the weights that are meant, as in `steadydetr weights dino-4scale-r50-24ep-detrex --fetch`")
        show_all(official_weights())
    elif arguments.output:
        write(arguments.name, arguments.output)
    elif arguments.name.startswith(HUB):
        raise ValueError(f"{arguments.name} is not of the list: add --output FOLDER to fetch and convert it")
    else:
        row = find_official(arguments.name)
        if arguments.fetch:
            fetch_official(row)
        show(row)


def show_all(rows: Sequence[OfficialWeights]) -> None:
    """The table; in a narrow terminal lines go on in the next, but no name is cut."""
    table = Table("name", "detector", "AP", "classes", "MB", "licence")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(row.name, row.detector, row.reported, row.classes, row.megabytes or "-", row.licence)
    width = max(PlainConsole().width, max(len(row.name) for row in rows) + BESIDE)
    PlainConsole(width=width).print(table)


def show(row: OfficialWeights) -> None:
    """All that the table says of one, and where its file lies."""
    place = place_of(row)
    lines = {
        "name": row.name,
        "detector": row.detector,
        "reported AP": row.reported,
        "classes": row.classes,
        "MB": row.megabytes or "not known",
        "licence": row.licence,
        "file": row.file,
        "from": row.where,
        "SHA-256": row.sha256 + "..." * (0 < len(row.sha256) < 64) or "not known",
        "not in the tensors": row.options or "nothing unusual",
        "source": row.source,
        "here": f"{place}" if place.exists() else f"not yet; it will lie at {place}",
    }
    for name, value in lines.items():
        print(f"{name:>18}  {value}")


def place_of(row: OfficialWeights) -> Path:
    """Where the file of a row lies, or will."""
    if not row.where.startswith(HUB):
        return row.place
    from huggingface_hub import constants, try_to_load_from_cache

    repository = row.where.removeprefix(HUB)
    found = try_to_load_from_cache(repository, row.file)
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    return Path(found) if isinstance(found, str) else folder / "snapshots" / "COMMIT" / row.file


def write(where: str, output: Path) -> None:
    """Fetch, convert and save."""
    if not where.startswith(HUB):
        find_official(where)  # a wrong name is told before torch is imported
    from steadydetr.checkpoints.convert import check_free
    from steadydetr.checkpoints.folder import save_detector
    from steadydetr.checkpoints.weights import read_weights

    check_free(output)
    found = read_weights(where)
    save_detector(output, found.state, found.card)
    detector = type(found.card.detector).__name__.removesuffix("Config")
    print(f"{where}: {detector}, {len(found.state)} tensors, {len(found.card.classes)} classes -> {output}")
