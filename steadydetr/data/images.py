"""Image files and arrays, decoded to RGB in one way for all commands."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from PIL import Image, UnidentifiedImageError

from steadydetr.data.picture_inputs import ArrayLike, Encoded, File, as_pixels, from_array, is_array, to_file
from steadydetr.data.reading import check_file
from steadydetr.files import printable
from steadydetr.lazy import np
from steadydetr.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray

Picture: TypeAlias = "File | Image.Image | ArrayLike"
# What Pillow may open. It knows many more formats by content, whatever a file is called, and some run other programs: EPS Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# how names of files of these formats end
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".pgm", ".ppm")
ORIENTATION = 0x0112  # the EXIF tag
BANDS_OF_TIFF = 277  # the tag SamplesPerPixel
TURNS = {  # what its values ask for
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MISSING = 113  # a dark grey, for pixels that a file lacks
MOST_MISSING = 1 / 3  # share of the rows of pixels that a file may lack at its end
BITS = (8, 10, 12, 14, 16)  # of a pixel in files of 16 bits
END_OF_JPEG, SCAN_OF_JPEG = b"\xff\xd9", b"\xff\xda"
MOST_SAID = 5  # remarks of one process on image files
_opening = threading.Lock()  # held while global variables of Pillow and of warnings are others
_said = set[str]()


@dataclass(frozen=True)
class Decoded:
    """An image file as pixels, and what is remarkable about it."""

    image: Image.Image  # RGB, or RGBA, turned as its EXIF orientation says
    stored: Image.Image  # the same, not turned
    orientation: int  # of EXIF; 1: as it is stored
    cut: str = ""  # what the file lacks at its end
    scaled: str = ""  # how pixels of more than 8 bits became 8


def open_picture(image: Picture, limits: Limits = DEFAULT_LIMITS, alpha: bool = False) -> Image.Image:
    """The RGB image, or RGBA, in anything that `predict` takes: see `picture_inputs`.

    A file is turned as its EXIF orientation says; a Pillow image is not, because its owner sees it as it is.

    Raises:
        ValueError: it cannot be read, or an array or a tensor has another shape or type than images have; names it.
        TypeError: it is nothing that could be an image.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image.copy(), alpha)[0]  # its owner keeps the other
    if is_array(image):
        return from_array(image, alpha)
    file = to_file(image, limits)
    decoded = decode_picture(file, limits, alpha)
    remark(file, decoded)
    return decoded.image


def open_pixels(image: Picture, channels: int = 3, limits: Limits = DEFAULT_LIMITS) -> NDArray[np.uint8]:
    """The pixels [H, W, channels] of anything that `predict` takes; see `open_picture`."""
    if is_array(image) and channels not in (1, 3, 4):
        return as_pixels(image, channels)
    return to_channels(np.asarray(open_picture(image, limits, channels == 4)), channels)


def to_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] as grey ones [H, W, 1], or opaque RGBA [H, W, 4]. Those that have so many channels stay as they are.

    Raises:
        ValueError: there is no way to have so many.
    """
    if pixels.shape[2] == channels:
        return pixels
    if pixels.shape[2] == 3 and channels == 1:
        return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    if pixels.shape[2] == 3 and channels == 4:
        return np.asarray(Image.fromarray(pixels).convert("RGBA"))
    raise ValueError(
        f"detector.backbone.image_channels = {channels}, but image files are read with 1 (grey), 3 (RGB) or 4 channels (RGBA): take one of"
        " these, or a data layout of your own that gives others (docs/extending.md)"
    )


def as_picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Pixels [H, W, C] as people look at them: of 3 or 4 channels red, green and blue, else the first one as grey."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3] if pixels.shape[2] in (3, 4) else pixels[..., 0])).convert("RGB")


def remark(file: Path | Encoded, decoded: Decoded) -> None:
    """Say what is remarkable about an image file, of the first such files of this process."""
    if (decoded.cut or decoded.scaled) and len(_said) < MOST_SAID and str(file) not in _said:
        _said.add(str(file))
        what = "; ".join(filter(None, (decoded.cut, decoded.scaled)))
        more = ". Further ones are not named; `steadydetr check` names all of a data set" if len(_said) == MOST_SAID else ""
        logging.getLogger(__name__).warning("%s is read, but %s%s", printable(file), what, more)


def decode_picture(file: Path | Encoded, limits: Limits = DEFAULT_LIMITS, alpha: bool = False) -> Decoded:
    """The pixels of an image file, however they are stored (D-100). Up to a third of its rows may be missing at its end.

    Args:
        alpha: RGBA instead of RGB.

    Raises ValueError for a file that is unreadable, larger than allowed, or damaged otherwise; names it.
    """
    with _opened(file, limits) as opened:
        if alpha and opened.format == "TIFF" and opened.mode == "RGB" and opened.tag_v2.get(BANDS_OF_TIFF, 3) > 3:  # type: ignore[attr-defined]
            raise ValueError("its fourth band is not called alpha (ExtraSamples 2), and would not be read: save it as RGBA, as PNG")
        orientation, cut, pixels = _orientation(opened), "", opened
        try:
            opened.load()
        except OSError as error:
            if "truncated" not in str(error):
                raise
            pixels, cut = _load_cut(file, error)
        stored, scaled = _to_rgb(pixels, alpha)
        return Decoded(_turned(stored, orientation), stored, orientation, cut, scaled)


def decode_reduced(file: Path | Encoded, limits: Limits, size: tuple[int, int], reduction: int) -> NDArray[np.uint8] | None:
    """The pixels [h, w, 3] of a JPEG file of this (height, width), turned, of which fewer frequencies are decoded.

    Args:
        reduction: 2, 4 or 8: of so many rows, and of so many columns, one is left. The last stands for fewer where they do not divide.

    Returns:
        None for any other file, and for one that is cut off or damaged: `decode_picture` reads it or says what is wrong.
    """
    with _opened(file, limits) as opened:
        orientation = _orientation(opened)
        stored = size if orientation >= 5 else size[::-1]
        if opened.format != "JPEG" or opened.mode not in ("RGB", "L") or opened.size != stored:
            return None
        opened.draft("", (opened.width // reduction, opened.height // reduction))
        try:
            return np.asarray(_turned(_as_mode(opened, "RGB"), orientation))
        except OSError:
            return None


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as an EXIF orientation asks for."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def picture_size(path: Path | Encoded, limits: Limits) -> tuple[int, int]:
    """Height and width of an image file as it is turned, of which only the head is read; ValueError as `open_picture`."""
    with _opened(path, limits) as opened:
        height, width = opened.height, opened.width
        return (width, height) if _orientation(opened) >= 5 else (height, width)


@contextmanager
def _opened(path: Path | Encoded, limits: Limits) -> Iterator[Image.Image]:
    """An image file of which only the head has been read. What is wrong with it, inside the block too, is a ValueError that names it."""
    try:
        if isinstance(path, Path):
            check_file(path, limits.max_file_mb, "max_file_mb")
    except FileNotFoundError:
        raise ValueError(f"there is no image {printable(path)}") from None
    try:
        with open(path, "rb") if isinstance(path, Path) else nullcontext(path) as file, _open_any_size(file) as image:
            if image.width * image.height > limits.max_pixels:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than max_pixels = {limits.max_pixels} allows")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"cannot read the image {printable(path)}: it is damaged, or none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise exceptions of nearly any class where a file is broken
        raise ValueError(f"cannot read the image {printable(path)}: {printable(error) or type(error).__name__}") from error


def _open_any_size(file: IO[bytes]) -> Image.Image:
    """The file as Pillow opens it, without its own limit of pixels, which is a global variable; `max_pixels` takes its place."""
    with _quiet():
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings on broken metadata, which nobody here can mend, of one thread at a time."""
    with _opening, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _orientation(opened: Image.Image) -> int:
    """The EXIF orientation in the head of an image file, 1 to 8. TIFF files are turned by Pillow itself."""
    if opened.format == "TIFF":
        return 1
    try:
        with _quiet():
            found = Image.Image.getexif(opened).get(ORIENTATION, 1)  # that of PNG files would decode them
    except Exception:  # of nearly any class where the EXIF data are broken: then there is no orientation
        return 1
    return found if found in TURNS else 1


def _load_cut(file: Path | Encoded, error: OSError) -> tuple[Image.Image, str]:
    """The pixels of a file that ends too early, as browsers show it, and what is missing. Raises `error` where that is too much."""
    content = file.read_bytes() if isinstance(file, Path) else file.getvalue()
    kept, empty = _decode_rows(content)
    if kept.format in ("JPEG", "MPO"):  # of which Pillow holds back rows that it has decoded until it meets the end
        kept = _open_any_size(BytesIO(content + END_OF_JPEG))
        kept.load()
        if not kept.info.get("progressive"):
            pixels = np.asarray(kept)
            empty &= (pixels == pixels[:, :1]).reshape(len(pixels), -1).all(1)  # what is missing then is one grey
        elif content.count(SCAN_OF_JPEG) > 1:
            empty[:] = False  # the whole picture is there, if not in all its detail
    share = float(empty.mean())
    if share > MOST_MISSING:
        raise error
    return kept, f"the file ends too early: {share:.0%} of its rows are missing" if share else "the file ends too early"


def _decode_rows(content: bytes) -> tuple[Image.Image, NDArray[np.bool_]]:
    """As much of an image as Pillow decodes before it meets the end of the file, and the rows [H] of which it has nothing.

    Pixels that are missing are grey, or, where pixels have more than 8 bits, the least that there is, which leaves the range as it is.
    """
    image, pixels = _decode_onto(content, 0)
    missing = pixels != _decode_onto(content, 1)[1]
    deep = pixels.dtype.itemsize > 1
    image, _ = _decode_onto(content, pixels[~missing].min(initial=pixels.max()).item() if deep else MISSING)
    return image, missing.reshape(len(missing), -1).all(1)


def _decode_onto(content: bytes, value: float) -> tuple[Image.Image, NDArray[Any]]:
    """An image, and its pixels as an array, that has this value wherever nothing can be decoded before the end of the file."""
    opened = _open_any_size(BytesIO(content))
    opened.load_prepare()  # type: ignore[attr-defined]
    bands = len(opened.getbands())
    opened.im.paste((value,) * bands if bands > 1 else value, (0, 0, *opened.size))
    try:
        opened.load()
    except OSError:  # what has been decoded is in the image
        opened.tile = []  # type: ignore[attr-defined]
    return opened, np.asarray(opened)


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image itself if it has that mode already, because Pillow would copy it."""
    return image if image.mode == mode else image.convert(mode)


def _to_rgb(image: Image.Image, alpha: bool = False) -> tuple[Image.Image, str]:
    """The image as RGB or RGBA of 8 bits, and how it was scaled if its pixels had more: by the range that they have (D-101)."""
    mode = "RGBA" if alpha else "RGB"
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow asks for this step in between, with the same colours
        return _as_mode(image, mode), ""
    values = np.asarray(image).astype(np.float64)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (0.0, 255.0) if low >= 0 and high <= 255 else (low, high)
    elif low >= 0 and high < 2 ** BITS[-1]:
        low, high = 0.0, float(2 ** next(bits for bits in BITS if high < 2**bits) - 1)
    scaled = ((values - low) * (255 / max(high - low, 1e-30))).round().astype(np.uint8)
    kind = "floating-point numbers" if image.mode == "F" else "more than 8 bits"
    return Image.fromarray(scaled).convert(mode), f"its pixels are {kind}: {low:g} .. {high:g} are scaled to 0 .. 255"
