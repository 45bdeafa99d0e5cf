"""A small mutation tester: breaks the package in one place at a time and says which breaks no test notices.

    python tests/mutants.py                                     every module of COVERED
    python tests/mutants.py --files matching evaluation         those whose path contains one of the words
    python tests/mutants.py --sample 40 --seed 1 --jobs 2       40 mutants of each file, drawn with that seed, two at a time

torch and the other libraries are imported once; every mutant is a fork of that process, which runs pytest on a copy of the package.
A first run without a mutant measures how long each test takes and which functions it calls: a mutant is shown only to tests that call
its function, fastest first, until one fails. Survivors that change nothing that matters stand in tests/mutants.txt with the reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).resolve().parents[1]
JUSTIFIED = ROOT / "tests" / "mutants.txt"
KEPT = ROOT / ".pytest_cache" / "mutants.json"  # what was measured of tests that have not changed since
COPIED = ("steadydetr", "tests", "docs", "benchmarks", "README.md", "pyproject.toml", "Makefile")
LIBRARIES = (  # what the package and the tests import, so that no mutant has to
    *("torch", "torchvision.transforms.v2", "timm", "accelerate", "safetensors.torch", "huggingface_hub", "transformers"),
    *("scipy.optimize", "scipy.stats", "scipy.ndimage", "hotcoco", "pycocotools.cocoeval"),
    *("msgspec", "tyro", "rich.progress", "matplotlib.pyplot", "jinja2"),
)
NOT_SHOWN = "commands_make or small_commands or other_choices"  # tests of flags, a minute of them
SLACK = 30.0  # seconds that a mutant may take beyond four times what its tests took

# File of the package -> test files that are about it. Names behind :: keep to these functions of the file.
STEPS = ("test_method", "test_groups", "test_online_step", "test_distill", "test_distill_pairs")
ONLINE = ("test_online", "test_online_predictions", "test_online_teachers")
RESUME = ("test_train", "test_online_training", "test_distill_training", "test_released", "test_faults_of_runs", "test_not_finite")
COVERED: dict[str, tuple[str, ...]] = {
    "learning/matching.py": (
        "test_matching",
        "test_assignment_parts",
        "test_criterion",
        "test_align",
        "test_stable",
        "test_query_objectives",
        *ONLINE,
        *STEPS,
    ),
    "learning/criterion.py": ("test_criterion", "test_matching", "test_align", "test_stable", *ONLINE, *STEPS),
    "learning/class_terms.py": (
        "test_stable",
        "test_align",
        "test_criterion",
        "test_equations",
        "test_paper_recipes",
        "parity/test_golden_stable",
    ),
    "learning/mask_terms.py": ("test_maskdino", "parity/test_golden_maskdino"),
    "learning/teachers.py": (*ONLINE, "test_distill_pairs", "test_online_step", "test_distill_training", "test_online_training"),
    "learning/frozen.py": (*ONLINE, "test_distill_pairs", "test_online_step", "test_distill_training", "test_online_training"),
    "training/optimiser.py": ("test_optimiser", "test_train"),
    "data/transforms.py": ("test_transforms", "test_data", "test_masks_in_training"),
    "data/masks.py": ("test_masks", "test_masks_in_training", "test_segm", "test_masks_found"),
    "data/layouts/coco_masks.py": ("test_masks",),
    "data/transform_steps.py": ("test_transforms", "test_data", "test_masks_in_training"),
    "data/config.py": ("test_loading", "test_data", "test_loading_processes"),
    "data/loading.py": ("test_loading", "test_data", "test_neighbours", "test_loading_processes", "test_masks_in_training"),
    "metrics/evaluation.py": ("test_metrics_by_hand", "test_evaluation", "test_finite", "test_neighbours"),
    "metrics/coco.py": ("test_metrics_by_hand", "test_evaluation", "test_segm"),
    "metrics/voc.py": ("test_metrics_by_hand", "test_evaluation"),
    "metrics/low_ap.py": ("test_metrics_by_hand", "test_evaluation", "test_segm"),
    "metrics/segm.py": ("test_segm", "test_evaluation"),
    "detectors/instance_masks.py": ("test_masks_found",),
    "training/run.py": RESUME,
    "training/averages.py": RESUME,
    "runs/folder.py": (*RESUME, "test_compare", "report/test_damage"),
    "config.py": ("test_kinds", "test_recipes"),
    "kinds.py": ("test_kinds", "test_cli"),
    "old_formats.py": ("test_kinds", "test_released"),
    "recipes/base.py": ("test_paper_recipes", "test_distill_training", "test_online_training"),
    "recipes/align.py": ("test_paper_recipes", "test_align"),
    "nn/conditional.py": ("nn/test_conditional", "parity/test_golden_conditional", "test_groups"),
    "recipes/conditional.py": ("test_paper_recipes", "test_recipes"),
    "recipes/dab.py": ("test_paper_recipes", "test_recipes"),
    "recipes/deformable.py": ("test_paper_recipes", "test_recipes"),
    "recipes/dino.py": ("test_paper_recipes", "test_recipes"),
    "recipes/distill.py": ("test_paper_recipes", "test_recipes"),
    "recipes/group.py": ("test_paper_recipes", "test_recipes", "test_query_objectives"),
    "recipes/h_deformable.py": ("test_paper_recipes", "test_recipes"),
    "recipes/maskdino.py": ("test_paper_recipes", "test_recipes"),
    "recipes/online.py": ("test_paper_recipes", "test_recipes"),
    "recipes/schedules.py": ("test_paper_recipes", "test_recipes"),
    "recipes/small.py": ("test_paper_recipes", "test_recipes"),
    "recipes/stable.py": ("test_paper_recipes", "test_recipes"),
}


@dataclass(frozen=True)
class Mutant:
    file: str  # below the package
    function: str  # dotted name within the file, empty: what runs at import
    line: int
    before: str  # the lines that change, without indentation
    after: str
    source: str  # of the whole file

    @property
    def keys(self) -> set[tuple[str, str, str]]:
        """What it is justified by, since lines move: its own text, or any change of the line."""
        return {(self.file, self.function, text) for text in (self.after, f"{ANY}{self.before}")}

    def is_justified(self, reasons: dict[tuple[str, str, str], str]) -> bool:
        return not self.keys.isdisjoint(reasons)


ANY = "any change of "
RESULTS = {0: "survived", 5: "survived", 3: "error"}  # by pytest's exit status; 5: no test calls it; 3: pytest itself failed


# What is changed

COMPARE = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
OPPOSITE = {"min": "max", "amin": "amax", "minimum": "maximum", "argmin": "argmax", "floor": "ceil", "any": "all", "zeros": "ones"}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}
OPPOSITE |= {"zeros_like": "ones_like", "ones_like": "zeros_like", "new_zeros": "new_ones", "new_ones": "new_zeros"}


def replacements(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the node's place: another node, or source text."""
    if isinstance(node, ast.Compare):
        for k, op in enumerate(node.ops):
            for text in COMPARE[type(op)]:
                other = copy.deepcopy(node)
                other.ops[k] = ast.parse(f"a {text} b", mode="eval").body.ops[0]  # type: ignore[attr-defined]
                yield other
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, (ast.If, ast.IfExp)) and isinstance(node.test, (ast.Name, ast.Attribute, ast.Call)):
        other = copy.deepcopy(node)
        other.test = ast.UnaryOp(ast.Not(), other.test)
        yield other
    elif (
        isinstance(node, ast.Return) and node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None)
    ):
        yield ast.Return(ast.Constant(None))
    elif _can_go(node):
        yield ast.Pass()


def _can_go(node: ast.AST) -> bool:
    """A statement that only has an effect."""
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], (ast.Subscript, ast.Attribute))
    return isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Yield)))


def _constants(value: object) -> Iterator[ast.AST]:
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(value * 2 if value else 1.0)


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    if isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        yield node.func.value
    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
    if name in OPPOSITE:
        other = copy.deepcopy(node)
        if isinstance(other.func, ast.Attribute):
            other.func.attr = OPPOSITE[name]
        else:
            other.func = ast.Name(OPPOSITE[name])
        yield other
    for k, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg != "strict":
            yield ast.Call(node.func, node.args, [*node.keywords[:k], *node.keywords[k + 1 :]])
    starred = any(isinstance(argument, ast.Starred) for argument in node.args[:2])
    if len(node.args) > 1 and not starred and name not in ("min", "max", "minimum", "maximum"):
        first, second, *rest = node.args
        if ast.dump(first) != ast.dump(second):
            yield ast.Call(node.func, [second, first, *rest], node.keywords)


def mutants(source: str, file: str = "", functions: str = "") -> list[Mutant]:
    """Every mutant of the source; `functions`: only of functions whose last name matches this expression."""
    found: list[Mutant] = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(
            node, (ast.JoinedStr, ast.Raise)
        ):  # Python 3.11 does not know where the parts of the former are; words are no behaviour
            return
        if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip, which only guards against mistakes of ours
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for decorator in node.decorator_list:
                if "no_grad" in ast.dump(decorator):
                    add(decorator, "", f"{function}.{node.name}".strip("."), mark="@")
            for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)] if isinstance(node, ast.FunctionDef) else []:
                visit(default, function)
            for child in node.body:
                visit(child, f"{function}.{node.name}".strip("."))
            return
        for other in replacements(node):
            add(node, other, function)
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, function)

    def add(node: ast.AST, other: ast.AST | str, function: str, mark: str = "") -> None:
        if functions and not re.fullmatch(functions, function.rpartition(".")[2]):
            return
        changed = _replaced(source, node, other, mark)
        if changed is not None:
            found.append(Mutant(file, function, node.lineno, *changed))  # type: ignore[attr-defined]

    visit(ast.parse(source), "")
    return found


def _replaced(source: str, node: ast.AST, other: ast.AST | str, mark: str) -> tuple[str, str, str] | None:
    """The changed lines before and after, and the whole file after; comments and layout of the rest stay."""
    lines = source.encode().splitlines(keepends=True)
    start, end = (node.lineno - 1, node.col_offset), (node.end_lineno - 1, node.end_col_offset)  # type: ignore[attr-defined]
    if isinstance(node, ast.If) and isinstance(other, ast.If):  # its body stays as it is
        start, end = (node.test.lineno - 1, node.test.col_offset), (node.test.end_lineno - 1, node.test.end_col_offset)  # type: ignore[operator, assignment]
        other = other.test
    text = other if isinstance(other, str) else ast.unparse(ast.fix_missing_locations(other))
    if isinstance(other, ast.expr) and not isinstance(other, (ast.Constant, ast.Name, ast.Call)):
        text = f"({text})"
    head = lines[start[0]][: start[1]].removesuffix(mark.encode())
    changed = head + text.encode() + lines[end[0]][end[1] :]
    whole = b"".join([*lines[: start[0]], changed, *lines[end[0] + 1 :]]).decode()
    try:
        compile(whole, "mutant", "exec")
    except SyntaxError:
        return None
    before = b"".join(lines[start[0] : end[0] + 1]).decode()
    return _one_line(before), _one_line(changed.decode()), whole


def _one_line(text: str) -> str:
    """Without remarks."""
    return " ".join(re.sub(r"  # .*", "", text).split())


# What the tests do


@dataclass
class Measured:
    """A test that passes without a mutant."""

    name: str  # as pytest calls it
    seconds: float = 0.0
    functions: set[tuple[str, str]] = field(default_factory=set)  # (file below the package, dotted name) that it calls


class Recorder:
    """A pytest plugin: how long each test takes and which functions of the package's files it calls, its fixtures included."""

    def __init__(self, package: Path, files: set[str]) -> None:
        self.names = {str(package / file): file for file in files}
        self.tests: dict[str, Measured] = {}
        self.shared: dict[str, set[tuple[str, str]]] = {}  # what fixtures of a file call, which may live for several tests
        self.now: set[tuple[str, str]] = set()
        self.failed: set[str] = set()
        self.users: dict[
            tuple[str, str], set[str]
        ] = {}  # the tests that share what a fixture makes, which may be made in the first of them

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        file = self.names.get(frame.f_code.co_filename)
        if file is not None:
            self.now.add((file, re.sub(r"\.<(?!lambda).*|<locals>\.|\.?<lambda>.*", "", frame.f_code.co_qualname)))

    def _watched(self) -> Iterator[None]:
        self.now = set()
        threading.settrace(self.trace)  # type: ignore[arg-type]
        sys.settrace(self.trace)  # type: ignore[arg-type]
        yield
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        yield from self._watched()
        self.shared.setdefault(item.nodeid.partition("::")[0], set()).update(self.now)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        yield from self._watched()
        self.tests.setdefault(item.nodeid, Measured(item.nodeid)).functions.update(self.now)
        fixtures = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
        for name in (name for name, known in fixtures.items() if known[-1].scope != "function" and known[-1].baseid):
            self.users.setdefault((item.nodeid.partition("::")[0], name), set()).add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            self.tests.setdefault(report.nodeid, Measured(report.nodeid)).seconds += report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def measured(self) -> list[Measured]:
        for test in self.tests.values():
            test.functions |= self.shared[test.name.partition("::")[0]]
        for names in self.users.values():
            together = set().union(*(self.tests[name].functions for name in names))
            for name in names:
                self.tests[name].functions |= together
        return list(self.tests.values())


class Chosen:
    """A pytest plugin: these tests, in this order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.rank = {name: k for k, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])


def run_pytest(folder: Path, files: Sequence[str], plugin: object, *options: str) -> int:
    """In this process, on the copy in the folder; what it prints goes to a file there."""
    with open(folder / "log", "wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tests"))]
    os.environ |= {"PYTHONPATH": str(folder), "STEADYDETR_SHARED": os.environ.get("STEADYDETR_SHARED", str(ROOT.parent / "shared"))}
    for name in [name for name in sys.modules if name.split(".")[0] in ("steadydetr", "tests")]:
        del sys.modules[name]
    chosen = ["-m", "not slow", "-k", f"not ({NOT_SHOWN})"]
    words = [*options, "-q", *chosen, "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(folder), *files]
    return int(pytest.main(words, plugins=[plugin]))


def forked(work: Callable[[], int]) -> int:
    """The id of a new process group that does the work and exits with what it returns."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 3
    with contextlib.suppress(BaseException):
        os.setsid()
        code = work()
    os._exit(code)


# Running


@dataclass
class Outcome:
    mutant: Mutant
    result: str  # killed, survived, timeout
    seconds: float


class Tester:
    """Copies of the repository, one for each process at work, and what the tests do there."""

    def __init__(self, folder: Path, jobs: int, patience: float) -> None:
        self.patience = patience
        self.copies = [folder / str(k) for k in range(jobs)]
        for place in self.copies:
            place.mkdir()
            for name in COPIED:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
                elif (ROOT / name).exists():
                    shutil.copy(ROOT / name, place / name)

    def measure(self, files: dict[str, tuple[str, ...]]) -> list[Measured]:
        """The tests of these files, without a mutant; what is known of a test file holds until it or the package changes."""
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        names = sorted({f"tests/{test}.py" for tests in files.values() for test in tests})
        marks = {name: digest(name) for name in names}
        fresh = [name for name in names if kept.get(name, {}).get("mark") != marks[name]]
        if fresh:
            _, status = os.waitpid(forked(lambda: self._measure(fresh)), 0)
            if status:
                raise SystemExit(f"the tests cannot be run:\n{(self.copies[0] / 'log').read_text()[-6000:]}")
            found = json.loads((self.copies[0] / "measured.json").read_text())
            kept |= {name: {"mark": marks[name], **found.get(name, {"passed": [], "failed": []})} for name in fresh}
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept))
        for failed in (test for name in names for test in kept[name]["failed"]):
            print(f"left out, because it fails without any mutant: {failed}")
        passed = [test for name in names for test in kept[name]["passed"]]
        return [Measured(name, seconds, {tuple(pair) for pair in functions}) for name, seconds, functions in passed]

    def _measure(self, names: Sequence[str]) -> int:
        place = self.copies[0]
        recorder = Recorder(place / "steadydetr", {entry.partition("::")[0] for entry in COVERED})
        run_pytest(place, names, recorder)
        found: dict[str, dict[str, list[object]]] = {}
        for test in recorder.measured():
            row = found.setdefault(test.name.partition("::")[0], {"passed": [], "failed": []})
            if test.name in recorder.failed:
                row["failed"].append(test.name)
            else:
                row["passed"].append([test.name, test.seconds, sorted(test.functions)])
        (place / "measured.json").write_text(json.dumps(found))
        return 0

    def tests_for(self, mutant: Mutant, tests: Sequence[Measured], files: dict[str, tuple[str, ...]]) -> list[Measured]:
        """Those of its file that call its function, or all where it runs at import; fastest first, as many as there is patience for."""
        names = {f"tests/{name}.py" for name in files[mutant.file]}
        own = [test for test in tests if test.name.partition("::")[0] in names]
        runs = {function for test in own for file, function in test.functions if file == mutant.file}
        if mutant.function in runs:
            own = [test for test in own if (mutant.file, mutant.function) in test.functions]
        chosen, total = [], 0.0
        for test in sorted(own, key=lambda test: test.seconds):
            total += test.seconds
            if chosen and total > self.patience:
                break
            chosen.append(test)
        return chosen

    def run(
        self, todo: Sequence[Mutant], tests: Sequence[Measured], files: dict[str, tuple[str, ...]], say: Callable[[Outcome], None]
    ) -> None:
        waiting, idle = list(reversed(todo)), list(self.copies)
        running: dict[int, tuple[Mutant, Path, float, float]] = {}
        while waiting or running:
            while waiting and idle:
                mutant, place = waiting.pop(), idle.pop()
                chosen = self.tests_for(mutant, tests, files)
                child = self.start(mutant, place, [test.name for test in chosen], f"tests/{files[mutant.file][0]}.py")
                running[child] = (mutant, place, time.monotonic(), 4 * sum(test.seconds for test in chosen) + SLACK)
            time.sleep(0.02)
            for child, (mutant, place, start, limit) in list(running.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                late = time.monotonic() - start > limit
                if not done and not late:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
                if not done:
                    os.waitpid(child, 0)
                self.restore(mutant, place)
                idle.append(place)
                del running[child]
                result = "timeout" if not done else RESULTS.get(os.waitstatus_to_exitcode(status), "killed")
                say(Outcome(mutant, result, time.monotonic() - start))

    def start(self, mutant: Mutant, place: Path, tests: list[str], first: str) -> int:
        """The tests of the file that is closest to it, then, where they pass, the others: most mutants then import one test file."""
        self.write(mutant.file, mutant.source, place)
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        rounds = [[file for file in files if file == first], [file for file in files if file != first]]

        def work() -> int:
            code = 5
            for names in filter(None, rounds):
                code = run_pytest(place, names, Chosen(tests), "-x")
                if RESULTS.get(code) != "survived":
                    return code
            return code

        return forked(work)

    def restore(self, mutant: Mutant, place: Path) -> None:
        self.write(mutant.file, (ROOT / "steadydetr" / mutant.file).read_text(), place)

    def write(self, file: str, source: str, place: Path) -> None:
        """Python tells sources apart by second and size, which is not enough here."""
        path = place / "steadydetr" / file
        path.write_text(source)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()


def digest(test: str) -> str:
    """Of a test file and of all that it may import."""
    shared = [ROOT / "tests/conftest.py", *(ROOT / "tests/reference").glob("*.py"), *(ROOT / "steadydetr").rglob("*.py")]
    mark = hashlib.sha256()
    for path in (ROOT / test, *sorted(shared)):
        mark.update(path.read_bytes())
    return mark.hexdigest()


def justified(text: str) -> dict[tuple[str, str, str], str]:
    """File, function and changed line -> reason. Entries are four lines: file and function, the line before, after, and why.

    With + * in place of the line after, the reason holds for any change of the line.
    """
    found = {}
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.strip().splitlines() if not line.startswith("#")]
        if lines:
            assert [line[:2] for line in lines[1:3]] == ["- ", "+ "] and len(lines) > 3, f"tests/mutants.txt: {block}"
            file, _, function = lines[0].partition(" ")
            after = f"{ANY}{lines[1][2:]}" if lines[2] == "+ *" else lines[2][2:]
            found[file, function, after] = " ".join(lines[3:])
    return found


def selected(words: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Rows of COVERED whose path contains one of the words; all without words."""
    return {entry: tests for entry, tests in COVERED.items() if not words or any(word in entry.partition("::")[0] for word in words)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="*", default=[], help="words, one of which the path contains; default: all of COVERED")
    parser.add_argument("--sample", type=int, help="so many mutants of each file; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--patience", type=float, default=40.0, help="seconds of tests that a mutant is shown at the most, fastest first")
    parser.add_argument("--containing", default="", help="only mutants whose changed line, before or after, contains this text")
    options = parser.parse_args(arguments)
    todo: list[Mutant] = []
    files: dict[str, tuple[str, ...]] = {}
    for entry, tests in selected(options.files).items():
        file, _, functions = entry.partition("::")
        files[file] = tests
        found = mutants((ROOT / "steadydetr" / file).read_text(), file, functions)
        found = [mutant for mutant in found if options.containing in mutant.before or options.containing in mutant.after]
        if options.sample is not None and len(found) > options.sample:
            found = random.Random(options.seed).sample(found, options.sample)
        todo += sorted(found, key=lambda mutant: mutant.line)
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.modules["torch"].set_num_threads(1)
    reasons = justified(JUSTIFIED.read_text())
    outcomes: list[Outcome] = []
    start = time.monotonic()

    def say(outcome: Outcome) -> None:
        outcomes.append(outcome)
        mutant = outcome.mutant
        if len(outcomes) % 20 == 0:
            print(f"{len(outcomes)} of {len(todo)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if outcome.result == "error" or (outcome.result == "survived" and not mutant.is_justified(reasons)):
            print(f"{outcome.result}  {mutant.file}:{mutant.line} {mutant.function}\n  - {mutant.before}\n  + {mutant.after}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        tester = Tester(Path(folder), options.jobs, options.patience)
        tests = tester.measure(files)
        print(f"{len(todo)} mutants, {len(tests)} tests, measured in {time.monotonic() - start:.0f} s", flush=True)
        tester.run(todo, tests, files, say)
    print(table(outcomes, reasons))
    print(f"{time.monotonic() - start:.0f} s")
    return int(any(outcome.result == "survived" and not outcome.mutant.is_justified(reasons) for outcome in outcomes))


def table(outcomes: Sequence[Outcome], reasons: dict[tuple[str, str, str], str]) -> str:
    rows = ["| file | mutants | killed | of these by time limit | survived | justified |", "|---|---|---|---|---|---|"]
    for file in [*dict.fromkeys(outcome.mutant.file for outcome in outcomes), "all"]:
        results = [
            "justified" if outcome.result == "survived" and outcome.mutant.is_justified(reasons) else outcome.result
            for outcome in outcomes
            if file in (outcome.mutant.file, "all")
        ]
        number = {result: results.count(result) for result in ("killed", "timeout", "survived", "justified")}
        killed = number["killed"] + number["timeout"]
        rows.append(f"| {file} | {len(results)} | {killed} | {number['timeout']} | {number['survived']} | {number['justified']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
