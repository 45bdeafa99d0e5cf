"""The house has floors: a module imports from its own floor or below, and no two modules of a floor import each other in a circle.

All imports are read from the source, those inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "steadydetr"
NAME = PACKAGE.name

ADDRESSES_OF_0_1 = ("evaluation", "detections", "predict")  # modules that only say where their names stand today
FLOORS: dict[int, tuple[str, ...]] = {
    0: (
        *("boxes", "config", "devices", "fetching", "files", "finite", "kinds"),
        *("lazy", "limits", "old_formats", "papers", "recipe_index", "structures", "tensor_files"),
    ),
    1: ("equations", "nn", "data"),
    2: ("detectors",),
    3: ("checkpoints",),
    4: ("learning",),
    5: ("objectives", "metrics"),
    6: ("runs",),
    7: ("drawing", "recipes"),
    8: ("training", "tools"),
    9: ("cli", "__main__", "__init__", *ADDRESSES_OF_0_1),  # the last: the public names
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file; a package is its __init__.py."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


BUILDERS = ("nn.configs", "detectors.configs")  # a config imports what it builds when it builds it, and what is built knows its config


def imports(module: str, inner: bool = True) -> Iterator[str]:
    """The modules of the package that `module` names in any import statement; without `inner` ones, in those that run with the module."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree) if inner else tree.body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{MODULES[module]}:{node.lineno} has a relative import; the house writes them out"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == NAME:
                yield resolve(name.removeprefix(NAME).removeprefix("."))


def resolve(name: str) -> str:
    """`nn.layers.MLP` -> `nn.layers`; a name of the package itself -> `__init__`."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or "__init__"


def top(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_a_floor() -> None:
    homeless = sorted({top(module) for module in MODULES} - set(FLOOR_OF))
    assert not homeless, f"say in {Path(__file__).name} on which floor {homeless} stand"


def test_no_floor_lists_what_is_not_there() -> None:
    assert not sorted(set(FLOOR_OF) - {top(module) for module in MODULES})


@pytest.mark.parametrize("module", [m for m in MODULES if top(m) in FLOOR_OF])
def test_imports_point_downward(module: str) -> None:
    floor = FLOOR_OF[top(module)]
    upward = sorted({name for name in imports(module) if name != "__init__" and FLOOR_OF.get(top(name), 0) > floor})
    assert not upward, f"{module} (floor {floor}) imports {', '.join(f'{name} (floor {FLOOR_OF[top(name)]})' for name in upward)}"


def test_no_circles() -> None:
    """Reading `__version__` from the package is no import of what the package re-exports."""
    graph = {
        module: {name for name in imports(module, inner=not module.startswith(BUILDERS)) if name not in (module, "__init__")}
        for module in MODULES
        if module != "__init__"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_reading_of_imports() -> None:
    """The reader itself: lazy imports, packages, names that are no modules."""
    assert "detectors.base" in set(imports("learning.context"))
    assert "data" in set(imports("__init__"))  # under TYPE_CHECKING
    assert resolve("nn.layers.MLP") == "nn.layers"
    assert resolve("__version__") == "__init__"
    assert resolve("detectors.DINO") == "detectors"


def rooms_of_the_readme() -> list[str]:
    """Rooms and files of the package, in the order of the tree in the README."""
    tree = (PACKAGE.parent / "README.md").read_text().split("```\nsteadydetr/\n")[1].split("```")[0]
    return [line.split()[0] for line in tree.splitlines() if line.startswith("  ")]


def test_readme_shows_the_rooms_there_are() -> None:
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(rooms_of_the_readme()) == there - {"__init__.py", "__main__.py"} - {f"{name}.py" for name in ADDRESSES_OF_0_1}


def test_imports_point_up_in_the_tree_of_the_readme() -> None:
    """From later lines to earlier ones, as the README says."""
    line = {room.removesuffix("/").removesuffix(".py"): number for number, room in enumerate(rooms_of_the_readme())}
    for module in MODULES:
        later = [name for name in imports(module) if line.get(top(name), 0) > line.get(top(module), len(line))]
        assert not later, f"{module} imports {later}, which the README shows below it"
