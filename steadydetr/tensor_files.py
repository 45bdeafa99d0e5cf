"""Reading files of tensors that may come from a stranger: no code in them is run, and their sizes are checked before they are read.

A .safetensors file can hold nothing but tensors. The other files, .pth, .pt and .bin, are pickles: torch's `weights_only` reads them
without running anything that they name. What even such a file could do is refused here: claim tensors that it does not hold, or unpack
to more than its own size.
"""

from __future__ import annotations

import argparse
import math
import mmap
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from steadydetr.files import check_regular, one_line, printable

SHARING = 16  # times the size of the file that all tensors may have together, because some share memory, as tied heads do
MAX_DEPTH, MAX_VALUES = 64, 10**6  # of nested containers, and of the values in them
BYTEARRAY = b"\nbytearray\n"  # in a pickle: an object that torch would make of any size, and that no state dict holds


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors in a .safetensors file, from its header alone.

    Raises:
        ValueError: it is damaged, or its header tells of more than the file holds; names it.
        FileNotFoundError: there is no such file.
    """
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except Exception as error:  # whatever the library raises, the file is the reason
        raise ValueError(f"{printable(path)} is damaged, it cannot be read as a safetensors file: {one_line(error, 300)}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file; errors as in `tensor_shapes`."""
    check_regular(path)
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f"{printable(path)} is damaged, it cannot be read as a safetensors file: {one_line(error, 300)}") from None


def read_pickled(path: Path, classes: Sequence[type] = ()) -> Any:
    """What torch.save wrote: tensors, plain values, and containers of them. Nothing that the file names is run.

    Args:
        classes: dataclasses that it may hold too.

    Raises:
        ValueError: it is damaged, holds something else, which is named, or would take more memory than it has bytes.
        FileNotFoundError: there is no such file.
    """
    size = check_regular(path)
    _check_unpacked(path, size)
    try:
        # Deformable DETR and DINO save the arguments of their command line beside the weights, as a namespace
        with torch.serialization.safe_globals([argparse.Namespace, *classes]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{printable(path)} cannot be read as a file of tensors: {_reason(error)}") from None
    _check_memory(content, path, size)
    return content


def _check_unpacked(path: Path, size: int) -> None:
    """Raise ValueError for a file that would take more memory than it has bytes: a compressed one, or one with a bytearray."""
    try:
        entries: list[zipfile.ZipInfo] = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{printable(path)} is damaged: {one_line(error, 300)}") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"{printable(path)} is a compressed archive, which torch never writes: save the weights alone again")
    if size:
        with open(path, "rb") as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as content:
            if content.find(BYTEARRAY) >= 0:
                raise ValueError(f"{printable(path)} holds a bytearray beside its tensors: save the weights alone again")


def _check_memory(content: Any, path: Path, size: int) -> None:
    """Raise ValueError for tensors that are not plain, or that are larger than the file that they were read from."""
    storages: dict[int, int] = {}
    total = 0
    for tensor in _tensors_in(content, path):
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_cpu:
            raise ValueError(f"{printable(path)} holds a tensor that is sparse, quantised, or without values: save plain tensors")
        storage, needed = tensor.untyped_storage(), math.prod(tensor.shape) * tensor.element_size()
        storages[storage.data_ptr()] = storage.nbytes()
        total += needed
        if needed > storage.nbytes():
            raise ValueError(f"{printable(path)} claims a tensor of the shape {list(tensor.shape)}, but holds only a part of its values")
    if sum(storages.values()) > size or total > SHARING * size:
        raise ValueError(f"{printable(path)} claims tensors that are larger than the file itself")


def _tensors_in(content: Any, path: Path) -> Iterator[Tensor]:
    """Every tensor in nested containers, level by level.

    Raises:
        ValueError: there are too many levels, as where a container holds itself, or too many values, as where many hold the same one.
    """
    layer, seen = [content], 0
    for _ in range(MAX_DEPTH):
        seen += len(layer)
        if seen > MAX_VALUES:
            break
        yield from (value for value in layer if isinstance(value, Tensor))
        layer = [inner for value in layer for inner in _inner(value)]
        if not layer:
            return
    raise ValueError(f"{printable(path)} is damaged: what it holds is nested without end")


def _inner(value: Any) -> Iterable[Any]:
    """The values in a container; none in anything else."""
    if isinstance(value, argparse.Namespace) or is_dataclass(value):
        return vars(value).values()
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, (list, tuple, set)) else ()


def _reason(error: Exception) -> str:
    """Why torch does not read a file, in one line. Its own message has many lines, and codes for terminals."""
    if foreign := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"beside tensors it holds a {foreign[1]}, which is not read from a file, because it could run code"
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0].strip()
    return f"{type(error).__name__}: {one_line(text, 300)}" if text else type(error).__name__
