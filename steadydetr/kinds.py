"""The one table of parts: what saved files call them, what the command line calls them, and which package brings them.

A part is a frozen dataclass that recipes, checkpoints or data sets are made of, or a function that one of them names. Its kind stands
in saved files and never changes: `dino`, `focal-cost`. A part of another package has the name of that package before it:
`mylab:entropy`. Other packages come in by an entry point of the group `steadydetr.plugins`, or because the user names them.
A name in a file is only ever looked up in this table; it never causes an import.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar

from steadydetr.files import listed

PACKAGE = "steadydetr"
ENTRY_POINTS = "steadydetr.plugins"
SHOWN = 12  # names that a message lists where none is near
CHANGEABLE = "changeable"  # in the metadata of fields that do not decide what is learned
Part = TypeVar("Part", bound=Callable[..., Any])
T = TypeVar("T")

_parts: dict[str, Any] = {}  # by kind
_words: dict[str, tuple[str, ...]] = {}  # by kind, what flags call it; help shows the first
_kinds: dict[Any, str] = {}  # by part
_failed: dict[str, BaseException] = {}  # plugins that could not be imported, by the name of their package
_imported: set[str] = set()  # packages that were imported as plugins; one with recipes alone has no part in the table
_installed_are_loaded = False
plugins_in_use: list[str] = []  # as the user named them, to be passed on to other processes


def changeable(default: T) -> T:
    """The default of a config's field that does not decide what is learned, such as an interval of logging.

    A resumed run may have another value of it.
    """
    return field(default=default, metadata={CHANGEABLE: True})  # type: ignore[no-any-return]


def register(kind: str, *words: str) -> Callable[[Part], Part]:
    """Enter a class or function into the table: `@register("focal-cost", "focal")`.

    Args:
        kind: what saved files call it, for good: lower-case words with hyphens.
        words: what the command line calls it; the kind itself if none is given. The kind is understood as well.

    Raises:
        ValueError: the kind is taken, or is not written as a kind must be.
        TypeError: the class is no frozen dataclass.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", kind):
        raise ValueError(f"a kind is made of lower-case words with hyphens, as in focal-cost, not {kind!r}")

    def enter(value: Part) -> Part:
        if not isinstance(value, FunctionType) and not _is_frozen_dataclass(value):
            raise TypeError(f"{value.__qualname__} must be a function or a dataclass: @register({kind!r}) above @dataclass(frozen=True)")
        origin = value.__module__.partition(".")[0]
        full = kind if origin == PACKAGE else f"{origin}:{kind}"
        if origin != PACKAGE and isinstance(value, type):
            _check_foreign(value)
        before = _parts.get(full)
        if before is not None and (before.__module__, before.__qualname__) != (value.__module__, value.__qualname__):
            raise ValueError(f"the kind {full!r} is taken by {before.__module__}.{before.__qualname__}")
        _parts[full], _kinds[value] = value, full
        _words[full] = words if words and origin == PACKAGE else (full,)
        return value

    return enter


def _is_frozen_dataclass(value: Any) -> bool:
    """Whether a class is a frozen dataclass itself, not only its base, because then its own fields would not be saved."""
    return is_dataclass(value) and "__dataclass_params__" in vars(value) and vars(value)["__dataclass_params__"].frozen


def _check_foreign(part: Any) -> None:
    """Raise TypeError unless a part of another package can be made without arguments, by the command line, and with all, from a file."""
    for each in fields(part):
        if not each.init or each.default is each.default_factory is MISSING:
            raise TypeError(f"the field {each.name} of {part.__qualname__} needs a default, and must be one that can be given (init)")
    if inspect.isabstract(part):
        raise TypeError(f"{part.__qualname__} lacks {', '.join(sorted(vars(part)['__abstractmethods__']))}")


def kind_of(value: Any) -> str | None:
    """The kind of a class or function; None where it has none."""
    return _kinds.get(value)


def word_of(value: type) -> str:
    """What the command line calls a part."""
    kind = _kinds.get(value)
    return value.__qualname__ if kind is None else _words[kind][0]


def words_of(value: type) -> tuple[str, ...]:
    """Every word that the command line understands for a part."""
    kind = _kinds[value]
    return (kind, *_words[kind])


def find_part(kind: str, where: str) -> Any:
    """The class or function of that kind.

    Raises:
        ValueError: there is none, or it belongs to a package that is not in use; says `where` and what to do.
    """
    if kind not in _parts:
        load_own()
    if kind not in _parts and ":" in kind:
        load_installed()
    if kind in _parts:
        return _parts[kind]
    kind = kind[:100]  # a file may have anything in its place
    if not package_of(kind):
        raise ValueError(f"{where}: there is no {kind!r} in this version of {PACKAGE}{nearest(kind, own_kinds())}")
    raise ValueError(f"{where}: {not_found(kind, list(_parts))}")


def package_of(name: str) -> str:
    """The foreign package in a name such as `mylab:entropy`; empty where it names none."""
    package, colon, _ = name.partition(":")
    return package if colon and package != PACKAGE and package.isidentifier() else ""


def packages_in_use() -> list[str]:
    """The packages whose parts or recipes can be named, besides this one."""
    return sorted(_imported | {package_of(kind) for kind in _parts if package_of(kind)})


def not_found(name: str, known: Sequence[str], what: str = "part") -> str:
    """The error message for a name that no part has: the reason, and what to do.

    Args:
        name: as a user or a file has it, `focall` or `mylab:entropy`.
        known: the names that exist; those of other packages are `package:kind`.
        what: is named: "part", "function", "recipe", ...
    """
    package = package_of(name)
    if not package:
        return f"there is no {what} {name!r}{nearest(name, known)}"
    if package in _failed:
        return f"{name!r} belongs to the plugin {package}, which could not be imported: {_failed[package]}"
    if theirs := [other for other in known if package_of(other) == package]:
        return f"the plugin {package} has no {what} {name!r}{nearest(name, theirs)}"
    in_use = packages_in_use()
    if package in in_use:
        return f"the plugin {package} is in use, but it registers no {what} that fits"
    similar = [f"{other}{name.removeprefix(package)}" for other in difflib.get_close_matches(package, in_use)]
    meant = f"{did_you_mean(similar)} If not, name it" if similar else ". Name it"
    known_packages = f" (in use: {', '.join(in_use)})" if in_use and not similar else ""
    return (
        f"{name!r} belongs to the package {package}, which is not in use{known_packages}{meant}, --plugin {package} (or"
        f" the path of its file) or steadydetr.use({package!r}), if you trust it"
    )


def own_kinds() -> list[str]:
    """The kinds of this package's parts."""
    return [kind for kind in _parts if ":" not in kind]


def options(role: type) -> dict[str, type]:
    """All subclasses of `role` in the table, plugins' too, by the word that help shows."""
    load_own()
    load_installed()
    return {_words[kind][0]: value for kind, value in _parts.items() if isinstance(value, type) and issubclass(value, role)}


def functions() -> dict[str, Callable[..., Any]]:
    """All functions of the table, by kind."""
    load_own()
    load_installed()
    return {kind: value for kind, value in _parts.items() if isinstance(value, FunctionType)}


def normal(word: str) -> str:
    """The kind that a user's word stands for: half-sine for `Half_Sine`, my_lab:half-sine for `my_lab:Half_Sine`."""
    package, colon, kind = word.rpartition(":")
    return f"{package}{colon}{kind.replace('_', '-').lower()}"


def load_own() -> None:
    """Import the recipes, and with them all parts of this package. Nowhere else does a module import what stands above it."""
    for module in ("recipes", "checkpoints.card", "data.layouts"):
        importlib.import_module(f"{PACKAGE}.{module}")


def load_installed() -> None:
    """Import the installed plugins, once. The error of one that fails is printed, and repeated where a part of it is asked for."""
    global _installed_are_loaded
    if _installed_are_loaded:
        return
    _installed_are_loaded = True
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            importlib.import_module(entry.module)
            _imported.add(entry.module.partition(".")[0])
        except (Exception, SystemExit) as error:  # whatever a foreign module raises
            _failed[entry.module.partition(".")[0]] = error
            print(f"the plugin {entry.name} ({entry.module}) could not be imported: {type(error).__name__}: {error}", file=sys.stderr)


def foreign_parts_expected() -> bool:
    """Whether plugins are in use or installed, whose parts and recipes are known only when they are imported."""
    return bool(_imported or plugins_in_use or entry_points(group=ENTRY_POINTS))


def use(name: str) -> None:
    """Bring in the parts of another package: import a module, of the current folder too, or a file by its path.

    Args:
        name: `mylab`, `mylab.detectors`, or by its path a file or the folder of a package, `path/to/mylab.py`, `path/to/mylab`.

    Raises:
        ValueError: there is no such module or file, another one of that name comes first, or it cannot be imported; says why.
    """
    module = _find_plugin(name)
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"--plugin {name} cannot be imported: {type(error).__name__}: {error}") from error
    _imported.add(module.partition(".")[0])
    if name not in plugins_in_use:
        plugins_in_use.append(name)


def _find_plugin(name: str) -> str:
    """The module that a user means by `name`, after its folder was added to `sys.path`. None of its code is run yet."""
    if not name or name.startswith("-"):
        raise ValueError("--plugin names no module: give mylab or path/to/mylab.py after it")
    module, file, folder = name, None, Path.cwd()  # which `python -m` searches by itself, and an installed command does not
    if name.endswith(".py") or Path(name).name != name:
        path = Path(name).expanduser().absolute()
        module, file, folder = path.stem, (path / "__init__.py" if path.is_dir() else path), path.parent
        if not file.is_file():
            raise ValueError(f"--plugin {name}: there is no such file, and no package in such a folder")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    top = module.partition(".")[0]
    try:
        found = importlib.util.find_spec(top)
    except ValueError:  # a module in sys.modules that has no __spec__
        found = None
    if found is None:
        raise ValueError(f"--plugin {name}: there is no module {top!r}, neither installed nor in the current folder")
    if found.origin is None:
        raise ValueError(f"--plugin {name}: {top!r} is a folder without __init__.py, not a package")
    if file is not None and not (Path(found.origin).is_file() and file.samefile(found.origin)):
        raise ValueError(f"--plugin {name}: another module called {top!r} comes first, {found.origin}; rename one of the two")
    return module


def nearest(wanted: str, known: Sequence[str]) -> str:
    """The end of an error message: the names nearest to `wanted`, or the first that are known if none is near."""
    close = difflib.get_close_matches(wanted[:100], known, n=3, cutoff=0.4)
    return did_you_mean(close) if close else f"; there are {listed(known, SHOWN) or 'none'}"


def did_you_mean(names: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(map(repr, names))}?"
