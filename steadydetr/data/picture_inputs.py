"""What may stand for an image besides a Pillow image: a path, an address, bytes, an open file, an array or a tensor."""

from __future__ import annotations

import io
import os
import re
import time
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeGuard
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from PIL import Image

from steadydetr.data.reading import expanded
from steadydetr.fetching import network_reason
from steadydetr.files import printable
from steadydetr.lazy import np, torch
from steadydetr.limits import Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

File = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO  # a path or an address, or the content of an image file
ArrayLike: TypeAlias = "NDArray[Any] | Tensor"
TAKEN = "a path, an address (https://...), the bytes of an image file, a file opened with 'rb', a Pillow image, an array or a tensor"
FETCH_SECONDS = 20.0  # that fetching an address may take


class Encoded(io.BytesIO):
    """The content of an image file that lies on no disk here, and what messages call it."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


def is_address(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and re.match(r"[a-z][a-z\d+.-]+://", value, re.IGNORECASE) is not None


def is_array(value: object) -> TypeGuard[ArrayLike]:
    return isinstance(value, (np.ndarray, torch.Tensor))


def is_one_picture(value: object) -> bool:
    """Whether a value stands for one image, or is at least no list of several."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor)
    return isinstance(value, one) or hasattr(value, "read")


def to_file(image: object, limits: Limits) -> Path | Encoded:
    """The image file that a value names or holds.

    Raises:
        ValueError: an address cannot be fetched, or a file gives text or too much; names it.
        TypeError: the value is none of these.
    """
    if is_address(image):
        return Encoded(fetch(image, limits.max_file_mb), image)
    if isinstance(image, (str, os.PathLike)):
        return expanded(os.fspath(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Encoded(bytes(image), f"in {len(bytes(image))} bytes")
    if hasattr(image, "read"):
        name = f"in the open file {getattr(image, 'name', type(image).__name__)}"
        content = image.read(limits.max_file_mb * 2**20 + 1)
        if not isinstance(content, bytes):
            raise ValueError(f"cannot read the image {printable(name)}: it gives text; open it with 'rb'")
        if len(content) > limits.max_file_mb * 2**20:
            raise ValueError(f"cannot read the image {printable(name)}: it is larger than max_file_mb = {limits.max_file_mb} allows")
        return Encoded(content, name)
    raise TypeError(f"an image is {TAKEN}, not {type(image).__name__}")


def fetch(address: str, most_mb: int) -> bytes:
    """What lies at an address of the network; a ValueError says why it cannot be had, within FETCH_SECONDS."""
    if not address.lower().startswith(("http://", "https://")):
        raise ValueError(f"cannot fetch {printable(address)}: only addresses of http and https are taken")
    end, content = time.monotonic() + FETCH_SECONDS, bytearray()
    try:
        with urlopen(Request(_encoded(address), headers={"User-Agent": "steadydetr"}), timeout=FETCH_SECONDS) as answer:
            while part := answer.read1(2**16):
                content += part
                if len(content) > most_mb * 2**20:
                    raise ValueError(f"it is larger than max_file_mb = {most_mb} allows")
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes more than {FETCH_SECONDS:g} seconds")
    except (OSError, HTTPException, ValueError) as error:  # no network, no such host or page, too slow, no address
        raise ValueError(f"cannot fetch {printable(address)}: {network_reason(error)}. Without a network, give a file instead") from None
    return bytes(content)


def _encoded(address: str) -> str:
    """The address with blanks and letters beyond ASCII as browsers send them; what is encoded already stays."""
    parts = urlsplit(address)
    path, query = (quote(part, safe="%/:@!$&'()*+,;=?~") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, parts.netloc, path, query, ""))


def as_pixels(image: ArrayLike, channels: int) -> NDArray[np.uint8]:
    """The pixels in an array [H, W, channels] of uint8, or in a tensor [channels, H, W] of uint8 or of floats in 0 .. 1.

    Raises:
        ValueError: shape, type or values are others; says which are taken.
    """
    pixels = _of_tensor(image) if isinstance(image, torch.Tensor) else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
        wanted = (
            f"[{channels}, H, W] of uint8 or of floats in 0 .. 1" if isinstance(image, torch.Tensor) else f"[H, W, {channels}] of uint8"
        )
        raise ValueError(f"an image must be {wanted}, not {list(image.shape)} {str(image.dtype).removeprefix('torch.')}")
    return pixels


def from_array(image: ArrayLike, alpha: bool = False) -> Image.Image:
    """The RGB image in an array [H, W, 3] or [H, W] of uint8, or in a tensor [3, H, W] or [H, W] of uint8 or of floats in 0 .. 1.

    Args:
        alpha: RGBA, of four channels too.

    Raises:
        ValueError: shape, type or values are others; says which are taken.
    """
    pixels = _of_tensor(image) if isinstance(image, torch.Tensor) else image
    if alpha and pixels.ndim == 3 and pixels.shape[2] == 4:
        return Image.fromarray(np.ascontiguousarray(as_pixels(image, 4)))
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
        several = "; give several images as a list of such, list(images)" if image.ndim == 4 else ""
        raise ValueError(f"an image {_wanted(image)}, not {list(image.shape)} {str(image.dtype).removeprefix('torch.')}{several}")
    return Image.fromarray(np.ascontiguousarray(pixels)).convert("RGBA" if alpha else "RGB")


def _wanted(image: ArrayLike) -> str:
    if isinstance(image, torch.Tensor):
        return "tensor must be [3, H, W] RGB or [H, W] grey, of uint8 or of floats in 0 .. 1"
    return "array must be [H, W, 3] RGB or [H, W] grey, of uint8"


def _of_tensor(image: Tensor) -> NDArray[Any]:
    """The same values as an array with the channels last; floats in 0 .. 1 become uint8."""
    image = image.detach().cpu()
    if image.is_floating_point() and image.numel():
        low, high = image.aminmax()
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"an image {_wanted(image)}, and this one has values from {low.item():g} to {high.item():g}")
        image = (image.double() * 255).round().byte()
    found: NDArray[Any] = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    return found
