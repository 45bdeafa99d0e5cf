"""The report in a browser: every figure is drawn, nothing is asked for, nothing is too wide. Skipped where there is no browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from steadydetr.drawing.report import write_report
from tests.report.conftest import EVIL, Record, rewrite

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
@pytest.mark.parametrize(
    ("count", "width"), [(1, 1300), (3, 400), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, 400), (3, 1300)))]
)
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
