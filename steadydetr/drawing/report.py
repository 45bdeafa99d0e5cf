"""One HTML page of one run or of several side by side. It asks for nothing outside itself, and runs no script.

Every string that comes from a run goes through `escape`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from steadydetr.config import write_text
from steadydetr.drawing import panels as figures
from steadydetr.drawing.panels import Panel
from steadydetr.runs.records import WEIGHTS, Records, by_recipe, read_all

GENERATOR = '<meta name="generator" content="steadydetr report">'
NONE = '<span class="none">–</span>'
METRICS = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium", "ap_large": "large", "ar100": "AR100"}


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of `runs`, each the folder of a run or one with runs below it, and return where it is.

    Args:
        output: report.html in the folder of a single run, of several in the current folder, if not given. An earlier report is replaced.

    Raises:
        FileNotFoundError: a folder holds no run.
        FileExistsError: `output` is there and no report.
        ValueError: a file of a run is damaged; names it, and the line.
    """
    found = read_all(runs)
    if output is None:
        output = (found[0].folder if len(found) == 1 else Path()) / "report.html"
    if output.exists() and (not output.is_file() or GENERATOR.encode() not in output.read_bytes()[:1000]):
        raise FileExistsError(f"{output} is there and not a report, so it is not replaced; choose another --output")
    write_text(output, page(found))
    return output


def page(runs: Sequence[Records]) -> str:
    title = f"Run {runs[0].label}" if len(runs) == 1 else f"{len(runs)} runs side by side"
    sections = {
        "Runs": overview(runs),
        "Learning": panels(runs, [*figures.learning(runs), figures.around_the_drop(runs)], LEARNING),
        "Average precision": ap_table(runs),
        "Average precision by class": class_table(runs),
        "Stability of matching": panels(runs, figures.stability(runs), STABILITY),
        "Losses": panels(runs, figures.losses(runs), "Weighted, summed over decoder stages. Logarithmic, where no value is 0."),
        "Learning rate and gradient": panels(runs, figures.optimisation(runs), "Of the detector; a backbone may have a rate of its own."),
        "Speed and memory": panels(
            runs, figures.speed(runs), "Memory: on a GPU the most that tensors took, on a CPU that the process took."
        ),
        "Predictions": pictures(runs, "predictions.png", PREDICTIONS, "Ground truth and detections"),
        "Where queries look": pictures(runs, "sampling.png", SAMPLING, "Sampling points"),
        "What differs": differing(runs) if len(runs) > 1 else "",
        "Configuration": "".join(configuration(run) for run in runs),
    }
    shown = {f"s{i}": (name, body) for i, (name, body) in enumerate(sections.items()) if body}
    contents = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, (name, _) in shown.items())
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>\n' for key, (name, content) in shown.items())
    now = datetime.now().astimezone()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}{POLICY}'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1><p>SteadyDETR, written {now:%Y-%m-%d %H:%M %Z}</p></header>\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n<main>\n{body}</main></body></html>\n'
    )


POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
LEARNING = "AP on the held-out images at every evaluation. Dotted lines: the learning rate drops."
STABILITY = (
    "The same held-out images, matched at every decoder stage. <b>Unstable score</b> (Stable-DINO): objects whose query is another one"
    " than a layer before; layer 1 is compared with the encoder's proposals. <b>Instability</b> (DN-DETR, DETRDistill): queries of an"
    " image, on average, that hold another object than a stage, or an epoch, before. <b>Consistency</b> (OD-DETR): matched queries that"
    " hold the same object in the trained and in the averaged weights. By layer or stage: at the last measurement."
)


# tables


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """Cells are HTML already. The first of a row names it. Words ("text") are broken into lines, numbers never."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = (f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows)
    content = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return f'<div class="scroll" tabindex="0">{content}</div>'


def name_of(run: Records, runs: Sequence[Records], weights: str = "") -> str:
    """Label with the colour of its curves, where there are several."""
    colour = figures.colours(runs)[run.label]
    swatch = f'<span class="swatch" style="background:{colour}"></span>' if len(by_recipe(runs)) > 1 else ""
    return swatch + escape(run.label) + (f" <small>{WEIGHTS[weights]}</small>" if weights else "")


def number(value: float | None, digits: int = 1) -> str:
    """COCO's -1 stands for no object of that size."""
    return NONE if value is None or value == -1 else f"{value:,.{digits}f}"


def best_bold(columns: Sequence[Sequence[float | None]]) -> list[list[str]]:
    """Numbers by column, the highest of each in bold if there are several."""
    shown = []
    for column in columns:
        known = [value for value in column if value is not None and value != -1]
        top = max(known) if len(known) > 1 else None
        shown.append([f"<b>{number(value)}</b>" if value is not None and value == top else number(value) for value in column])
    return shown


def overview(runs: Sequence[Records]) -> str:
    header = ["run", "recipe", "best AP", "state", "epochs", "steps", "images seen", "training time"]
    header += ["images/s", "peak memory", "parameters", "seed"]
    return table(header, ([name_of(run, runs), *facts(run)] for run in runs))


def facts(run: Records) -> list[str]:
    finished = run.summary is not None
    speed, memory, best, planned = run.images_per_second, run.memory_gib, run.best, run.planned_steps
    if run.summary is not None and "seconds" in run.summary:
        seconds = duration(float(run.summary["seconds"]))
    else:
        seconds = f"about {duration(run.images_seen / speed)}" if speed else NONE
    return [
        escape(str(run.recipe.get("name", "?"))),
        NONE if best is None else f"<b>{best['ap']:.1f}</b> <small>epoch {best['epoch']}, {WEIGHTS[best['weights']]}</small>",
        '<span class="done">finished</span>' if finished else '<span class="open">not finished</span>',
        f"{run.epochs_done} of {run.planned_epochs}",
        f"{run.step:,}" if planned is None else f"{run.step:,} of {planned:,}",
        f"{run.images_seen:,}",
        seconds,
        number(speed),
        NONE if memory is None else f"{memory:.2f} GiB",
        NONE if run.parameters is None else f"{run.parameters / 1e6:.2f} M",
        escape(str(run.recipe["training"]["seed"])),
    ]


def duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {int(seconds % 60):02d} s" if minutes else f"{seconds:.0f} s"


def evaluated(runs: Sequence[Records]) -> list[tuple[Records, str, dict[str, Any]]]:
    """Run, weights and their last evaluation, where there is one."""
    return [(run, weights, last) for run in runs for weights in WEIGHTS if (last := run.last("eval", weights)) is not None]


def ap_table(runs: Sequence[Records]) -> str:
    rows = evaluated(runs)
    names = [*METRICS, "voc_ap50", "voc07_ap50"]
    columns = best_bold([[last[name] for _, _, last in rows] for name in names])
    header = ["run", "step", *METRICS.values(), "VOC AP50", "VOC07 AP50"]
    lines = [
        [name_of(run, runs, weights), f"{last['step']:,}", *(column[i] for column in columns)]
        for i, (run, weights, last) in enumerate(rows)
    ]
    text = (
        "At the last evaluation, percent. Small, medium, large: AP by size of the objects; – where there are none."
        " AR100: recall at 100. VOC07: AP as the mean over 11 recalls."
    )
    parts = [f"<p>{text}</p>", table(header, lines)] if rows else []
    if len({held_out(run) for run in runs}) > 1:
        parts.append('<p class="lacks">The runs were not evaluated on the same data, so their numbers do not compare.</p>')
    parts.append(lacking([run for run in runs if run.best is None], "not evaluated yet"))
    parts.append(lacking([run for run in runs if run.best and not run.of("eval", "ema")], "no averaged weights (training.ema_decay)"))
    return "".join(parts)


def held_out(run: Records) -> tuple[Any, ...]:
    """What a run is evaluated on, as its recipe names it."""
    data = run.recipe.get("data", {})
    return data.get("val_source") or data.get("source"), data.get("val_split"), data.get("limit"), run.classes


def class_table(runs: Sequence[Records]) -> str:
    rows = evaluated(runs)
    if not rows:
        return lacking(runs, "not evaluated yet")
    classes = list(dict.fromkeys(name for _, _, last in rows for name in last["per_class"]))
    columns = [[last["per_class"].get(name) for _, _, last in rows] for name in classes]
    header = ["class", *(name_of(run, runs, weights) for run, weights, _ in rows)]
    lines = ([escape(name), *cells] for name, cells in zip(classes, best_bold(columns), strict=True))
    return f"<p>AP at the last evaluation, percent.</p>{table(header, lines)}"


# figures


def panels(runs: Sequence[Records], shown: Sequence[Panel], text: str) -> str:
    """A figure for every panel that has a line; who lacks what is said, once where it is everything."""
    seen = {line.label for panel in shown for line in panel.lines}
    absent = lacking([run for run in runs if run.label not in seen], shown[0].needs)
    if not seen:
        return absent
    parts = (panel_figure([run for run in runs if run.label in seen], panel, figures.colours(runs)) for panel in shown)
    return f'<p>{text}</p>{absent}{colour_key(runs, shown)}<div class="grid">{"".join(parts)}</div>'


def panel_figure(runs: Sequence[Records], panel: Panel, colour: Mapping[str, str]) -> str:
    drawn = {line.label for line in panel.lines}
    absent = lacking([run for run in runs if run.label not in drawn], panel.needs)
    if not panel.lines:
        return f'<figure class="words"><figcaption>{escape(panel.title)}</figcaption>{absent}</figure>'
    ends = (f"{line.label} ({WEIGHTS[line.weights]}) ends at {line.y[-1]:.4g}" for line in panel.lines[:12])
    described = f"{panel.title} over {panel.x_name}: {'; '.join(ends)}"
    return f"<figure>{picture('svg+xml', figures.draw(panel, colour), described)}{absent}</figure>"


def colour_key(runs: Sequence[Records], shown: Sequence[Panel]) -> str:
    """What colours and dashes mean, where there are several."""
    entries = []
    if len(by_recipe(runs)) > 1:
        colour = figures.colours(runs)
        for name, members in by_recipe(runs).items():
            seeds = f" <small>{len(members)} seeds</small>" if len(members) > 1 else ""
            entries.append(f'<li><span class="swatch" style="background:{colour[members[0].label]}"></span>{escape(name)}{seeds}</li>')
    if any(line.weights == "ema" for panel in shown for line in panel.lines):
        entries.append('<li><span class="stroke"></span>trained weights</li><li><span class="stroke dashed"></span>their average</li>')
    return f'<ul class="key">{"".join(entries)}</ul>' if entries else ""


def lacking(runs: Sequence[Records], what: str) -> str:
    names = ", ".join(escape(run.label) for run in runs)
    return f'<p class="lacks">{names}: {escape(what)}</p>' if runs else ""


def picture(kind: str, content: bytes, described: str) -> str:
    return f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{escape(described)}">'


PREDICTIONS = "<p>Ground truth above, detections of the trained weights below, for the first held-out images that have objects.</p>"
SAMPLING = (
    "<p>Where the query of an image's largest object looks in the last decoder stage, in the trained and the averaged weights: sampling"
    " points, the brighter the more they count; reference point (star), predicted box (white) and true box (green).</p>"
)


def pictures(runs: Sequence[Records], file_name: str, text: str, described: str) -> str:
    """A picture of every run, as JPEG, which takes a fifth of the space."""
    parts = [text]
    for run in runs:
        path = run.folder / file_name
        if not path.exists():
            parts.append(lacking([run], f"no {file_name}; a run draws it when it is finished"))
            continue
        try:
            with Image.open(path) as image, io.BytesIO() as file:
                image.convert("RGB").save(file, "JPEG", quality=88)
                content = file.getvalue()
        except OSError:
            parts.append(lacking([run], f"its {file_name} cannot be read"))
            continue
        name = f"<figcaption>{name_of(run, runs)}</figcaption>" if len(runs) > 1 else ""
        shown = picture("jpeg", content, f"{described} of {run.label}")
        parts.append(f'<figure class="wide">{name}<div class="scroll" tabindex="0">{shown}</div></figure>')
    return "".join(parts)


# configs


def differing(runs: Sequence[Records]) -> str:
    """The fields that are not the same in all runs, a column for every recipe."""
    flat = {run.label: flatten(run.recipe) | {"classes": ", ".join(run.classes)} for run in runs}
    fields = sorted({field for values in flat.values() for field in values})
    changed = [field for field in fields if len({values.get(field) for values in flat.values()}) > 1]
    if not changed:
        return "<p>Nothing: all runs have the same recipe, seed and classes.</p>"
    columns = by_recipe(runs)

    def cell(field: str, members: Sequence[Records]) -> str:
        values = dict.fromkeys(flat[run.label].get(field) for run in members)
        return ", ".join(NONE if value is None else escape(value) for value in values)

    header = ["field", *(escape(name) for name in columns)]
    rows = ([f"<code>{escape(field)}</code>", *(cell(field, members) for members in columns.values())] for field in changed)
    return f"<p>Fields of the recipes; – where a recipe has no such field.</p>{table(header, rows, 'text')}"


def flatten(plain: Any, where: str = "") -> dict[str, str]:
    """Values by their dotted path; a part is its class at its own path, and objectives go by their classes."""
    if isinstance(plain, dict) and "function" not in plain:
        own = {where: short(plain["type"])} if where and "type" in plain else {}
        parts = (flatten(value, f"{where}.{name}" if where else name) for name, value in plain.items() if name != "type")
        return own | {field: value for part in parts for field, value in part.items()}
    if isinstance(plain, list) and any(isinstance(item, dict) and "type" in item for item in plain):
        parts = (flatten(item, f"{where}.{short(item['type']).lower()}") for item in plain)
        return {field: value for part in parts for field, value in part.items()}
    return {where: readable(plain)}


def short(name: str) -> str:
    return str(name).rpartition(".")[2]


def readable(value: Any) -> str:
    """A value without parts as people write it."""
    if isinstance(value, dict):
        return short(value["function"])
    if isinstance(value, list):
        return ", ".join(map(readable, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def configuration(run: Records) -> str:
    classes = f"{len(run.classes)} classes: {', '.join(run.classes)}"
    text = "\n".join([*outline(run.recipe), "", classes])
    return f"<details><summary>{escape(run.label)}</summary><pre>{escape(text)}</pre></details>"


def outline(plain: Mapping[str, Any], indent: str = "") -> list[str]:
    """The recipe, a line for every field, its parts indented."""
    lines = []
    for name, value in plain.items():
        parts = value if isinstance(value, list) else [value]
        if all(isinstance(part, dict) and "type" in part for part in parts) and parts:
            for part in parts:
                lines += [f"{indent}{name}: {short(part['type'])}", *outline(part, indent + "    ")]
        elif name != "type":
            lines.append(f"{indent}{name}: {readable(value)}")
    return lines


STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5a6672; --line: #dde3ea; --card: #fff; --ground: #f4f6f9; --accent: #2166ac;
  --good: #137a4c; --wait: #a86400; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9ef; --soft: #9aa7b4; --line: #313b47; --card: #1b222b; --ground: #12171d; --accent: #7fb4e6;
    --good: #5cc795; --wait: #f0ae4d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 0 0 .5rem; font-size: 1.2rem; }
p { margin: 0 0 .75rem; max-width: 52rem; color: var(--soft); }
a { color: var(--accent); }
small { color: var(--soft); font-size: .82em; }
nav ul, .key { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 0 0 1rem; padding: 0; list-style: none; }
nav ul { margin-top: .25rem; }
section { margin: 0 0 1.25rem; padding: 1rem 1.1rem; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; overflow-wrap: normal; font-size: .94em; }
th, td { padding: .35rem .65rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { position: sticky; left: 0; padding-left: 0; text-align: left; background: var(--card); }
thead th { color: var(--soft); font-weight: 600; font-size: .85em; vertical-align: bottom; }
tbody th { font-weight: 500; }
.text th { vertical-align: top; }
.text td, .text thead th { min-width: 8rem; max-width: 24rem; text-align: left; white-space: normal; vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
.swatch { display: inline-block; width: .75em; height: .75em; margin-right: .45em; border-radius: 3px; }
.stroke { display: inline-block; width: 1.8em; margin-right: .45em; border-top: 2px solid currentColor; vertical-align: middle; }
.dashed { border-top-style: dashed; }
.none, .lacks { color: var(--soft); }
.lacks { margin: .25rem 0; font-size: .9em; font-style: italic; }
.done { color: var(--good); }
.open { color: var(--wait); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: .9rem; }
figure { margin: 0; min-width: 0; }
figure.wide { margin-bottom: 1rem; }
figure.words { padding: .8rem; border: 1px dashed var(--line); border-radius: 8px; }
.grid img { display: block; width: 100%; height: auto; padding: .3rem; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; }
.wide img { display: block; max-width: max(100%, 960px); height: auto; border-radius: 6px; }
details { margin: .25rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; margin: .5rem 0; padding: .8rem; background: var(--ground); border-radius: 8px;
  font-size: 13px; overflow-wrap: normal; }
"""
