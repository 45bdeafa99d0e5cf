"""The words of a command line, before tyro turns them into a dataclass."""

from __future__ import annotations

from collections.abc import Sequence


def take_flag(words: Sequence[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of a flag, as in `--plugin mylab` and `--plugin=mylab`, and the words without the flag and its value.

    The flag may be written with underscores. If it comes several times, the first is taken.

    Returns:
        None where the flag is not among the words, "" where nothing follows it.
    """
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            used = 1 if equals else 2
            return value if equals else "".join(words[at + 1 : at + 2]), [*words[:at], *words[at + used :]]
    return None, list(words)


def take_recipe(words: Sequence[str], usage: str, example: str) -> tuple[str, list[str]]:
    """The recipe, which comes first, and the words after it. Without any word, or with --help, the usage is shown instead.

    Raises:
        ValueError: a flag comes first; shows the example.
        SystemExit: the usage was shown.
    """
    if words and not words[0].startswith("-"):
        return words[0], list(words[1:])
    if not words or {"-h", "--help"} & set(words):
        print(usage)
        raise SystemExit(0)
    raise ValueError(f"name a recipe first, as in `{example}`; `steadydetr recipes` lists them")
