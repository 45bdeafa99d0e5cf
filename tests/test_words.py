"""Words of the command line that it does not understand: one line each, with what was meant."""

from __future__ import annotations

import pytest

from steadydetr.cli import main


def error_of(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command of those words ends with."""
    with pytest.raises(SystemExit) as end:
        main(words.split())
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and len(err.strip().splitlines()) == 1, out + err
    assert err.startswith(f"steadydetr {words.split()[0]}: ") and "─" not in err and "│" not in err
    return err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--criterion.class-cost focall", "--criterion.class-cost focall: there is no part 'focall'; did you mean 'focal'?"),
        ("--detector.backbone resnet51", "there are timm, small-backbone"),
        ("--detector.backbone=resnet51", "there are timm, small-backbone"),
        ("--data.transform x", "there are detr, large-scale-jitter, fixed-size"),
        ("--data.transform", "--data.transform names no part; there are detr, large-scale-jitter, fixed-size"),
        ("--data.transform --data shapes", "--data.transform names no part; there are detr, large-scale-jitter, fixed-size"),
        ("--objectives.denoising denoisin", "did you mean 'denoising'"),
        ("--objectives.x denoising", "--objectives.denoising denoising"),
        ("--objectives.x none", "there is no objective 'x'; there are assignment"),
        ("--objectives.denosing none", "there is no objective 'denosing'; did you mean 'denoising'?"),
        ("--teachers.x ema-teacher", "--teachers.ema ema-teacher"),
        ("--teachers.teacher traind-teacher", "did you mean 'trained-teacher'"),
        ("--sinks.x y", "there is no sink 'x'"),
        ("--criterion.class-target position --criterion.class-target.warp half_sin", "class-target.warp: there is no function 'half_sin'"),
        ("--criterion.class-target evil;rm:x", "there is no part 'evil;rm:x'"),
    ],
)
def test_unknown_words_where_a_kind_is_expected(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(f"train small-dino {words}", capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--criterion.class-target.warp half-sine", "--criterion.class-target is hard, which has no field 'warp'; there are none"),
        ("--detector.backbone.name resnet51", "--detector.backbone is small-backbone, which has no field 'name'; there are stem, channels"),
        ("--objectives.denoising.numbr 3", "has no field 'numbr'; did you mean 'number'?"),
        ("--detector.no-look-forward-twic", "did you mean 'look-forward-twice'"),
        ("--objectives.denoising.weights.label 3", "name a part before it, --objectives.denoising.weights weights"),
        ("--objectives.features.weight 3", "name a part before it, --objectives.features feature-distillation"),
        ("--objectives.denoising none --objectives.denoising.number 3", "name a part before it, --objectives.denoising denoising"),
        ("--objectives.nothing.weight 3", "there is no objective 'nothing'"),
    ],
)
def test_options_of_what_is_not_there(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(f"train small-dino {words}", capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train small-dino --training.epohcs 3", "no option --training.epohcs; did you mean '--training.epochs'"),
        ("train small-dino --lr 3", "did you mean '--training.lr'?"),
        ("distill small-dino --teacher x --batch_size 3", "did you mean '--training.batch-size'?"),
        ("cost small-dino --queries=3", "did you mean '--detector.queries'?"),
        ("train small-dino --objectives denoising", "did you mean '--objectives.main'"),
        ("train small-dino --optimizer adam", "there is no option --optimizer; `steadydetr train small-dino --help`"),
        ("train small-dino more", "'more' is left over: it belongs to no option"),
        ("train small-dino -x", "there is no option -x"),
        (
            "train small-dino --training.sead 1",
            "there is no option --training.sead; did you mean '--training.seed' or '--training.schedule'",
        ),
        ("compare small-dino small-stable-dino --seed 3", "did you mean '--seeds'?"),
        ("compare small-dino small-stable-dino -- --epochs 3", "did you mean '--training.epochs'"),
        ("report x --outptu y", "did you mean '--output'?"),
        ("recipes small-dino more", "'more' is left over"),
    ],
)
def test_unknown_options(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(words, capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train small-dino --training.epochs many",
            "--training.epochs: invalid literal for int() with base 10: 'many'; write it as",
        ),
        ("train small-dino --training.lr", "Missing value for argument '--training.lr'"),
        (
            "train small-dino --training.precision fp17",
            "'fp17' for argument '--training.precision'. Expected one of ('no', 'bf16', 'auto')",
        ),
        (
            "train small-dino --training.batch-size auto8",
            "--training.batch-size: auto8 is none of these; write it as --training.batch-size INT|{auto}; `steady",
        ),
        ("predict x y --threshold high", "--threshold: could not convert string to float: 'high'; write it as --threshold FLOAT"),
        ("figures x --format jpg", "Expected one of ('png', 'svg', 'pdf')"),
        ("eval x", "missing: --data"),
        ("check", "missing: STR Folder of the data set"),
    ],
)
def test_wrong_values(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(words, capsys)
