"""A run that was made to attack whoever opens its report: in a browser there is no script, no request and no navigation."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from steadydetr.drawing.report import write_report
from tests.report.conftest import Record, rewrite
from tests.report.test_browser import BROWSER, browse

MARKS = (  # each would leave one of the traces that the test looks for, if it were ever taken for markup
    "<script>throw Error(1)</script>",
    '</style></svg></title></pre><img src=x onerror="throw Error(1)">',
    "'\" onload=alert(1) onmouseover=alert(1) style=background:url(https://evil.example/x) autofocus onfocus=alert(1) x='",
    '<meta http-equiv="refresh" content="0;url=https://evil.example/">',
    '<base href="https://evil.example/"><form action="https://evil.example/" id=f><button form=f autofocus>',
    '<iframe src="javascript:alert(1)"></iframe><object data="https://evil.example/"></object><link rel=stylesheet href=//evil.example>',
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% for x in range(9) %}]]>--><![CDATA[<svg onload=alert(1)>",
    "\u202e\x00\x1b[2J\ud800 $\\frac{1}{0}$ &lt;script&gt;",
)


ATTRIBUTES = "lang charset name content http-equiv class scope tabindex style src alt href id aria-label"  # of the template


@pytest.fixture
def hostile(copy: Callable[..., Path]) -> Path:
    """A run with an attack in every place that its author has a say in."""

    def change(record: Record) -> Record:
        number = record["step"] % 3
        if number == 0:  # a text where a number belongs
            return record | {"epoch": MARKS[3], "step": MARKS[0]}
        for name in ("losses", "measures", "per_class", "per_class_ap50"):
            if name in record:
                record[name] |= dict.fromkeys(MARKS[::3], 1.0)
        return record | {"warnings": list(MARKS), MARKS[0]: MARKS[0]} if number == 1 else record | {"lr": 1e308, "images": MARKS[1]}

    run = copy("run <script>throw Error(1)<", change)

    def evil(config: Record) -> None:
        config["classes"] = list(MARKS)
        recipe = config["recipe"]
        recipe |= {"name": MARKS[1], "notes": MARKS[4], MARKS[0]: {MARKS[1]: [MARKS[2], {"kind": MARKS[3]}]}}
        recipe["data"] |= {"source": MARKS[6], "val_split": MARKS[5]}
        recipe["training"] |= {"schedule": MARKS[0]}
        recipe["detector"]["kind"] = MARKS[7]

    rewrite(run / "config.json", evil)
    rewrite(run / "summary.json", lambda summary: summary.update({"recipe": MARKS[0], "output": MARKS[1], "seconds": 1e300}))
    (run / "predictions.png").write_text(f'<svg xmlns="http://www.w3.org/2000/svg"><script>{MARKS[0]}</script></svg>')
    return run


class Reader(HTMLParser):
    """What a page consists of."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.places: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.places += [value or "" for name, value in attrs if name in ("src", "href", "action")]


def test_nothing_of_it_is_markup(hostile: Path, tmp_path: Path) -> None:
    page = write_report([hostile], tmp_path / "page.html").read_text()
    read = Reader(page)
    assert not read.tags & {"script", "iframe", "object", "base", "form", "button", "link", "svg"} and page.count("<meta") == 4
    assert read.attributes <= set(ATTRIBUTES.split())  # none of events
    assert all(re.fullmatch(r"#s\d+|data:image/(png|jpeg|svg\+xml);base64,[\w+/=]+", place) for place in read.places)
    assert "its predictions.png cannot be read" in page and "left out: " in page
    assert "&lt;script&gt;throw Error(1)" in page and not {"\u202e", "\x1b", "\x00"} & set(page)


@pytest.mark.skipif(not BROWSER, reason="no browser: install chromium, or name one by STEADYDETR_BROWSER")
def test_a_browser_runs_asks_for_and_opens_nothing(hostile: Path, copy: Callable[..., Path], tmp_path: Path) -> None:
    """The probe lets scripts run that the page's policy forbids: even then none of the run's is there to run."""
    page = write_report([hostile, copy("another")], tmp_path / "page.html")
    findings = browse(page, 1300, tmp_path)
    assert findings["width"] == 1300  # the page is still the one that was opened
    assert [findings[name] for name in ("trouble", "undrawn", "requests")] == [[]] * 3
    assert findings["images"] == page.read_text().count("<img")
