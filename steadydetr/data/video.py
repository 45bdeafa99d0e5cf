"""Video files as images, by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

from PIL import Image

from steadydetr.data.picture_inputs import is_address
from steadydetr.files import check_regular, one_line, printable
from steadydetr.limits import DEFAULT_LIMITS, Limits

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"}


def is_video(path: object) -> TypeGuard[str | Path]:
    """Whether a path names a video, by its ending; an address names none."""
    return isinstance(path, (str, Path)) and not is_address(path) and Path(path).suffix.lower() in VIDEO_SUFFIXES


def frames(path: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator[Image.Image]:
    """The frames of a video file as RGB images, upright, decoded one after the other.

    Raises:
        ValueError: there is no such file, or it cannot be decoded (any further); names it.
        ImportError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need the package av: pip install 'steadydetr[video]'") from error
    try:
        check_regular(path)
    except FileNotFoundError:
        raise ValueError(f"there is no video {printable(path)}") from None
    after = ""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no pictures")
            for number, frame in enumerate(container.decode(video=0), 1):
                if frame.width * frame.height > limits.max_pixels:
                    raise ValueError(f"it has {frame.width} x {frame.height} pixels, more than max_pixels = {limits.max_pixels} allows")
                yield frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)
                after = f" after frame {number}"
    except (av.error.FFmpegError, ValueError) as error:
        raise ValueError(f"cannot read the video {printable(path)}{after}: {one_line(error, 300)}") from error
