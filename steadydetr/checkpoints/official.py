"""The table of official checkpoints that can be converted, and where its files lie once they are fetched. It needs no torch.

`official.tsv` holds only what was seen in the source that it names; what was not is empty.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.fetching import cache_folder, check_digest, fetch_file, hub_folder
from steadydetr.files import printable
from steadydetr.kinds import did_you_mean, normal

FILE = Path(__file__).parent / "official.tsv"
HUB, BY_HAND = "hub:", "by hand: "  # how a place begins that is no https address
REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
KINDS = "a run, a checkpoint folder, a file of another project, hub:owner/name, or a name that `steadydetr weights` lists"
FILES = ("model.safetensors*", "pytorch_model.bin*")  # of weights, in a folder of ours or of the Hub
MOST_MB = 4000  # that a file of unknown size may have; some hold the state of the optimiser too


class OfficialWeights(NamedTuple):
    """What the table says of a checkpoint. Its columns are in this order."""

    name: str
    detector: str
    reported: str  # COCO AP, unless another data set stands behind it
    classes: str
    megabytes: str
    licence: str
    file: str
    where: str  # an https address, hub:owner/name, or the page from which a person fetches it
    sha256: str  # of the file, or how it begins
    options: str  # what its tensors do not tell: fields of `Untraced`
    source: str  # of all this

    @property
    def place(self) -> Path:
        """Where the file lies once it is fetched or brought; one of the Hub lies in the cache of huggingface_hub."""
        return cache_folder() / "weights" / self.name / self.file

    @property
    def bound(self) -> int:
        """Bytes that the file may have."""
        return int(1.05e6 * float(self.megabytes)) if self.megabytes else MOST_MB * 10**6


def official_weights() -> list[OfficialWeights]:
    """All rows of the table."""
    with open(FILE, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, "excel-tab"))
    return [OfficialWeights(*row) for row in rows[1:]]


def find_official(name: str) -> OfficialWeights:
    """The row of that name; a ValueError gives the nearest ones."""
    rows, wanted = {row.name: row for row in official_weights()}, normal(name)
    if wanted not in rows:
        close = [known for known in rows if wanted in known][:3] or difflib.get_close_matches(wanted[:100], rows, cutoff=0.4)
        meant = did_you_mean(close) if close else ";"
        raise ValueError(f"no official weights are called {printable(name)!r}{meant} `steadydetr weights` lists all")
    return rows[wanted]


def check_weights(where: str) -> None:
    """Raise ValueError or FileNotFoundError for WEIGHTS that are plainly not there. None are read, and nothing is fetched."""
    path = Path(where).expanduser()
    if where.startswith(HUB):
        repository_of(where)
    elif "://" in where:
        raise ValueError(
            f"{printable(where)} is an address, from which no weights are fetched: fetch the file and name it, or name {KINDS}"
        )
    elif path.is_dir() and not any(file for kind in FILES for file in path.glob(kind)):
        find_checkpoint(path)
    elif not os.path.lexists(path):
        if "/" in where or os.sep in where or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
            raise FileNotFoundError(f"there is no file or folder {printable(where)}: name {KINDS}")
        named_weights(where)


def repository_of(where: str) -> tuple[str, str | None]:
    """Name and revision of a repository of the Hub, of hub:owner/name@revision."""
    found = REPOSITORY.fullmatch(where.removeprefix(HUB))
    if found is None:
        raise ValueError(f"{printable(where)} names no repository: write hub:owner/name, or hub:owner/name@revision")
    return found["name"], found["revision"]


def named_weights(where: str) -> OfficialWeights:
    """The row that WEIGHTS mean which are no path."""
    try:
        return find_official(where)
    except ValueError as error:
        raise ValueError(f"there is no file or folder {printable(where)}, and {error}") from None


def fetch_official(row: OfficialWeights, accept: Callable[[Path], None] = lambda folder: None) -> Path:
    """The file of a row, or for one of the Hub the folder that holds it and its configs; fetched where it is not there, and verified.

    Args:
        accept: see `hub_folder`.

    Raises:
        OSError: it cannot be fetched; says which file to bring, and where to put it.
        ValueError: it is another file than the table says.
    """
    if row.where.startswith(HUB):
        folder = fetch_repository(row.name, row.where.removeprefix(HUB), accept=accept)
        if row.sha256 and (folder / row.file).exists():
            check_digest(folder / row.file, row.sha256)
        return folder
    if not row.place.exists():
        if row.where.startswith(BY_HAND):
            page = row.where.removeprefix(BY_HAND)
            raise FileNotFoundError(f"{row.name} is fetched by hand: get {row.file} from {page} and put it at {row.place}")
        try:
            fetch_file(row.where, row.place, row.bound, row.sha256)
        except OSError as error:
            raise ConnectionError(f"{row.name}: {error}. Without a network, bring {row.where} and put it at {row.place}") from None
    check_digest(row.place, row.sha256)
    return row.place


def fetch_repository(
    called: str, repository: str, revision: str | None = None, accept: Callable[[Path], None] = lambda folder: None
) -> Path:
    """As `hub_folder`. Where it cannot be reached, the error says what the user called it, and what to bring."""
    try:
        return hub_folder(repository, revision, accept)
    except OSError as error:
        bring = f"bring config.json and model.safetensors of https://huggingface.co/{repository} in a folder, and name that"
        raise ConnectionError(f"{called}: {error}. Without a network, {bring}") from None
