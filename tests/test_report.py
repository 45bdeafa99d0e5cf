"""The report: what it shows and says, of whole, unfinished and older runs; that it escapes; and that a browser draws all of it."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from steadydetr.cli import main
from steadydetr.config import write_json
from steadydetr.drawing.recipe_text import flatten, recipe_outline
from steadydetr.drawing.report import write_report
from steadydetr.runs.records import by_recipe, read, read_all
from steadydetr.training.loop import train
from tests.test_train import tiny

EVIL = "<script>alert(1)</script>"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a run can have."""
    folder = tmp_path_factory.mktemp("report") / "whole"
    train(tiny(ema_decay=0.9, stability_images=8), folder, device="cpu")
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the trained run under another name, its records changed or dropped by a function."""

    def make(name: str = "run", change: Callable[[Record], Record | None] = lambda record: record, finished: bool = True) -> Path:
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        path = folder / "metrics.jsonl"
        records = [change(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record) + "\n" for record in records if record))
        if not finished:
            for file in ("summary.json", "predictions.png", "curves.png"):
                (folder / file).unlink()
        return folder

    return make


def rewrite(path: Path, change: Callable[[Record], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def text_of(page: str) -> str:
    """What a reader sees, in one line."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def titles(page: str) -> list[str]:
    """Of the figures."""
    return [html.unescape(alt).split(" over ")[0] for alt in re.findall(r'<img src="data:image/svg\+xml;base64,[^"]+" alt="([^"]*)"', page)]


# one run


def test_one_run_shows_everything(copy: Callable[..., Path]) -> None:
    run = copy()
    path = write_report([run])
    assert path == run / "report.html"
    page = path.read_text()
    names = re.findall("<h2>(.*?)</h2>", page)
    assert names == [
        *("Runs", "Learning", "Average precision", "Average precision by class", "Stability of matching", "Losses"),
        *("Learning rate and gradient", "Speed and memory", "Predictions", "Where queries look", "Configuration"),
    ]
    assert re.findall(r'<a href="#(\w+)">', page) == re.findall(r'<section id="(\w+)">', page)
    terms = [f"{part}/{name}" for part in ("main", "proposals", "denoising") for name in ("class", "l1", "giou")]
    stability = [title for title in titles(page) if "nstab" in title or "Consistency" in title]
    assert len(stability) == 6 and len(titles(page)) == 4 + 6 + 1 + 9 + 2 + 2 and set(terms) < set(titles(page))
    assert page.count("data:image/jpeg") == 2 and 'class="lacks"' not in page


def test_facts_and_tables(copy: Callable[..., Path]) -> None:
    run = copy()
    records = read(run, "run")
    last, summary = records.last("eval", "model"), json.loads((run / "summary.json").read_text())
    assert last is not None and records.best is not None
    text = text_of(write_report([run]).read_text())
    best = f"{records.best['ap']:.1f} epoch {records.best['epoch']}"
    assert re.search(rf"run tiny {best}, \w+ finished 2 of 2 12 of 12 48 {summary['seconds']:.0f} s", text)
    assert records.parameters is not None and f"{records.parameters / 1e6:.2f} M 0" in text
    assert re.search(rf"run trained 12 {last['ap']:.1f} {last['ap50']:.1f} {last['ap75']:.1f}", text)
    assert "AR100 VOC AP50 VOC07 AP50" in text and f"{last['voc_ap50']:.1f} {last['voc07_ap50']:.1f} run" in text
    assert summary["voc07_ap50"] == last["voc07_ap50"] and summary["voc_ap50"] == last["voc_ap50"]
    assert "disc" in text and "transformer: TransformerConfig width: 16 heads: 2" in text


def test_parameters_are_those_of_the_detector(trained: Path) -> None:
    detector = tiny().detector.build(6)
    assert read(trained, "run").parameters == sum(p.numel() for p in detector.parameters())


def test_svg_shows_the_numbers_and_needs_nothing(trained: Path, tmp_path: Path) -> None:
    page = write_report([trained], tmp_path / "page.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "url(" not in page and "@import" not in page
    svg = base64.b64decode(re.findall(r"svg\+xml;base64,([^\"]+)", page)[0]).decode()
    assert "<svg" in svg and "<text" not in svg  # letters are outlines


# runs that lack something


def test_unfinished_run_with_a_half_written_line(copy: Callable[..., Path]) -> None:
    run = copy(change=lambda r: r if r["step"] < 9 else None, finished=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    text = text_of(write_report([run]).read_text())
    assert "not finished 1 of 2 8 of 12 32 about" in text
    assert "no predictions.png; a run draws it when it is finished" in text
    assert "run: needs two measurements at ends of epochs" in text


def test_run_that_has_just_begun(copy: Callable[..., Path]) -> None:
    run = copy(change=lambda r: None, finished=False)
    for name in ("last", "best"):
        shutil.rmtree(run / name)
    for records in ("", None):
        if records is None:
            (run / "metrics.jsonl").unlink()
        page = write_report([run]).read_text()
        assert not titles(page) and "not evaluated yet" in page and "no step logged yet" in page and "not measured yet" in page
        assert "not finished 0 of 2 0 0" in text_of(page)


def test_run_of_an_older_version(copy: Callable[..., Path]) -> None:
    """No stability, no memory, no average."""

    def older(record: Record) -> Record | None:
        record.pop("memory_gib", None)
        return None if record["kind"] == "stability" or record.get("weights") == "ema" else record

    page = write_report([copy(change=older)]).read_text()
    assert "run: not measured yet" in page and "run: its version logged none" in page
    assert "run: no averaged weights (training.ema_decay)" in page and "their average" not in page
    assert "Images per second" in titles(page) and "Peak memory, GiB" not in titles(page)


def test_values_that_are_not_finite_and_terms_of_zero(copy: Callable[..., Path]) -> None:
    def change(record: Record) -> Record:
        if record["kind"] == "train":
            record["gradient_norm"] = float("inf") if record["step"] == 3 else float("nan")
            record["losses"]["main/class"] = 0.0
            record["losses"]["$x^$_"] = -1.0
        return record

    page = write_report([copy(change=change)]).read_text()
    assert "main/class" in titles(page) and "$x^$_" in titles(page)
    assert "Gradient norm, before clipping" not in titles(page)


def test_long_runs_stay_small(copy: Callable[..., Path]) -> None:
    run = copy()
    path = run / "metrics.jsonl"
    record = next(r for r in map(json.loads, path.read_text().splitlines()) if r["kind"] == "train")
    with open(path, "a") as file:
        file.writelines(json.dumps(record | {"step": step}) + "\n" for step in range(13, 20_000))
    assert write_report([run]).stat().st_size < 2_000_000


def test_broken_predictions_are_said(copy: Callable[..., Path]) -> None:
    run = copy()
    (run / "predictions.png").write_bytes(b"\x89PNG\r\n")
    assert "its predictions.png cannot be read" in write_report([run]).read_text()


# several runs


def test_two_runs_side_by_side(copy: Callable[..., Path], tmp_path: Path) -> None:
    a, b = copy("a"), copy("b")

    def other(config: Record) -> None:
        config["recipe"]["training"]["lr"] = 0.5
        config["recipe"]["objectives"].pop()

    rewrite(b / "config.json", other)
    page = write_report([a, b], tmp_path / "both.html").read_text()
    text = text_of(page)
    assert "2 runs side by side" in text and "training.lr 0.001 0.5" in text
    assert "objectives.denoising.number" in text and "training.epochs" not in text
    assert page.count("data:image/jpeg") == 4 and "<b>" in page and "do not compare" not in page
    rewrite(b / "config.json", lambda config: config["recipe"]["data"].update(val_source="elsewhere"))
    assert "not evaluated on the same data" in write_report([a, b], tmp_path / "both.html").read_text()
    assert len(set(re.findall(r"background:(#\w+)", page))) == 2


def test_same_runs_differ_in_nothing(copy: Callable[..., Path], tmp_path: Path) -> None:
    page = write_report([copy("a"), copy("b")], tmp_path / "both.html").read_text()
    assert "Nothing: all runs have the same recipe, seed and classes." in page


def test_folder_of_compare(copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs by their relative path, a colour for each label, what was moved aside left out, a run named twice taken once."""
    for label in ("base", "more"):
        for seed in (10, 2):
            folder = copy(f"out/{label}/seed{seed}")
            rewrite(folder / "config.json", lambda c, label=label, seed=seed: (c["recipe"].update(name=label), seeded(c, seed)))  # type: ignore[misc]
    copy("out/base/seed2-unsaved1")
    runs = read_all([tmp_path / "out", tmp_path / "out/base/seed2"])
    assert [run.label for run in runs] == ["base/seed2", "base/seed10", "more/seed2", "more/seed10"]
    assert {name: len(members) for name, members in by_recipe(runs).items()} == {"base": 2, "more": 2}
    monkeypatch.chdir(tmp_path)
    page = write_report([tmp_path / "out"]).read_text()
    assert (tmp_path / "report.html").exists()
    assert len(set(re.findall(r"background:(#\w+)", page))) == 2
    assert "training.seed 2, 10 2, 10" in text_of(page)


def seeded(config: Record, seed: int) -> None:
    config["recipe"]["training"]["seed"] = seed


def test_runs_of_one_name_are_told_apart(copy: Callable[..., Path], tmp_path: Path) -> None:
    a, b = copy("a/run"), copy("b/run")
    """By the path from where they part."""
    assert [run.label for run in read_all([a, b])] == ["a/run", "b/run"]
    assert [run.label for run in read_all([copy("out/base/seed2")])] == ["base/seed2"]


# strings, errors, the command


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
    """What a record should count may be any JSON in a damaged or foreign run; it is shown as it is, escaped."""

    def change(record: Record) -> Record | None:
        if record["kind"] == "stability" or record.get("weights") == "model":
            return None
        record["epoch"] = EVIL
        if record["kind"] == "eval":
            record |= {"ap": float("inf"), "voc_ap50": EVIL}
            record["per_class"] = {"disc": EVIL}
        return record

    page = write_report([copy(change=change)]).read_text()
    shown = html.escape(EVIL)
    assert "<script" not in page
    for place in (f"epoch {shown}, average", f"<td>{shown} of 2</td>", f"<td>{shown}</td>"):
        assert place in page


def test_the_template_trusts_nothing() -> None:
    """No value is exempt from escaping, and the page can neither load, nor send, nor run anything."""
    template = (files("steadydetr.drawing") / "report.html.jinja").read_text()
    assert not re.search(r"\|\s*safe|autoescape", template)
    policy = re.search('"Content-Security-Policy" content="(.*?)"', template)
    assert policy and policy[1].split("; ") == [
        *("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'", "form-action 'none'", "base-uri 'none'"),
    ]


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
    before = (run / "config.json").read_bytes()
    for name in ("config.json", "last"):
        with pytest.raises(FileExistsError, match="not a report"):
            write_report([run], run / name)
    assert (run / "config.json").read_bytes() == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


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
    assert flat["detector"] == "DINOConfig" and flat["detector.backbone.channels"] == "4, 8, 8, 8"
    assert (flat["nms"], flat["detector.look_forward_twice"], flat["objectives.denoising"]) == ("none", "yes", "Denoising")
    assert "objectives: Denoising" in recipe_outline(plain) and "        width: 16" in recipe_outline(plain)


# in a browser

BROWSER = next(
    filter(None, map(shutil.which, (os.environ.get("STEADYDETR_BROWSER", ""), "chromium", "chromium-browser", "google-chrome"))), ""
)
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=20000"),
)
EARLY = """<script>
const trouble = [];
addEventListener("error", event => trouble.push("error: " + (event.message || event.target.outerHTML.slice(0, 80))), true);
addEventListener("securitypolicyviolation", event => trouble.push("asked for " + event.blockedURI));
</script>"""
LATE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(part => part.open = true);
  const images = [...document.images];
  const boxed = image => { const box = image.getBoundingClientRect(); return box.width > 50 && box.height > 50; };
  const inside = part => part.closest(".scroll, pre");
  const width = document.documentElement.clientWidth;
  const findings = {
    width, trouble, images: images.length,
    undrawn: images.filter(image => !(image.complete && image.naturalWidth > 0 && boxed(image))).map(image => image.alt),
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    scroll: document.documentElement.scrollWidth,
    wide: [...document.body.querySelectorAll("*")].filter(part => !inside(part) || part.matches(".scroll, pre"))
      .filter(part => part.getBoundingClientRect().right > width + 1).map(part => part.outerHTML.slice(0, 80)),
  };
  parent.postMessage(JSON.stringify(findings), "*");
});
</script>"""
FRAME = """<!doctype html><body style="margin:0"><script>
addEventListener("message", event => {
  const pre = document.createElement("pre");
  pre.id = "findings";
  pre.textContent = event.data;
  document.body.append(pre);
});
</script><iframe src="probe.html" style="border:0;height:900px;width:WIDTHpx"></iframe>"""


def browse(page: Path, width: int, folder: Path) -> Record:
    """What a browser finds in a copy of the page into which a script is put that looks around. In a frame: no window is narrow enough."""
    content = page.read_text()
    allowed = content.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    assert allowed != content
    (folder / "probe.html").write_text(allowed.replace("<title>", f"{EARLY}<title>").replace("</body>", f"{LATE}</body>"))
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    command = [BROWSER, *SWITCHES, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    found = re.search(r'<pre id="findings">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    findings: Record = json.loads(html.unescape(found[1]))
    return findings


@pytest.mark.skipif(not BROWSER, reason="no browser: install chromium, or name one by STEADYDETR_BROWSER")
@pytest.mark.parametrize("width", [400, 1300])
@pytest.mark.parametrize("count", [1, 3])
def test_a_browser_draws_it(copy: Callable[..., Path], tmp_path: Path, width: int, count: int) -> None:
    """Every figure is there, nothing fails or is asked for, nothing but scroll containers is wider than the window."""
    runs = [copy(f"a-run-with-a-long-name-{i}", finished=i < 2) for i in range(count)]
    rewrite(runs[-1] / "config.json", lambda config: config["classes"].append(EVIL * 10))
    page = write_report(runs, tmp_path / "page.html")
    findings = browse(page, width, tmp_path)
    assert findings["width"] == width
    assert findings["images"] == page.read_text().count("<img") > 20
    assert [findings[name] for name in ("trouble", "undrawn", "requests", "wide")] == [[]] * 4
    assert findings["scroll"] <= width


@pytest.mark.skipif(not BROWSER, reason="no browser: install chromium, or name one by STEADYDETR_BROWSER")
def test_the_browser_finds_what_is_wrong(copy: Callable[..., Path], tmp_path: Path) -> None:
    """The test above would see a broken figure, a request, an error and something too wide."""
    page = write_report([copy()], tmp_path / "page.html")
    images = '<img src="data:image/png;base64,AAAA" alt="bad"><img src="https://example.org/x.png" alt="far">'
    bad = f'{images}<div style="width:3000px">wide</div>'
    page.write_text(page.read_text().replace("</main>", f"{bad}<script>throw new Error('no')</script></main>"))
    findings = browse(page, 1300, tmp_path)
    assert findings["undrawn"] == ["bad", "far"] and any("example.org" in line for line in findings["trouble"])
    assert any("Error: no" in line for line in findings["trouble"]) and findings["wide"] and findings["scroll"] >= 3000
