"""The report of damaged runs and of foreign strings: what is named, escaped, and never replaced; the command."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from steadydetr.cli import main
from steadydetr.drawing.recipe_text import flatten, recipe_outline
from steadydetr.drawing.report import write_report
from tests.report.conftest import EVIL, Record, rewrite
from tests.test_train import tiny


def test_strings_of_a_run_are_escaped(copy: Callable[..., Path], tmp_path: Path) -> None:
    def change(record: Record) -> Record:
        if record["kind"] == "eval":
            record["per_class"][EVIL] = 1.0
        if record["kind"] == "train":
            record["losses"][EVIL] = 1.0
        return record

    runs = [copy("a<b>&\"'", change), copy("other", change)]

    def evil(config: Record) -> None:
        config["classes"].append(EVIL)
        config["recipe"] |= {"name": EVIL, "notes": EVIL, EVIL: 1}

    rewrite(runs[0] / "config.json", evil)
    for chosen in (runs, runs[:1]):
        page = write_report(chosen, tmp_path / "page.html").read_text()
        assert "<script" not in page and "a<b>" not in page
        assert page.count(html.escape(EVIL)) >= 5


def test_strings_in_place_of_numbers_are_no_markup(copy: Callable[..., Path]) -> None:
    """What a record should count may be any JSON in a damaged or foreign run: the record is left out, and the page says why."""

    def change(record: Record) -> Record | None:
        if record["kind"] == "train":
            return record | {"epoch": EVIL, "lr": [EVIL]}
        return record | ({"per_class": {EVIL: EVIL}} if record["kind"] == "eval" else {"unstable_score": {EVIL: 1.0}})

    run = copy(change=change)
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    page = write_report([run]).read_text()
    assert "<script" not in page and page.count("left out: ") == min(lines, 20)
    assert "metrics.jsonl, line 1: Expected `int`, got `str` - at `$.epoch`; remove the line" in page


def test_the_template_trusts_nothing() -> None:
    """No value is exempt from escaping, and the page can neither load, nor send, nor run anything."""
    template = (files("steadydetr.drawing") / "report.html.jinja").read_text()
    assert not re.search(r"\|\s*safe|autoescape", template)
    policy = re.search('"Content-Security-Policy" content="(.*?)"', template)
    assert policy and policy[1].split("; ") == [
        *("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", "form-action 'none'", "base-uri 'none'"),
    ]


@pytest.mark.slow
def test_drawing_is_loaded_when_it_is_used() -> None:
    """A training that only begins, and the panels' values, need neither matplotlib nor jinja2."""
    code = """
import sys
import steadydetr.drawing.panels, steadydetr.drawing.report, steadydetr.drawing.run_pictures, steadydetr.drawing.sampling_points
import steadydetr.training.loop
print([name for name in ("matplotlib", "jinja2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_damage_is_named(copy: Callable[..., Path]) -> None:
    run = copy()
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for bad, message in (
        ("{half", r"metrics\.jsonl, line 3: no JSON"),
        ('{"kind": "train"}', r"line 3: the record has no step, epoch, loss"),
    ):
        path.write_text("\n".join([*lines[:2], bad, *lines[3:]]) + "\n")
        with pytest.raises(ValueError, match=message):
            write_report([run])
    path.write_text("\n".join(lines) + "\n{half\n")  # a line that was ended is no half-written one
    with pytest.raises(ValueError, match=rf"line {len(lines) + 1}: no JSON"):
        write_report([run])
    path.unlink()
    for content in (b"", b"\xff" * 100, b"\x02" + bytes(7) + b"{{"):
        (run / "last/model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            write_report([run])
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        write_report([run])


def test_places_without_a_run(trained: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere", trained / "last"):
        with pytest.raises(FileNotFoundError, match="holds no run"):
            write_report([trained, place])


def test_only_a_report_is_replaced(copy: Callable[..., Path]) -> None:
    run = copy()
    assert write_report([run]) == write_report([run])
    before, names = (run / "config.json").read_bytes(), {path.name for path in run.iterdir()}
    for name in ("config.json", "last"):
        with pytest.raises(FileExistsError, match="choose another --output"):
            write_report([run], run / name)
    assert (run / "config.json").read_bytes() == before
    assert {path.name for path in run.iterdir()} == names


def test_command(copy: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy()
    main(["report", str(run), "--output", str(tmp_path / "deep/page.html")])
    assert f"Wrote {tmp_path}/deep/page.html" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["report"])
    assert "name at least one run" in capsys.readouterr().err


def test_configs_are_readable() -> None:
    from steadydetr.config import to_plain

    plain = json.loads(json.dumps(to_plain(replace(tiny(), nms=None))))
    flat = flatten(plain)
    assert flat["detector"] == "dino" and flat["detector.backbone.channels"] == "4, 8, 8, 8"
    assert (flat["nms"], flat["detector.look_forward_twice"], flat["objectives.denoising"]) == ("none", "yes", "denoising")
    assert "objectives: denoising" in recipe_outline(plain) and "        width: 16" in recipe_outline(plain)
