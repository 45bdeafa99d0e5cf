"""Reading and writing of files: only regular files of a bounded size are read, and a file is written whole or not at all.

What a command writes neither replaces nor joins files of the user's, unless the user asks for it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

UNFINISHED = ".unfinished"  # how the name of a file or folder ends that is being written
MARKER = ".steadydetr"  # in a folder that a command of ours has made: the name of that command
SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", ".gitignore", ".nfs")
IGNORED = (*SYSTEM_FILES, MARKER, ".lock")  # a folder that holds only files whose names begin like these counts as empty
JSON_LIMIT = 64 * 2**20  # bytes that a JSON file may have: a config, a summary, a recipe
JSON_DEPTH = 64  # how deep objects and lists may be nested; far deeper ones would exceed Python's limit of recursion


# Reading


def read_bytes(path: Path, limit: int | None = None, option: str = "") -> bytes:
    """The content of a regular file.

    Args:
        limit: bytes that it may have at most.
        option: by which the user sets the limit, in MiB; empty: it is fixed.

    Raises:
        ValueError: it is a folder, a pipe or a device, which could block for ever, or it is longer than `limit`; names it.
        OSError: it is not there or may not be read.
    """
    check_regular(path, limit, option)
    return path.read_bytes()


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: it is no regular file, longer than `limit` bytes, or damaged; names it.
        OSError: it is not there or may not be read.
    """
    return parse_json(read_bytes(path, limit), printable(path))


def read_json_object(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The same for a file that must hold an object."""
    content = read_json(path, limit)
    if not isinstance(content, dict):
        raise ValueError(f"{printable(path)} is damaged: it holds a {type(content).__name__} instead of an object")
    return content


def parse_json(text: bytes, where: str) -> Any:
    """The value that a JSON text stands for; a ValueError says what is wrong with it. `where` is what the message calls the text."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is damaged: its lists and objects are nested too deep") from None
    except ValueError as error:  # no JSON, no text, or a number of thousands of digits
        raise ValueError(f"{where} is damaged, no JSON can be read from it: {error}") from None
    if text.count(b"[") + text.count(b"{") > JSON_DEPTH and _depth_exceeds(value, JSON_DEPTH):
        raise ValueError(f"{where} is damaged: its lists and objects are nested more than {JSON_DEPTH} deep")
    return value


def _depth_exceeds(value: Any, depth: int) -> bool:
    """Whether objects and lists are nested more than `depth` deep."""
    layer = [value]  # all values that lie equally deep
    for _ in range(depth + 1):
        layer = [inner for v in layer if isinstance(v, (dict, list)) for inner in (v.values() if isinstance(v, dict) else v)]
    return bool(layer)


def check_regular(path: Path, limit: int | None = None, option: str = "") -> int:
    """The size in bytes of a regular file; links are followed. Raises what `read_bytes` raises, without reading the file."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        what = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise ValueError(f"{printable(path)} is {what}, not a file")
    if limit is not None and status.st_size > limit:
        most = f"{limit / 2**20:.0f}"
        allowed = f", more than {option} = {most} allows" if option else f"; at most {most} are read"
        raise ValueError(f"{printable(path)} has {status.st_size / 2**20:.0f} MiB{allowed}")
    return status.st_size


def printable(value: object) -> str:
    """A text that may come from a stranger's file, for messages: line breaks, control and direction characters become escapes like \\n."""
    return "".join(c.encode("unicode_escape").decode("ascii") if _is_hidden(c) else c for c in str(value))


def one_line(message: object, most: int = 4000) -> str:
    """A message in one line: its lines are joined, hidden characters become escapes, and beyond `most` characters it is cut."""
    line = printable(" ".join(part.strip() for part in str(message).splitlines() if part.strip()))
    return line if len(line) <= most else f"{line[:most]} ... ({len(line)} characters)"


def counted(number: int, thing: str) -> str:
    """`1 image` or `2 images`."""
    return f"{number} {thing}" + "s" * (number != 1)


def listed(values: Iterable[object], most: int = 40) -> str:
    """Values for an error message: all of them, or the first `most` and how many more there are."""
    texts = [str(value) for value in values]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def _is_hidden(character: str) -> bool:
    joiners = "\u200c\u200d"  # of Persian, of Indian scripts and of emoji
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in joiners


# Writing


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into, which takes the name `path` when the block ends, and is removed if it ends by an exception.

    A crash leaves either the old file or the new one, never half of it. A link in its place is replaced, not followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name[:40]}.", suffix=UNFINISHED, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def remove_tree(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link without what it leads to; nothing happens where there is none."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the files and folders that a killed program left half written in the folder."""
    for path in folder.glob(f".*{UNFINISHED}"):
        remove_tree(path)


def umask() -> int:
    """The process's mask of permissions for new files. It can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def refuse_existing(path: Path | None, overwrite: bool) -> None:
    """Raise FileExistsError where a command would replace a file that the user did not offer by `--overwrite`."""
    if path is None:
        return
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder, and --output names a file here: choose another --output")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} is there already: choose another --output, or add --overwrite to replace it")


def claim_folder(path: Path, command: str, *, again: bool = False, overwrite: bool = False) -> None:
    """Make `path` a folder that the command may write into, and mark it as its own before anything else is written.

    Args:
        command: its name, which the marker holds.
        again: whether a folder that the same command has made may be written into again.
        overwrite: whether any folder may be, files of the same names being replaced.

    Raises:
        FileExistsError: there is a folder with other things in it, or something that is no folder.
    """
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is not a folder: choose another --output")
    if path.is_symlink() and not path.exists():
        raise FileExistsError(f"{path} is a link to something that is not there: choose another --output")
    made_by = folder_made_by(path)
    if not (overwrite or is_free(path) or (again and made_by == command)):
        what = f"was made by `steadydetr {made_by}`" if made_by else "is not empty, and no command of steadydetr has made it"
        raise FileExistsError(f"{path} {what}: choose another --output, or add --overwrite to replace files of the same names in it")
    if made_by != command:
        write_text(path / MARKER, f"{command}\n")


def is_free(path: Path) -> bool:
    """Whether there is nothing at `path`, or a folder that is empty but for files of the system and unfinished files of ours."""
    if not path.is_dir():
        return not os.path.lexists(path)
    ours = "." if folder_made_by(path) else f".{MARKER}."  # the marker is the first file that a command writes
    names = (name for name in os.listdir(path) if not name.startswith(IGNORED))
    return all(name.startswith(ours) and name.endswith(UNFINISHED) for name in names)


def folder_made_by(path: Path) -> str:
    """The command that marked the folder as its own; empty for any other folder."""
    marker = path / MARKER
    if not marker.is_file() or marker.is_symlink():
        return ""
    return printable(marker.read_text(encoding="utf-8", errors="replace").strip()[:40])
