"""Sending values with tensors over a socket. Tensors are not pickled: their memory is sent as it is, and received into new tensors.

A message is the number of its parts, the size of each, and the parts: the pickled value without its tensors, then every tensor.
"""

from __future__ import annotations

import pickle
import socket
import struct
from io import BytesIO
from typing import Any

import torch
from torch import Tensor


def send(connection: socket.socket, value: Any) -> None:
    """Send a value that can be pickled; an OSError if the other end is closed."""
    body = BytesIO()
    pickler = _Pickler(body)
    pickler.dump(value)
    parts = [body.getbuffer(), *(_as_bytes(tensor).numpy().data for tensor in pickler.tensors)]
    connection.sendall(struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts)))
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket, pin: bool = False) -> Any:
    """Receive the value that `send` sent; an EOFError if the other end is closed.

    Args:
        pin: tensors into page-locked memory, from which a GPU copies while the host goes on.
    """
    (count,) = struct.unpack("<Q", _read(connection, 8).numpy().data)
    sizes = struct.unpack(f"<{count}Q", _read(connection, 8 * count).numpy().data)
    body, tensors = _read(connection, sizes[0]), [_read(connection, size, pin) for size in sizes[1:]]
    return _Unpickler(BytesIO(body.numpy().data), tensors).load()


def _read(connection: socket.socket, size: int, pin: bool = False) -> Tensor:
    """Receive [size] bytes, by a single call where the system can, so that other threads run meanwhile."""
    data = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    view, done = data.numpy().data, 0
    while done < size:
        received = connection.recv_into(view[done:], size - done, socket.MSG_WAITALL)
        if not received:
            raise EOFError
        done += received
    return data


def _as_bytes(tensor: Tensor) -> Tensor:
    """[bytes] the memory of a tensor of any shape and type."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class _Pickler(pickle.Pickler):
    """Pickles a value without its tensors, which it collects in `tensors`."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Tensor:
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1, value.dtype, tuple(value.shape)


class _Unpickler(pickle.Unpickler):
    """Unpickles a value and makes its tensors of the bytes in `tensors`."""

    def __init__(self, file: BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, key: Any) -> Tensor:
        number, dtype, shape = key
        return self.tensors[number].view(dtype).view(shape)
