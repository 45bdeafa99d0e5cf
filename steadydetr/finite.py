"""NaN and infinite numbers where they must not be: the error that reports them, and the search for the tensors that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from steadydetr.files import listed
from steadydetr.lazy import torch
from steadydetr.structures import Batch

if TYPE_CHECKING:
    from torch import Tensor

NAMED_TENSORS, NAMED_IMAGES = 3, 16  # how many a message names


class NotFiniteError(FloatingPointError):
    """Something is NaN or infinite. The message says what, and for which images."""

    def __init__(self, what: str, batch: Batch | None = None) -> None:
        """
        Args:
            batch: the batch that it was computed from; None: no single one, or an unknown one.
        """
        super().__init__(what)
        self.batch = batch


@contextmanager
def prefix_errors(where: object) -> Iterator[None]:
    """Within the block, the message of a NotFiniteError gets `where`, such as the name of a file, before it."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{where}: {error}", error.batch) from error


def images_named(ids: Iterable[int | str]) -> str:
    """The images as a message names them, by their ids in the data: "images 3, 7"."""
    found = sorted(ids, key=lambda i: (isinstance(i, str), i))
    return f"image{'s' * (len(found) > 1)} {listed(map(repr, found), NAMED_IMAGES)}"


def where_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """How many of the tensors are not finite, with the names of the first; "" if all are finite. No tensor leaves its device."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return ""
    device = next(iter(floating.values())).device
    finite = torch.stack([tensor.detach().isfinite().all().to(device) for tensor in floating.values()]).tolist()
    names = [name for name, is_finite in zip(floating, finite, strict=True) if not is_finite]
    return f"{len(names)} of {len(floating)} tensors ({listed(names, NAMED_TENSORS)})" if names else ""


def tensors_in(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dictionaries and lists, by the keys that lead to them, joined by dots."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, Mapping | list | tuple):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from tensors_in(value, f"{name}.{key}" if name else str(key))
