"""Write the tiny runs that later versions must go on reading: python tests/released/write.py FOLDER [NAME ...].

Each run is trained twice: to its end, which says what must come out, and stopped in the middle, which is what is kept.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

FLAGS = """--detector.backbone small-backbone --detector.backbone.stem 4 --detector.backbone.channels 4 4 4 4 --detector.queries 8
--detector.transformer.width 8 --detector.transformer.heads 2 --detector.transformer.ffn 8 --detector.transformer.encoder-layers 1
--detector.transformer.decoder-layers 2 --detector.transformer.norm-groups 2 --detector.transformer.encoder-points 1
--detector.transformer.decoder-points 1 --data shapes:size=64,images=8,most=4 --data.workers 0 --data.transform.height 64
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


def write(folder: Path, name: str, stop: int | None) -> Path:
    """Train one run in a process of its own, whole or stopped after a step."""
    output = folder / ("whole" if stop is None else "runs") / name
    shutil.rmtree(output, ignore_errors=True)
    words = RUNS[name].format(**{other: f"{folder}/whole/{other}" for other in RUNS}).split()
    order = f"write.train({[*words, *TINY]!r}, {str(output)!r}, {stop})"
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import write; {order}"
    subprocess.run([sys.executable, "-c", script], check=True)
    return output


def train(words: list[str], output: str, stop: int | None) -> None:
    import torch

    from steadydetr.cli import run_command
    from steadydetr.training import loop

    torch.set_num_threads(1)
    synchronise_step = loop.synchronise_step

    def until(run, local):  # type: ignore[no-untyped-def]
        run.stop = run.stop or run.state.step == stop
        return synchronise_step(run, local)

    loop.synchronise_step = until
    run_command(words[0], [*words[1:], "--output", output])


def main(folder: Path, names: list[str]) -> None:
    for name in names or RUNS:
        whole, kept = write(folder, name, None), write(folder, name, STOP)
        lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        expected = {
            "losses": {line["step"]: line["losses"] for line in lines if line["kind"] == "train"},
            "ap": [line["ap"] for line in lines if line["kind"] == "eval"],
            "unstable_score": [line["unstable_score"] for line in lines if line["kind"] == "stability"],
        }
        (kept / "expected.json").write_text(json.dumps(expected))
        for picture in kept.glob("*.png"):
            picture.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
