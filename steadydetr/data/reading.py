"""Files of a data set, which may come from a stranger, as bytes of a bounded number, and as text, JSON and XML in any usual encoding."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar, cast
from urllib.parse import unquote
from xml.etree import ElementTree

import msgspec

from steadydetr.files import check_regular, printable, read_bytes

T = TypeVar("T")
MIB = 2**20
CHUNK = 2**20  # characters of an XML file that are parsed at once
INT64 = 2**63
LONGEST = 2**31 - 1  # of an image's sides, which the index holds as 32-bit numbers
Id = Annotated[int, msgspec.Meta(ge=-INT64, le=INT64 - 1)]
Name = int | str  # ids of images, which COCO's tools take for names
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030"}  # encodings that files name although they hold more of the same characters
NO_ENCODINGS = ("idna", "punycode", "undefined")  # Python's codecs that no file is written in; the first two take very long


def expanded(where: str | Path) -> Path:
    """The path with the user's folder for ~; a user that does not exist is no error, as in a shell."""
    return Path(os.path.expanduser(where))


def is_file_name(name: str) -> bool:
    """Whether a text of an annotation file can be the name of a file at all."""
    return bool(name.strip()) and "\0" not in name


def parts_in_common(path: str, other: str) -> int:
    """How many parts at their ends two paths have in common; 0 where the names of the files differ."""
    pairs = zip(path.split("/")[::-1], other.split("/")[::-1], strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def is_hidden(name: str) -> bool:
    """Whether a file's name begins with a dot, as of the companions `._a.jpg` that macOS writes beside all files on foreign disks."""
    return name.startswith(".")


def name_on_disk(folder: Path, name: str) -> str:
    """The name of a file as it is written or, where no such file is in the folder, with `/` for the `\\` of Windows, without the `%20` of
    addresses, and with letters composed of others than theirs, `é` of one sign or of two: macOS, and what unpacks archives there, writes
    them otherwise."""
    if (name.isascii() and "\\" not in name and "%" not in name) or os.path.lexists(folder / name):
        return name
    plain = name.replace("\\", "/")
    others = [unicodedata.normalize(form, text) for text in dict.fromkeys((plain, unquote(plain))) for form in ("NFC", "NFD")]
    return next((other for other in others if is_file_name(other) and os.path.lexists(folder / other)), name)


def read_file(path: Path, most_mb: int, option: str) -> bytes:
    """The content of a regular file of at most `most_mb` MiB, as the field `option` of Limits has it.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it cannot be read, is something else, or is longer; names it.
    """
    with named_errors(path):
        return read_bytes(path, most_mb * MIB, option)


def check_file(path: Path, most_mb: int, option: str) -> None:
    """Raise what `read_file` raises, without reading the file."""
    with named_errors(path):
        check_regular(path, most_mb * MIB, option)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Within the block, an error of the system names the file, and is a ValueError unless there is no file."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {printable(path)}") from None
    except (OSError, MemoryError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise ValueError(f"cannot read {printable(path)}: {reason}") from error


def decode_text(data: bytes, path: Path, encoding: str = "") -> str:
    """Text in UTF-8, UTF-16 or UTF-32, with a byte order mark or without, or else in `encoding`; a ValueError names the file."""
    found = json.detect_encoding(data)  # type: ignore[attr-defined]
    name = found if found != "utf-8" else SUPERSETS.get(encoding.lower(), encoding) or "utf-8"
    try:
        if codecs.lookup(name).name in NO_ENCODINGS:
            raise LookupError(name)
        return data.decode(name)
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise ValueError(f"{printable(path)} is not {printable(name)} text ({where}): save it as UTF-8") from error
    except (LookupError, ValueError) as error:
        raise ValueError(f"{printable(path)} has the encoding {printable(name)}, which is not known: save it as UTF-8") from error


def foreign_encoding(data: bytes) -> str:
    """What a text is written in, in words, if other tools than this one may not read it; empty for plain UTF-8."""
    found = json.detect_encoding(data)  # type: ignore[attr-defined]
    return {"utf-8": "", "utf-8-sig": "UTF-8 with a byte order mark"}.get(found, found.upper())


def decode_json(data: bytes, path: Path, kind: type[T]) -> T:
    """The value of a JSON file as a msgspec type.

    Raises:
        msgspec.ValidationError: a value is not as the type asks; does not name the file.
        ValueError: the file is no JSON; names it, and the place in it.
    """
    encoding = json.detect_encoding(data)  # type: ignore[attr-defined]
    if encoding != "utf-8":
        data = data[3:] if encoding == "utf-8-sig" else decode_text(data, path).encode()
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        raise
    except UnicodeDecodeError:
        decode_text(data, path)  # says where in the file
        raise
    except RecursionError as error:
        raise ValueError(f"{printable(path)} is not JSON that can be read: it is nested too deep") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{printable(path)} is not JSON: {error}{_surroundings(data, str(error))}") from error


def open_json(path: Path) -> BinaryIO:
    """A JSON file to be read a part at a time, in UTF-8 from where it stands on. Raises ValueError as `decode_text` does."""
    with named_errors(path):
        file = open(path, "rb")  # noqa: SIM115  # its reader closes it
        encoding = json.detect_encoding(file.read(4))  # type: ignore[attr-defined]
        file.seek(3 if encoding == "utf-8-sig" else 0)
        if encoding in ("utf-8", "utf-8-sig"):
            return file
        with file:
            data = file.read()
    return io.BytesIO(decode_text(data, path).encode())


def _surroundings(data: bytes, message: str) -> str:
    """The text around the byte that an error message of msgspec names."""
    found = re.search(r"\(byte (\d+)\)", message)
    if not found:
        return ""
    at = int(found[1])
    line, text = data.count(b"\n", 0, at) + 1, data[max(0, at - 40) : at + 12].decode("utf-8", "replace")
    return f", in line {line}, near {printable(' '.join(text.split()))}"


def decode_xml(data: bytes, path: Path) -> ElementTree.Element:
    """The root of an XML file in any usual encoding, its names without namespaces; a ValueError names the file.

    Entities are refused, so that none can be expanded.
    """
    text = _xml_text(data, path)
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, UnicodeError) as error:
        raise ValueError(f"{printable(path)} is not XML: {error}") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def xml_elements(data: bytes, path: Path) -> Iterator[ElementTree.Element]:
    """The root of an XML file before its content is read, then each of its children, which is emptied after its use.

    Names are without namespaces. Raises what `decode_xml` raises, where the fault is.
    """
    text, open_elements = _xml_text(data, path), list[ElementTree.Element]()
    parser: ElementTree.XMLPullParser[ElementTree.Element] = ElementTree.XMLPullParser(("start", "end"))
    try:
        for start in range(0, len(text), CHUNK):
            parser.feed(text[start : start + CHUNK])
            for event, element in cast(Iterator[tuple[str, ElementTree.Element]], parser.read_events()):
                if event == "end":
                    open_elements.pop()
                else:
                    element.tag = element.tag.rpartition("}")[2]
                    open_elements.append(element)
                if len(open_elements) == 1:
                    yield element
                    if event == "end":
                        open_elements[0].clear()
        parser.close()
    except (ElementTree.ParseError, UnicodeError) as error:
        raise ValueError(f"{printable(path)} is not XML: {error}") from error


def _xml_text(data: bytes, path: Path) -> str:
    declared = re.match(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.-]+)["']""", data)
    text = decode_text(data, path, declared[1].decode() if declared else "")
    if "<!ENTITY" in text:
        raise ValueError(f"{printable(path)} defines entities, which no annotation needs; such a file is not read")
    return text.lstrip("\ufeff")
