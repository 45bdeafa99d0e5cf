"""Write the archive that later versions must go on reading, with its list: python tests/released/write.py VERSION [RUN ...].

Each run is trained twice: to its end, which says what must come out, and stopped in the middle, which is what is kept.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from unittest import mock

import torch

from steadydetr.cli import run_command
from steadydetr.config import to_plain
from steadydetr.recipes import find, names
from steadydetr.training import loop

HERE = Path(__file__).parent
DATA = "shapes:size=64,images=8,most=4"
FLAGS = f"""--detector.backbone small-backbone --detector.backbone.stem 4 --detector.backbone.channels 4 4 4 4 --detector.queries 8
--detector.transformer.width 8 --detector.transformer.heads 2 --detector.transformer.ffn 8 --detector.transformer.encoder-layers 1
--detector.transformer.decoder-layers 2 --detector.transformer.norm-groups 2 --detector.transformer.encoder-points 1
--detector.transformer.decoder-points 1 --data {DATA} --data.workers 0 --data.transform.height 64
--data.transform.width 64 --data.resize.height 64 --data.resize.width 64 --training.batch-size 4 --training.epochs 3
--training.log-every 1 --training.eval-batch-size 8 --training.stability-images 4"""
TINY = FLAGS.split()
STOP = 3  # step after which the kept run was stopped: in the middle of its second epoch
RUNS: dict[str, str] = {
    "deformable-detr": "train small-refine-deformable-detr --detector.no-refine",
    "refine-od": "train small-od-deformable-detr --detector.transformer.share-decoder --objectives.prediction.position student",
    "two-stage-stable": "train small-stable-deformable-detr --training.ema-decay 0.5 --criterion.class-target.warp half_sine",
    "dab": "train small-dino --detector dab-deformable-detr --objectives.denoising none",
    "dab-two-stage": "train small-dino --detector dab-deformable-detr --detector.two-stage --objectives.denoising none"
    " --criterion.class-target quality --criterion.alpha None",
    "dino": "train small-dino",
    "dino-od": "train small-od-dino --objectives.main.teacher-match.counterparts rank --training.schedule step --training.drop-epochs 1",
    "dino-naive": "train small-od-dino --objectives.prediction naive-prediction --objectives.auxiliary none",
    "distill": "distill small-distill-deformable-detr --teacher {deformable-detr}",
    "distill-released": "distill small-distill-deformable-detr --teacher {deformable-detr} --objectives.features released-features"
    " --objectives.logits released-logits --objectives.assignment teacher-init",
    "distill-peers": "distill small-refine-deformable-detr --teacher {dab} --objectives.logits none --objectives.assignment none"
    " --objectives.features none --objectives.fgd fgd --objectives.mgd mgd --objectives.fkd fkd --objectives.fgfi fgfi",
    "steady": "distill small-od-dino --teacher {dino} --criterion.class-cost position-modulated --detector.transformer.fusion dense",
}
COMPARED = ["small-dino", "cost=small-dino --criterion.class-cost position-modulated", "--seeds", "2"]
COMPARE_FLAGS = [*TINY, "--training.epochs", "1"]


def main(version: str, wanted: list[str]) -> None:
    archive = HERE / f"{version}.tar.xz"
    if archive.exists():
        raise SystemExit(f"{archive} is there: what a released version wrote is never written again")
    torch.set_num_threads(1)
    wanted = wanted or list(RUNS)
    teachers = {name: teacher_of(name) for name in wanted}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in dict.fromkeys([*filter(None, teachers.values()), *wanted]):
            write_run(folder, name, None)
        for name in wanted:
            keep_stopped(folder, name)
        for teacher in filter(None, teachers.values()):
            shutil.copytree(folder / "whole" / teacher / "best", folder / "teachers" / teacher, dirs_exist_ok=True)
            (folder / "teachers" / teacher / "training_state.pt").unlink()
        write_comparison(folder / "compare")
        write_recipes(folder / "recipes.json")
        shutil.rmtree(folder / "whole")
        with tarfile.open(archive, "w:xz", preset=9) as file:
            file.add(folder, ".")
    listed = {"data": DATA, "runs": teachers, "compare": shlex.join([*COMPARED, "--", *COMPARE_FLAGS])}
    archive.with_name(f"{version}.json").write_text(json.dumps(listed, indent=2) + "\n")


def teacher_of(name: str) -> str | None:
    """The run whose best checkpoint teaches a run."""
    return next((other for other in RUNS if f"--teacher {{{other}}}" in RUNS[name]), None)


def write_run(folder: Path, name: str, stop: int | None) -> Path:
    """Train one run, whole or stopped after a step."""
    output = folder / ("whole" if stop is None else "runs") / name
    command, *words = RUNS[name].format(**{other: f"{folder}/whole/{other}" for other in RUNS}).split()
    synchronise_step = loop.synchronise_step

    def until(run, local):  # type: ignore[no-untyped-def]
        run.stop = run.stop or run.state.step == stop
        return synchronise_step(run, local)

    with mock.patch.object(loop, "synchronise_step", until):
        run_command(command, [*words, *TINY, "--output", str(output)])
    return output


def keep_stopped(folder: Path, name: str) -> None:
    """The run stopped in the middle, without pictures, and beside it what the whole one came to."""
    kept = write_run(folder, name, STOP)
    lines = [json.loads(line) for line in (folder / "whole" / name / "metrics.jsonl").read_text().splitlines()]
    expected = {
        "losses": {line["step"]: line["losses"] for line in lines if line["kind"] == "train"},
        "ap": [line["ap"] for line in lines if line["kind"] == "eval"],
        "unstable_score": [line["unstable_score"] for line in lines if line["kind"] == "stability"],
    }
    (kept / "expected.json").write_text(json.dumps(expected))
    for picture in kept.glob("*.png"):
        picture.unlink()


def write_comparison(output: Path) -> None:
    """A finished comparison; the checkpoint of its first run alone is kept."""
    run_command("compare", [*COMPARED, "--output", str(output), "--", *COMPARE_FLAGS])
    for path in (*output.glob("*/*.log"), *output.glob("*/seed*/*.png"), *output.glob("*/seed*/*/training_state.pt")):
        path.unlink()
    for run in (path.parent for path in output.glob("*/seed*/config.json")):
        shutil.rmtree(run / "best")
        if run != output / "small-dino" / "seed0":
            (run / "last" / "model.safetensors").unlink()


def write_recipes(path: Path) -> None:
    """Every recipe of this version; those of plugins are not ours."""
    path.write_text(json.dumps({name: to_plain(find(name)) for name in names() if ":" not in name}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
