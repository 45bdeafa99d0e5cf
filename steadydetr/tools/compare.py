"""Trains several recipes with several seeds, and tells which of their differences are more than chance.

OUTPUT/LABEL/recipe.json        what is trained
OUTPUT/LABEL/seedK/             a run like any other
OUTPUT/comparison.{json,md}     every number, and the table
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from steadydetr.config import FORMAT, differences, read_recipe, to_plain
from steadydetr.files import claim_folder, one_line, write_json, write_text
from steadydetr.kinds import plugins_in_use
from steadydetr.metrics.table import LABELS, SUMMARY_NAMES
from steadydetr.recipes.base import Recipe
from steadydetr.runs.folder import RunFolder
from steadydetr.runs.lock import FolderLock

TRAIN = (sys.executable, "-m", "steadydetr", "train")
RECIPE = "recipe.json"
NOTE = (  # below the table
    "Mean and standard deviation over seeds, at the end of training. Differences to the first row are taken seed by seed; their 95%"
    " interval (Student's t) shows no difference where it holds 0."
)


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of the difference between two recipes, with its 95% confidence interval (Student's t).

    If differences are normal, the interval holds the true mean in 95 of 100 such comparisons.
    """

    mean: float
    low: float | None  # None: a single seed gives no interval
    high: float | None


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The difference `values` - `baseline` between two recipes that were trained with the same seeds, in the same order."""
    mean = fmean(a - b for a, b in zip(values, baseline, strict=True))
    if len(values) < 2:
        return Difference(mean, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # if all differences are equal, an interval without width is right
        interval = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    return Difference(mean, float(interval.low), float(interval.high))


@dataclass(frozen=True)
class Outcome:
    """The metrics and the training time of a finished run."""

    seed: int
    metrics: dict[str, float]  # ap, ap50, ...; ema_* of the averaged weights; unstable_score and instability of the last stage
    seconds: float


def read_outcome(folder: Path, seed: int) -> Outcome | None:
    """The outcome of the run in `folder`; None if it is not finished."""
    run = RunFolder(folder)
    summary = run.read_summary()
    if summary is None:
        return None
    names = [f"{prefix}{name}" for prefix in ("", "ema_") for name in SUMMARY_NAMES if name in LABELS]
    metrics = {name: float(summary[name]) for name in names if name in summary}
    for record in (r for r in run.read_records() if r["kind"] == "stability"):  # the last record decides
        prefix = "" if record["weights"] == "model" else "ema_"
        metrics[f"{prefix}unstable_score"] = list(record["unstable_score"].values())[-1]
        if record["between_epochs"] is not None:
            metrics[f"{prefix}instability"] = record["between_epochs"]
    return Outcome(seed, metrics, float(summary["seconds"]))


def compare_recipes(
    recipes: Mapping[str, Recipe],
    seeds: int,
    output: Path,
    jobs: int = 1,
    launch: Sequence[str] = TRAIN,
    say: Callable[[str], None] = print,
    device: str = "auto",
) -> dict[str, list[Outcome]]:
    """Train every recipe with the seeds 0 .. seeds - 1. Finished runs are not repeated, interrupted ones go on.

    Args:
        recipes: by label, the baseline first.
        jobs: runs at a time, which share the processor's cores.
        launch: what starts a training, such as torchrun's command line.
        device: what the runs train on.

    Raises:
        ValueError: a label cannot be a folder's name, or `output` holds runs of other recipes; says what differs.
        FileExistsError: `output` holds something else or links, or another process is comparing there.
        ChildProcessError: runs failed, after all others are done; names their logs.
    """
    for label, recipe in recipes.items():
        check_label(output / label, label, recipe)
    earlier = any((output / label / RECIPE).exists() for label in recipes)  # a comparison that version 0.1 began, without a mark
    claim_folder(output, "compare", again=True, overwrite=earlier)
    with FolderLock(output) as lock:
        lock.take()
        return _compare(recipes, seeds, output, jobs, launch, say, device)


def _compare(
    recipes: Mapping[str, Recipe], seeds: int, output: Path, jobs: int, launch: Sequence[str], say: Callable[[str], None], device: str
) -> dict[str, list[Outcome]]:
    for label, recipe in recipes.items():
        write_json(output / label / RECIPE, {"format": FORMAT} | to_plain(recipe, "recipe"))
    todo = [(label, seed) for seed in range(seeds) for label in recipes if read_outcome(output / label / f"seed{seed}", seed) is None]
    say(f"{len(recipes)} recipes x {seeds} seeds: {len(recipes) * seeds - len(todo)} are done, {len(todo)} to train, {jobs} at a time")
    trainer = _Trainer(output, launch, jobs, say, device)
    failed = trainer.train(todo)
    outcomes = {label: _finished(output / label, seeds) for label in recipes}
    save_table(output, outcomes)
    if failed:
        raise ChildProcessError(f"{len(failed)} of {len(todo)} runs failed; the logs say why: {', '.join(map(str, failed))}")
    return outcomes


def check_label(folder: Path, label: str, recipe: Recipe) -> None:
    """Check a label before anything is written.

    Raises:
        ValueError: it cannot be the name of a folder, or its folder holds runs of another recipe.
        FileExistsError: the folder, or the folder of a run in it, is a link.
    """
    if not label or label != Path(label).name or label.startswith("."):
        raise ValueError(f"{label!r} cannot be the name of a folder: give it another label, as in LABEL=RECIPE")
    path = folder / RECIPE
    if path.exists() and (changed := differences(to_plain(_settled(read_recipe(path))), to_plain(_settled(recipe)))):
        raise ValueError(f"{folder} holds runs of another recipe; choose another label or --output. Differences: {'; '.join(changed)}")
    for place in (folder, *folder.glob("seed*")):
        if place.is_symlink():
            raise FileExistsError(f"{place} is a link, which is not followed: choose another --output")


def _settled(recipe: Recipe) -> Recipe:
    """With values for what its detector would look up: what versions before had no field for is no difference."""
    return replace(recipe, detector=recipe.detector.settled())


def _finished(folder: Path, seeds: int) -> list[Outcome]:
    """The outcomes of a label's runs that are finished."""
    outcomes = [read_outcome(folder / f"seed{seed}", seed) for seed in range(seeds)]
    return [outcome for outcome in outcomes if outcome is not None]


class _Trainer:
    """Runs trainings as processes of their own, each with its share of the cores."""

    def __init__(self, output: Path, launch: Sequence[str], jobs: int, say: Callable[[str], None], device: str) -> None:
        self.output, self.launch, self.jobs, self.say, self.device = output, launch, jobs, say, device
        threads = str(max(1, (os.cpu_count() or 1) // jobs))
        self.environment = {"OMP_NUM_THREADS": threads} | os.environ
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = threading.Event()

    def train(self, todo: Sequence[tuple[str, int]]) -> list[Path]:
        """Train these labels and seeds, and give the logs of the runs that failed. On Ctrl-C the runs are asked to save and stop."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._run, label, seed) for label, seed in todo]
            try:
                logs = [future.result() for future in futures]
            except KeyboardInterrupt:
                self.stopped.set()
                for process in self.running.copy():
                    process.terminate()
                raise
        return [log for log in logs if log is not None]

    def _run(self, label: str, seed: int) -> Path | None:
        """Train one run; gives its log if it failed, None if it did not."""
        if self.stopped.is_set():
            return None
        folder = self.output / label / f"seed{seed}"
        words = [
            str(self.output / label / RECIPE),
            "--seed",
            str(seed),
            "--output",
            str(folder),
            "--resume",
            "auto",
            "--device",
            self.device,
        ]
        words += [word for plugin in plugins_in_use for word in ("--plugin", plugin)]
        log = self.output / label / f"seed{seed}.log"
        self.say(f"{label}, seed {seed}: {'goes on' if RunFolder(folder).is_started else 'starts'}")
        with open(log, "ab") as file:
            process = subprocess.Popen([*self.launch, *words], stdout=file, stderr=subprocess.STDOUT, env=self.environment)
            self.running.add(process)
            code = process.wait()
            self.running.discard(process)
        outcome = read_outcome(folder, seed)
        if code or outcome is None:
            self.say(f"{label}, seed {seed}: stopped with code {code}, see {log}; its last line: {last_line(log)}")
            return log
        self.say(f"{label}, seed {seed}: AP {outcome.metrics['ap']:.1f}, AP50 {outcome.metrics['ap50']:.1f}, {outcome.seconds:.0f} s")
        return None


def last_line(log: Path) -> str:
    """What a log ends with, which is the error of a run that stopped with one."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").splitlines()
    return one_line(next((line for line in reversed(lines) if line.strip()), "nothing"))


def save_table(output: Path, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
    """comparison.json with every number, and comparison.md with the table."""
    plain: dict[str, Any] = {label: [asdict(outcome) for outcome in found] for label, found in outcomes.items()}
    write_json(output / "comparison.json", plain)
    header, *rows = comparison_table(outcomes)
    lines = [header, ["---"] * len(header), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_text(output / "comparison.md", f"{text}\n{NOTE}\n")


def comparison_table(outcomes: Mapping[str, Sequence[Outcome]]) -> list[list[str]]:
    """Header and a row for every label; the first is the baseline. Columns that no run fills are left out."""
    known = {name for found in outcomes.values() for outcome in found for name in outcome.metrics}
    titles = {
        "ap": LABELS["ap"],
        "ap50": LABELS["ap50"],
        "ema_ap": f"EMA {LABELS['ap']}",
        "segm_ap": LABELS["segm_ap"],
        "ema_segm_ap": f"EMA {LABELS['segm_ap']}",
        "unstable_score": "unstable score, last layer, %",
    }
    names = [name for name in titles if name in known]
    compared = [name for name in ("ap", "ema_ap", "segm_ap", "ema_segm_ap") if name in known]
    rows = [["recipe", "seeds", *(titles[n] for n in names), *(f"{titles[n]} difference" for n in compared), "seconds"]]
    baseline = next(iter(outcomes.values()))
    for label, found in outcomes.items():
        cells = [label, str(len(found)), *(_spread([o.metrics[n] for o in found if n in o.metrics]) for n in names)]
        cells += ["-" if found is baseline else _delta(found, baseline, n) for n in compared]
        rows.append([*cells, f"{fmean(o.seconds for o in found):.0f}" if found else "-"])
    return rows


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, as text."""
    if not values:
        return "-"
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _delta(found: Sequence[Outcome], baseline: Sequence[Outcome], name: str) -> str:
    """The difference to the baseline over the seeds that both have, as text."""
    theirs = {o.seed: o.metrics[name] for o in baseline if name in o.metrics}
    ours = {o.seed: o.metrics[name] for o in found if name in o.metrics and o.seed in theirs}
    if not ours:
        return "-"
    d = paired_difference(list(ours.values()), [theirs[seed] for seed in ours])
    return f"{d.mean:+.1f}" if d.low is None or d.high is None else f"{d.mean:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"


def with_labels(entries: Sequence[tuple[str, Recipe]]) -> dict[str, Recipe]:
    """Recipes by label, each named by its label; a ValueError if two have the same one."""
    labels = [label for label, _ in entries]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"the label {twice[0]!r} stands for two recipes: name them, as in LABEL=RECIPE")
    return {label: replace(recipe, name=label) for label, recipe in entries}
