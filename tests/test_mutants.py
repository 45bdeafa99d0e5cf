"""The mutation tester itself: what it changes, and that its tables name what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import mutants as tool

SOURCE = '''\
"""A 1 in a docstring is no number."""

LIMIT: Literal[3] = 4  # a remark


class Thing:
    @torch.no_grad()
    def find(self, a: int, b: float = 0.5) -> float:
        if a < b and not a:
            raise ValueError(f"{a + 1} is too small" + str(2 * a))
        self.last = a
        print(a)
        x = largest(a, b.detach(), eps=0.0)
        return max(x - 1, True)
'''


def lines() -> list[str]:
    return [f"{mutant.function}: {mutant.after}" for mutant in tool.mutants(SOURCE)]


def test_what_is_changed() -> None:
    assert lines() == [
        ": LIMIT: Literal[3] = 5",
        ": LIMIT: Literal[3] = 3",
        "Thing.find: ",
        "Thing: def find(self, a: int, b: float = 1.0) -> float:",
        "Thing.find: if (a < b or not a):",
        "Thing.find: if (a <= b) and not a:",
        "Thing.find: if (a >= b) and not a:",
        "Thing.find: if a < b and a:",
        "Thing.find: pass",
        "Thing.find: pass",
        "Thing.find: x = largest(a, b.detach())",
        "Thing.find: x = largest(b.detach(), a, eps=0.0)",
        "Thing.find: x = largest(a, b, eps=0.0)",
        "Thing.find: x = largest(a, b.detach(), eps=1.0)",
        "Thing.find: return None",
        "Thing.find: return min(x - 1, True)",
        "Thing.find: return max((x + 1), True)",
        "Thing.find: return max(x - 2, True)",
        "Thing.find: return max(x - 0, True)",
        "Thing.find: return max(x - 1, False)",
    ]


def test_a_mutant_is_one_change_and_keeps_everything_else() -> None:
    for mutant in tool.mutants(SOURCE):
        before, after = SOURCE.splitlines(), mutant.source.splitlines()
        assert len(before) == len(after)
        assert [k for k, (a, b) in enumerate(zip(before, after, strict=True), 1) if a != b] == [mutant.line]


def test_functions_can_be_named() -> None:
    assert not tool.mutants(SOURCE, functions="other|fin") and len(tool.mutants(SOURCE, functions="other|find")) == 17


def test_justifications_are_read() -> None:
    found = tool.justified("# about\n\na.py C.f\n- x = 1\n+ x = 2\nnobody sees it,\nreally\n")
    assert found == {("a.py", "C.f", "x = 2"): "nobody sees it, really"}
    assert tool.justified("a.py f\n- x = 1\n+ *\nspeed\n") == {("a.py", "f", "any change of x = 1"): "speed"}
    with pytest.raises(AssertionError, match="x = 3"):
        tool.justified("a.py f\n- x = 3\n")


@pytest.mark.parametrize("entry", tool.COVERED)
def test_the_table_names_what_is_there(entry: str) -> None:
    """After a module has moved, its row moves with it."""
    file, _, functions = entry.partition("::")
    path = tool.ROOT / "steadydetr" / file
    assert path.is_file(), f"{file} is not there: change COVERED in tests/mutants.py"
    for name in filter(None, functions.split("|")):
        assert f"def {name}(" in path.read_text(), f"{file} has no {name}: change COVERED in tests/mutants.py"
    for name in tool.COVERED[entry]:
        assert (Path(__file__).parent / f"{name}.py").is_file(), f"tests/{name}.py is not there: change COVERED in tests/mutants.py"


def test_every_justification_is_of_a_mutant() -> None:
    """Where the code has changed, the reason may not hold any more: look at the mutant again, or strike the entry."""
    keys = list(tool.justified(tool.JUSTIFIED.read_text()))
    files = {file: (tool.ROOT / "steadydetr" / file).read_text() for file, *_ in keys}
    existing = {key for file, source in files.items() for mutant in tool.mutants(source, file) for key in mutant.keys}
    stale = [key for key in keys if key not in existing]
    assert not stale, f"tests/mutants.txt: no mutant is like {stale}"


def test_the_score_counts_time_limits_as_noticed() -> None:
    made = tool.mutants("a = 1 + 2\n", "some.py")
    results = ["killed", "timeout", "survived", "survived", "killed"]
    outcomes = [tool.Outcome(mutant, result, 1.0) for mutant, result in zip(made, results, strict=True)]
    rows = tool.table(outcomes, {("some.py", "", made[3].after): "why"}).splitlines()
    assert rows[2:] == ["| some.py | 5 | 3 | 1 | 1 | 1 |", "| all | 5 | 3 | 1 | 1 | 1 |"]
