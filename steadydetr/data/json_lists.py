"""The lists of a JSON file that is larger than memory: they are found by their brackets and read some entries at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import msgspec

from steadydetr.data.reading import named_errors
from steadydetr.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what decoding raises then
CHUNK = 2**20  # bytes that are looked at at once, at least two; a part of a list has about as many
BLANK = b" \t\n\r"  # what JSON allows between its signs
SIGNS = bytes(byte in b'[]{}"' for byte in range(256))  # 1 for those that structure is told by, in a table of all bytes
QUOTE = 2
ESCAPED = re.compile(rb"\\.", re.DOTALL)
NOT_FINITE = re.compile(rb'("(?:[^"\\]|\\.)*+")|NaN|-?Infinity', re.DOTALL)


class Part(NamedTuple):
    """Bytes of a file that hold whole entries of a list, and the commas between them and before the first."""

    start: int
    stop: int
    entries: int  # how many of them are lists or objects


@dataclass
class Found:
    """Where in a file the lists are that lie in its outermost object, and what is around them."""

    lists: list[list[Part]] = field(default_factory=list)
    around: list[Part] = field(default_factory=list)  # before the first list, between two, and after the last; with their brackets


@dataclass(frozen=True)
class JsonLists:
    """A JSON file that should hold an object with lists.

    What is around the lists, and each part of them, is decoded by msgspec. If all of these are JSON, the file is, and holds the same.
    """

    path: Path  # for messages
    file: BinaryIO
    found: Found
    nulls: bool = False  # read null in place of NaN and Infinity, which Python writes and JSON does not have

    @staticmethod
    def of(path: Path, file: BinaryIO, chunk: int = CHUNK) -> JsonLists:
        """Those of a file in UTF-8, from where it stands on."""
        with named_errors(path):
            return JsonLists(path, file, find_lists(file, chunk))

    @property
    def text(self) -> bytes:
        """The whole file."""
        return self._text(Part(self.found.around[0].start, self.found.around[-1].stop, 0))

    @property
    def without_lists(self) -> bytes:
        """The file with every list of the outermost object empty."""
        return b"".join(map(self._text, self.found.around))

    @cached_property
    def names(self) -> dict[str, list[Part]]:
        """The parts of every list by its name; of several of one name those of the last. Raises msgspec.DecodeError."""
        numbers = [b"%d" % number for number in range(len(self.found.lists))]
        numbered = b"".join(self._text(part) + number for part, number in zip(self.found.around, [*numbers, b""], strict=True))
        values = {name: bytes(value) for name, value in msgspec.json.decode(numbered, type=dict[str, msgspec.Raw]).items()}
        return {name: self.found.lists[int(value[1:-1])] for name, value in values.items() if value[:1] == b"["}

    def most(self, name: str) -> int:
        """How many lists or objects are in the list of that name."""
        return sum(part.entries for part in self.names[name])

    def read(self, name: str) -> Iterator[bytes]:
        """Lists as JSON which, one after the other, are the list of that name. Raises msgspec.DecodeError where they can be none."""
        for number, part in enumerate(self.names[name]):
            text = self._text(part).strip(BLANK)
            if number and text:
                if not text.startswith(b",") or text == b",":
                    raise msgspec.DecodeError("the entries of a list have one comma between them")
                text = text[1:]
            yield b"[" + text + b"]"

    def check(self, name: str) -> None:
        """Raise msgspec.DecodeError unless the list is JSON, whatever it holds."""
        decoder = msgspec.json.Decoder(list[msgspec.Raw])
        for text in self.read(name):
            decoder.decode(text)

    def _text(self, part: Part) -> bytes:
        with named_errors(self.path):
            self.file.seek(part.start)
            text = self.file.read(part.stop - part.start)
        return nulls_for_nan(text) if self.nulls else text


def nulls_for_nan(text: bytes) -> bytes:
    """JSON with null in place of NaN and Infinity."""
    if b"NaN" not in text and b"Infinity" not in text:
        return text
    return NOT_FINITE.sub(lambda found: found[1] or b"null", text)


def find_lists(file: BinaryIO, chunk: int) -> Found:
    """Go through a file by its brackets. What it finds in a file that is no JSON is no JSON either."""
    found, start = Found(), file.tell()
    depth, in_text = 0, False
    outside, cut = start, -1  # where what is around the lists goes on, and where the next part of an open list begins
    while block := _read_block(file, chunk):
        at, steps, in_text = _brackets(block, in_text)
        depths = depth + np.cumsum(steps, dtype=np.int64)  # after each bracket
        ends = at[(depths == 2) & (steps < 0)]  # of entries, if they are in a list
        for edge in np.flatnonzero(((depths == 2) & (steps > 0)) | ((depths == 1) & (steps < 0))).tolist():
            place = int(at[edge])
            if steps[edge] > 0 and block[place : place + 1] == b"[":
                cut = start + place + 1
                found.lists.append([])
                found.around.append(Part(outside, cut, 0))
            elif steps[edge] < 0 and cut >= 0:
                outside = start + place
                found.lists[-1].append(Part(cut, outside, int(((ends >= cut - start) & (ends < place)).sum())))
                cut = -1
        entries = int((ends >= cut - start).sum()) if cut >= 0 else 0
        if entries:
            stop = start + int(ends[-1]) + 1
            found.lists[-1].append(Part(cut, stop, entries))
            cut = stop
        depth = int(depths[-1]) if len(depths) else depth
        start += len(block)
    found.around.append(Part(outside if cut < 0 else cut, start, 0))
    return found


def _read_block(file: BinaryIO, chunk: int) -> bytes:
    """The next bytes of a file, two or more as a rule, with others in place of what is escaped."""
    block = file.read(chunk)
    if b"\\" in block:
        block = ESCAPED.sub(b"__", block)
        if block.endswith(b"\\") and len(block) > 1:  # what it escapes comes next
            file.seek(-1, os.SEEK_CUR)
            block = block[:-1]
    return block


def _brackets(block: bytes, in_text: bool) -> tuple[NDArray[np.int64], NDArray[np.int8], bool]:
    """Where brackets and braces are that are not in texts, 1 for those that open and -1 for others, and whether the block ends in a text.

    Args:
        in_text: whether it begins in one.
    """
    at = np.flatnonzero(np.frombuffer(block.translate(SIGNS), bool))
    signs = _meanings()[np.frombuffer(block, np.uint8)[at]]
    if not len(at):
        return at, signs, in_text
    quotes = signs == QUOTE
    in_texts = np.logical_xor.accumulate(quotes) ^ in_text  # after each sign
    outside = ~(in_texts | quotes)
    return at[outside], signs[outside], bool(in_texts[-1])


@cache
def _meanings() -> NDArray[np.int8]:
    """Of every byte: 1 if it opens, -1 if it closes, QUOTE."""
    table = np.zeros(256, np.int8)
    table[list(b"[{")], table[list(b"]}")], table[list(b'"')] = 1, -1, QUOTE
    return table
