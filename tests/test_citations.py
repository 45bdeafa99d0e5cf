"""What comments and pages cite exists: facts of the original code (F-NN), decisions (D-NN), and the functions that hold a fact."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "steadydetr"
FACTS, DECISIONS = ROOT / "docs" / "original-code.md", ROOT / "docs" / "decisions.md"
ENTRY = {FACTS: r"^- \*\*(F-\d{2,3})\*\* ", DECISIONS: r"^\| (D-\d{2,3}) \| "}
ELSEWHERE = ("reference-" + "facts", "detrdistill-" + "facts")  # notes outside the repository; in halves, so that this file has them not
TEXT = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".sh", ".cfg", ""}


@cache
def texts() -> dict[Path, str]:
    """Every text file of the repository: what stands in its own folders, and beside them at the top."""
    top = [path for path in ROOT.iterdir() if path.is_file()]
    below = [path for name in ("steadydetr", "tests", "docs", "benchmarks", ".ci") for path in (ROOT / name).rglob("*")]
    files = [path for path in (*top, *below) if path.is_file() and path.suffix in TEXT and path.name != ".git"]
    return {path: path.read_text() for path in files}


def entries(page: Path) -> list[str]:
    return re.findall(ENTRY[page], page.read_text(), re.MULTILINE)


def cited(letter: str, files: dict[Path, str]) -> dict[str, str]:
    """Each number that is cited -> where first."""
    found: dict[str, str] = {}
    for path, text in files.items():
        for number, line in enumerate(text.splitlines(), 1):
            for name in re.findall(rf"\b{letter}-\d{{2,3}}\b", line):
                found.setdefault(name, f"{path.relative_to(ROOT)}:{number}")
    return found


def homeless(letter: str, page: Path, files: dict[Path, str]) -> list[str]:
    known = set(entries(page))
    return [f"{name} ({place})" for name, place in sorted(cited(letter, files).items()) if name not in known]


@pytest.mark.parametrize(("letter", "page"), [("F", FACTS), ("D", DECISIONS)])
def test_cited_entries_exist(letter: str, page: Path) -> None:
    missing = homeless(letter, page, texts())
    assert not missing, f"{page.name} has no entry {', '.join(missing)}"


@pytest.mark.parametrize("page", ENTRY)
def test_entries_are_numbered_once(page: Path) -> None:
    numbers = entries(page)
    assert numbers and len(set(numbers)) == len(numbers)


def test_no_file_cites_notes_outside_the_repository() -> None:
    citing = [str(path.relative_to(ROOT)) for path, text in texts().items() if any(name in text for name in ELSEWHERE)]
    assert not citing, f"{', '.join(citing)} cite notes that a reader does not have: cite docs/{FACTS.name} (F-NN)"


@cache
def names() -> frozenset[str]:
    """Classes, functions and constants of the package by name alone, and members of classes as `Class.member`."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        found.update(defined(tree.body))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found.update(f"{node.name}.{member}" for member in defined(node.body))
    return frozenset(found)


def defined(body: list[ast.stmt]) -> set[str]:
    found: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return found


def test_every_fact_says_where_it_is() -> None:
    """The names after "Here" are those of the package."""
    lines = [line for line in FACTS.read_text().splitlines() if line.startswith("- **F-")]
    wrong = []
    for line in lines:
        _, mark, here = line.rpartition(" Here: ")
        told = re.findall(r"`([\w.]+)`", here)
        if not mark or not (told or here == "none."):
            wrong.append(f"{line[4:8]} names no place")
        wrong += [f"{line[4:8]}: {name} is not in the package" for name in told if name not in names()]
    assert not wrong, "; ".join(wrong)


def test_reading_of_citations() -> None:
    """The readers themselves: they can fail, and know what is no citation."""
    fact, decision, later = "F-" + "00", "D-" + "00", "D-" + "999"  # in halves, so that this file cites none
    made_up = {ROOT / "made-up.py": f"# as DINO does (F-01, {fact}),\n# unlike {decision}, {later} and D-01; UTF-16, F-1, AF-12 are none"}
    assert homeless("F", FACTS, made_up) == [f"{fact} (made-up.py:1)"]
    assert homeless("D", DECISIONS, made_up) == [f"{decision} (made-up.py:2)", f"{later} (made-up.py:2)"]
    assert {"token_anchors", "ProposalHead.forward", "Denoising.box_noise"} <= names()
    assert "no_such_function" not in names()


def test_tests_that_the_table_of_faults_names_exist() -> None:
    pages = "\n".join(text for path, text in texts().items() if path.suffix == ".py" and "tests" in path.parts)
    rows = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ") and "`" in line]
    named = [word for row in rows for word in re.findall(r"`([^`]+)`", row.rsplit("|", 2)[-2])]
    files = {word.partition("::")[0] for word in named if word.startswith("tests/")}
    tests = {match[0] for word in named if (match := re.search(r"\btest_\w+$", word.partition("[")[0]))}
    assert len(rows) > 120 and not [file for file in files if not (ROOT / file).exists()]
    assert not [test for test in tests if f"def {test}(" not in pages]
