"""Numbers that are NaN or infinite where they must not be: the error that says so, and in which tensors they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steadydetr.structures import Batch

NAMED, LISTED = 3, 16  # tensors and images that a message names


class NotFiniteError(FloatingPointError):
    """Something is NaN or infinite. Its message is a clause that says what, and of which images."""

    def __init__(self, what: str, batch: Batch | None = None) -> None:
        """
        Args:
            batch: what it came of; None: of no single batch, or of an unknown one.
        """
        super().__init__(what)
        self.batch = batch


@contextmanager
def said_of(where: object) -> Iterator[None]:
    """A NotFiniteError in the block comes out with `where`, such as the name of a file, before its message."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{where}: {error}", error.batch) from error


def images_named(ids: Iterable[int | str]) -> str:
    """The images as a message names them, by their ids in the data."""
    listed = sorted(ids, key=lambda i: (isinstance(i, str), i))
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return f"image{'s' * (len(listed) > 1)} {', '.join(map(repr, listed[:LISTED]))}{more}"


def where_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """How many of the tensors are not finite, with the names of the first; "" if all are. They are looked at on their devices."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return ""
    device = next(iter(floating.values())).device
    finite = torch.stack([tensor.detach().isfinite().all().to(device) for tensor in floating.values()]).tolist()
    names = [name for name, is_finite in zip(floating, finite, strict=True) if not is_finite]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} of {len(floating)} tensors ({', '.join(names[:NAMED])}{more})" if names else ""


def tensors_in(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries and lists, by the keys that lead to them, joined by dots."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping | list | tuple):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
