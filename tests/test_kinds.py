"""The table of parts: what saved files and flags call them, and what becomes of names that it does not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

import numpy as np
import pytest

import steadydetr
from steadydetr.cli import run_command
from steadydetr.config import FORMAT, check_savable, from_plain, to_plain
from steadydetr.kinds import find_part, kind_of, load_own, own_kinds, register, use
from steadydetr.learning.class_terms import ClassCost, FocalCost, PositionTarget
from steadydetr.learning.criterion import Criterion
from steadydetr.old_formats import KINDS_OF_0_1, upgrade
from steadydetr.recipes import find
from steadydetr.recipes.base import RECIPES, recipe

# Kinds stand in files that users have: this list only grows.
RELEASED_KINDS = {*KINDS_OF_0_1.values()}


def test_kinds_of_saved_files_never_change() -> None:
    load_own()
    assert set(own_kinds()) >= RELEASED_KINDS


def test_the_fields_of_every_part_have_types_that_are_there() -> None:
    """A name that only checkers have, such as Tensor, would leave the fields of a saved part unchecked."""
    load_own()
    for kind in own_kinds():
        part = find_part(kind, "here")
        if isinstance(part, type):
            assert get_type_hints(part).keys() >= {field.name for field in fields(part)}


def test_every_part_of_a_recipe_comes_back() -> None:
    for name in ("steady-dino-4scale-r50-12ep", "small-stable-dino"):
        plain = json.loads(json.dumps(to_plain(find(name))))
        assert from_plain(plain) == find(name)
        assert '"type"' not in json.dumps(plain) and "steadydetr." not in json.dumps(plain)


def test_functions_have_kinds() -> None:
    plain = to_plain(PositionTarget(rescale="one"))
    assert plain["warp"] == {"kind": "identity"} and from_plain(plain) == PositionTarget(rescale="one")


def test_old_names_are_read() -> None:
    old = {
        "type": "steadydetr.classification.PositionTarget",
        "exponent": 1.0,
        "warp": {"function": "steadydetr.equations.stable.half_sine"},
    }
    assert upgrade(old) == {"kind": "position-target", "exponent": 1.0, "warp": {"kind": "half-sine"}}
    assert upgrade(upgrade(old)) == upgrade(old)


@pytest.mark.parametrize("name", ["steadydetr.__main__", "os.system", "steadydetr.cli.main", "builtins.eval", "../../etc", ""])
def test_a_file_names_kinds_and_nothing_else(name: str) -> None:
    for plain in ({"type": name}, {"function": name}, {"kind": name}):
        with pytest.raises(ValueError, match=r"there is no|needs a"):
            from_plain(plain)


def test_a_file_never_causes_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"belongs to the package evil, which is not in use( \(in use: .*\))?\. Name it, --plugin evil"):
        from_plain({"kind": "evil:part"})
    with pytest.raises(ValueError, match=r"there is no 'evil\.part'"):
        from_plain({"type": "evil.part"})
    assert "evil" not in sys.modules


def test_newer_files_say_so() -> None:
    with pytest.raises(ValueError, match=rf"its format is {FORMAT + 1}, this version of steadydetr reads up to {FORMAT}: update"):
        from_plain({"format": FORMAT + 1} | to_plain(Criterion()), "config.json")


@pytest.mark.usefixtures("table")
def test_what_has_no_kind_is_refused() -> None:
    @dataclass(frozen=True)
    class Unnamed(ClassCost):
        def __call__(self, terms: Any) -> Any: ...

    with pytest.raises(ValueError, match=r"recipe.criterion.class_cost cannot be saved: .*Unnamed has no kind"):
        check_savable(replace(find("small-dino"), criterion=Criterion(class_cost=Unnamed())), "recipe")


@pytest.mark.usefixtures("table")
def test_what_does_not_come_back_is_refused() -> None:
    @register("counting")
    @dataclass(frozen=True)
    class Counting(ClassCost):
        names: Any = None

        def __post_init__(self) -> None:
            object.__setattr__(self, "names", (*(self.names or ()), "again"))

        def __call__(self, terms: Any) -> Any: ...

    with pytest.raises(ValueError, match=r"would not come back from a file as it is: class_cost\.names"):
        check_savable(Criterion(class_cost=Counting()), "criterion")
    with pytest.raises(ValueError, match=r"criterion.class_cost.names\[0\] cannot be saved: .* not object"):
        check_savable(Criterion(class_cost=Counting((object(),))), "criterion")


@pytest.mark.slow
def test_parts_of_a_script_are_refused(tmp_path: Path) -> None:
    """A class of __main__ would be found by no other program."""
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import dataclass, replace\nfrom pathlib import Path\nimport steadydetr\n"
        "from steadydetr.learning.class_terms import FocalCost\nfrom steadydetr.recipes import find\n"
        "@steadydetr.register('mine')\n@dataclass(frozen=True)\nclass Mine(FocalCost):\n    pass\n"
        "recipe = find('small-dino')\n"
        "steadydetr.train(replace(recipe, criterion=replace(recipe.criterion, class_cost=Mine())), Path('run'))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "Mine is defined in the script or notebook itself" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("table")
def test_register_gives_a_kind_and_refuses_what_has_or_can_have_none() -> None:
    @register("sharp")
    @dataclass(frozen=True)
    class Sharp(FocalCost):
        power: float = 3.0

    assert kind_of(Sharp) == "tests:sharp" and find_part("tests:sharp", "") is Sharp
    assert from_plain(to_plain(Criterion(class_cost=Sharp(power=2.0)))).class_cost == Sharp(power=2.0)
    with pytest.raises(ValueError, match="the kind 'tests:sharp' is taken by"):
        register("sharp")(dataclass(frozen=True)(type("Other", (), {"__module__": __name__})))
    with pytest.raises(ValueError, match="lower-case words with hyphens"):
        register("Sharp_Cost")
    with pytest.raises(TypeError, match="must be a function or a dataclass"):
        register("loose")(type("Loose", (), {"__module__": __name__}))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("focal-cots", "there is no 'focal-cots' in this version of steadydetr; did you mean 'focal-cost'"),
        ("nowhere:entropy", "belongs to the package nowhere, which is not in use"),
    ],
)
def test_unknown_kinds_name_the_mend(kind: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_part(kind, "config.json")


def test_use_names_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no module 'no_such_lab'"):
        use("no_such_lab")
    with pytest.raises(ValueError, match="there is no such file"):
        use(str(tmp_path / "lab.py"))
    (tmp_path / "broken_lab.py").write_text("import no_such_dependency")
    with pytest.raises(ValueError, match="cannot be imported: ModuleNotFoundError: No module named 'no_such_dependency'"):
        use(str(tmp_path / "broken_lab.py"))
    (tmp_path / "leaving_lab.py").write_text("raise SystemExit('bye')")
    with pytest.raises(ValueError, match="cannot be imported: SystemExit: bye"):
        use(str(tmp_path / "leaving_lab.py"))
    (tmp_path / "code.py").write_text("")
    with pytest.raises(ValueError, match="another module called 'code' comes first"):
        use(str(tmp_path / "code.py"))
    (tmp_path / "bare_lab").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'bare_lab' is a folder without __init__\.py"):
        use("bare_lab")
    (tmp_path / "empty_lab.py").write_text("")
    use(str(tmp_path / "empty_lab.py"))
    with pytest.raises(ValueError, match="the plugin empty_lab is in use, but it registers no part that fits"):
        find_part("empty_lab:entropy", "config.json")
    for name in ("", "--data"):
        with pytest.raises(ValueError, match="names no module"):
            use(name)


def test_every_public_name_of_the_package_can_be_imported() -> None:
    assert all(getattr(steadydetr, name) is not None for name in steadydetr.__all__)


class Mode(StrEnum):
    A = "a"


@pytest.mark.parametrize("value", [[1, 2], Mode.A, np.float64(1.0), {"a": 1}])
def test_values_that_would_come_back_as_others_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"criterion\.gamma cannot be saved"):
        check_savable(Criterion(gamma=value), "criterion")


@pytest.mark.usefixtures("table")
def test_half_made_parts_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a function or a dataclass"):

        @register("forgotten")
        class Forgotten(FocalCost):
            power: float = 3.0

    with pytest.raises(TypeError, match="Required needs a default"):

        @register("required")
        @dataclass(frozen=True)
        class Required:
            power: float


def test_fields_called_type_are_nobodys_kind() -> None:
    plain = {"kind": "mylab:x", "type": "a", "function": "b", "n": 1}
    assert upgrade(plain) == plain and upgrade({"type": 3, "recipe": {}}) == {"type": 3, "recipe": {}}


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"kind": "training", "epochs": "three"}, "epochs = 'three': str is not an instance of int"),
        ({"kind": "training", "epochs": 1.5}, "epochs = 1.5: float is not"),
        ({"kind": "training", "epochs": True}, "epochs = True: true and false are no numbers"),
        ({"kind": "training", "drop_epochs": [1, True]}, "drop_epochs = .*: true and false are no numbers"),
        ({"kind": "training", "epochs": 10**400}, "epochs is no number that can be counted with"),
        ({"kind": "training", "lr": float("nan")}, "lr is no number that can be counted with: nan"),
        ({"kind": "training", "drop_epochs": [1, "x"]}, "drop_epochs = .* item 1"),
        ({"kind": "training", "schedule": "stairs"}, "schedule = 'stairs'"),
        ({"kind": "recipe", "name": "half"}, "recipe cannot be made of these values"),
        ({"kind": "criterion", "class_cost": {"kind": "half-sine"}}, "class_cost = .* is not an instance of .*ClassCost"),
        (
            {"kind": "criterion", "class_target": {"kind": "position-target", "warp": {"kind": "focal-cost"}}},
            "warp = a focal-cost: the kind",
        ),
        ({"kind": "transformer", "heads": 0}, r"heads = 0 must lie in 1 \.\."),
    ],
)
def test_values_of_a_wrong_type_are_one_error(plain: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"config\.json: .*{said}"):
        from_plain(plain, "config.json")


@pytest.mark.parametrize("found", ["2", 2.0, None, True, 0, -1])
def test_odd_formats_are_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="which no version of steadydetr has written"):
        from_plain({"format": found} | to_plain(Criterion()))


def test_recipes_of_a_plugin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that cannot be made costs only itself; capitals do not matter; a name taken twice is an error."""
    before = dict(RECIPES)
    lab = tmp_path / "recipe_lab.py"
    lab.write_text(
        "import steadydetr\nfrom steadydetr.recipes import find\n"
        "@steadydetr.recipe\ndef Small_DINO(): return find('small-dino')\n"
        "@steadydetr.recipe\ndef broken(): raise KeyError('gone')\n"
        "@steadydetr.recipe\ndef nothing(): return None\n"
    )
    use(str(lab))
    try:
        assert find("recipe_lab:Small_DINO") == find("small-dino")
        with pytest.raises(ValueError, match="cannot be made: KeyError: 'gone'"):
            find("recipe_lab:broken")
        with pytest.raises(ValueError, match="its function gave a NoneType"):
            find("recipe_lab:nothing")
        run_command("recipes", [])
        assert "small-dino" in capsys.readouterr().out
        with pytest.raises(ValueError, match="make a recipe called tests:quickstart"):
            for number in range(2):
                recipe(FunctionType((lambda: None).__code__, {"__name__": f"tests.{number}"}, "quickstart"))
    finally:
        RECIPES.clear()
        RECIPES.update(before)
