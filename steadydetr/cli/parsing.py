"""From a dataclass to flags and back, by tyro."""

from __future__ import annotations

import collections.abc
import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from typing import Annotated, Any, TypeVar, get_origin

import tyro

from steadydetr.kinds import did_you_mean, functions, kind_of, normal, not_found
from steadydetr.old_formats import upgrade

T = TypeVar("T")
Overwrite = Annotated[bool, tyro.conf.FlagCreatePairsOff]  # a flag without --no-overwrite
REGISTRY = tyro.constructors.ConstructorRegistry()


def parse(kind: type[T], words: Sequence[str], command: str, description: str, default: T | None = None) -> T:
    """`kind` from the words of a command line.

    Raises:
        ValueError: an unknown option, with the nearest ones, or a wrong value; one line.
        SystemExit: help was asked for, and is shown.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            found, left = _ask_tyro(kind, words, command, description, default)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_error_line(printed.getvalue(), command)) from None
    sys.stderr.write(printed.getvalue())  # by a plugin's classes, when tyro made objects of them
    if left:
        raise ValueError(_not_understood(left[0], _flags(kind, command, description, default), command))
    return found


def _ask_tyro(kind: type[T], words: Sequence[str], command: str, description: str, default: T | None) -> tuple[T, list[str]]:
    """What tyro makes of the words, and the words that it does not know. For a wrong value it prints a box of text and exits."""
    with REGISTRY:
        return tyro.cli(
            kind,
            args=list(words),
            prog=f"steadydetr {command}",
            description=description,
            config=(tyro.conf.AvoidSubcommands,),
            default=tyro.MISSING_NONPROP if default is None else default,
            return_unknown_args=True,
        )


def _flags(kind: type[T], command: str, description: str, default: T | None) -> list[str]:
    """Every flag that the help shows."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        _ask_tyro(kind, ["--help"], command, description, default)
    return list(dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*(?:\.[a-z0-9-]+)*", shown.getvalue())))


def _not_understood(word: str, flags: Sequence[str], command: str) -> str:
    """The error message for a word that is no option.

    It names the flags with the same last part, `--training.lr` for `--lr`, or else those below it, or else those spelled like it.
    """
    more = f"`steadydetr {command} --help` shows all options"
    flag = word.partition("=")[0].replace("_", "-")
    if not flag.startswith("-"):
        return f"{word!r} is left over: it belongs to no option; {more}"
    last = flag.strip("-").rpartition(".")[2]
    same, below = [other for other in flags if other.endswith((f".{last}", f"--{last}"))], [o for o in flags if o.startswith(f"{flag}.")]
    close = (last and same) or below or difflib.get_close_matches(flag, flags)
    return f"there is no option {flag}{did_you_mean(close[:3]) if close else ';'} {more}"


def _error_line(box: str, command: str) -> str:
    """The error in a box that tyro printed, as one line: what is wrong, and how the option is written."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:]]
    lines = [line for line in lines if re.search(r"\w", line)]
    what = " ".join(takewhile(lambda line: not line.startswith(("Argument helptext", "For full helptext")), lines))
    usage = next((after for before, after in pairwise(lines) if before.startswith("Argument helptext")), "")
    expected = f"; write it as {usage}" if usage else ""
    what = re.sub(r"no type matching \S+ could be instantiated from \['(.*?)'\]\..*", r"\1 is none of these", what)
    what = what.removeprefix("Error parsing ").replace(f"Missing from steadydetr {command}:", "missing:").rstrip(".")
    return f"{what}{expected}; `steadydetr {command} --help` shows all options"


@REGISTRY.primitive_rule
def _function(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Tells tyro how to read a field that holds a function: by its kind, `half-sine` or `mylab:cubic`."""
    if get_origin(info.type) is not collections.abc.Callable:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FUNCTION",
        instance_from_str=lambda words: find_function(words[0]),
        is_instance=callable,
        str_from_instance=lambda function: [kind_of(function) or function.__qualname__],
    )


def find_function(word: str) -> Callable[..., Any]:
    """The registered function of that kind, with - or _, or by the full name that version 0.1 took; a ValueError gives the nearest ones."""
    known, kind = functions(), normal(upgrade({"function": word})["kind"])
    if kind not in known:
        raise ValueError(not_found(kind if ":" in word else word, list(known), "function"))
    return known[kind]
