"""WEIGHTS, the argument by which commands take a trained detector: a path, a repository of the Hugging Face Hub, or a name of our table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.convert import HUGGING_FACE_FILES, is_ours, read_foreign, untraced_of
from steadydetr.checkpoints.finding import WEIGHTS, find_checkpoint
from steadydetr.checkpoints.folder import LoadedDetector, load_state, read_checkpoint
from steadydetr.checkpoints.hugging_face_config import read_hugging_face_config
from steadydetr.checkpoints.official import (
    HUB,
    OfficialWeights,
    check_weights,
    fetch_official,
    fetch_repository,
    named_weights,
    repository_of,
)


@dataclass(frozen=True)
class TrainedWeights:
    """A trained detector as it was found."""

    card: DetectorCard
    state: dict[str, Tensor]  # all tensors of the detector, by our names
    where: str  # as messages name it

    def build(self) -> LoadedDetector:
        """The detector itself, in evaluation mode."""
        detector = self.card.detector.without_pretrained().build(len(self.card.classes))
        load_state(detector, self.state, Path(self.where))
        return LoadedDetector(detector.eval(), self.card)


def read_weights(where: str | Path, classes: str = "auto", **untraced: float) -> TrainedWeights:
    """The trained detector that a user names; what is not on this machine is fetched, and kept for the next time.

    Args:
        where: the folder of a run (its best is taken) or of a checkpoint of ours; a file or a folder in a layout that `steadydetr
            convert` knows; `hub:owner/name` or `hub:owner/name@revision`; or a name in the table of official checkpoints. A path that
            is there goes first.
        classes: of a checkpoint of another project: see `read_foreign`.
        untraced: fields of `Untraced` for the same, where the defaults are not meant.

    Raises:
        ValueError: it is not understood, or not what it is said to be; one line that says what to do.
        OSError: it is not there, and cannot be fetched; one line that says what to bring, and where to put it.
    """
    text = str(where)
    check_weights(text)
    if text.startswith(HUB):
        return _from_hub(text, classes, untraced)
    path = Path(text).expanduser()
    if os.path.lexists(path):
        return _from_path(path, text, classes, untraced)
    row = named_weights(text)
    with _named(row.name):
        return _from_path(fetch_official(row, check_readable), row.name, classes, options_of(row) | untraced)


def _from_path(path: Path, where: str, classes: str, untraced: dict[str, float]) -> TrainedWeights:
    """From a folder or a file; one of ours may also be named by its model.safetensors."""
    if path.name == WEIGHTS and is_ours(path.parent):
        path = path.parent
    theirs = any((path / name).exists() or (path / f"{name}.index.json").exists() for name in HUGGING_FACE_FILES)
    if not path.is_file() and (is_ours(path) or not theirs):
        return TrainedWeights(*read_checkpoint(find_checkpoint(path)), where)
    converted, card = read_foreign(path, classes, untraced_of(path, **untraced))
    return TrainedWeights(card, converted.state, where)


def _from_hub(where: str, classes: str, untraced: dict[str, float]) -> TrainedWeights:
    """From a repository of the Hub, in our own layout or in that of transformers."""
    name, revision = repository_of(where)
    with _named(where):
        return _from_path(fetch_repository(where, name, revision, check_readable), where, classes, untraced)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Within the block, a ValueError names what the user named, and not only the file in a cache."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_readable(folder: Path) -> None:
    """Raise ValueError for configs of a repository whose weights are not to be fetched, because they are of no detector that is known."""
    if not is_ours(folder):
        read_hugging_face_config(folder)


def options_of(row: OfficialWeights) -> dict[str, float]:
    """The fields of `Untraced` that the table tells."""
    numbers = {"heads": int, "queries": int}
    return {name: numbers.get(name, float)(value) for name, value in (option.split("=") for option in row.options.split())}
