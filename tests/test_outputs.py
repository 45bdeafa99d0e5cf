"""What commands write: never over something that they have not written themselves, unless they are told to."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from steadydetr.cli import main
from steadydetr.files import MARKER, claim_folder, printable, read_bytes, refuse_existing, write_bytes, write_text


@pytest.mark.parametrize(
    "words",
    [
        "check shapes:images=4 --output {}",
        "eval runs/none --data shapes --output {}",
        "stability runs/none shapes --output {}",
        "cost small-dino --output {}",
        "report {run} --output {}",
    ],
)
def test_a_file_is_replaced_only_if_it_was_offered(tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything else is done: the checkpoint that two of the commands name is not even looked for."""
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run")
    for path, said in (
        (mine, "is there already: choose another --output, or add --overwrite"),
        (tmp_path, "is a folder, and --output names a file"),
    ):
        with pytest.raises(SystemExit) as end:
            main(words.format(path, run=tmp_path / "run").split())
        assert end.value.code == 2 and said in capsys.readouterr().err
    assert mine.read_text() == "mine"


def write_run(folder: Path) -> None:
    """A run that has not taken a step yet."""
    import json

    from steadydetr.config import to_plain
    from steadydetr.recipes import find

    plain = {"format": 2, "recipe": to_plain(find("small-dino")), "classes": ["cat"], "category_ids": [1]}
    (folder / "config.json").write_text(json.dumps(plain))


def test_letters_that_the_terminal_has_not_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is done when its name is printed."""
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "猫\udcff.html")])
    sys.stdout.seek(0)
    assert "\\u732b\\udcff.html: open it in a browser" in sys.stdout.read()


def test_overwrite_replaces_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "found.json").symlink_to(tmp_path / "mine")
    main(["check", "shapes:images=4,size=64", "--splits", "val", "--output", str(tmp_path / "found.json"), "--overwrite"])
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "found.json").is_symlink()
    assert (tmp_path / "found.json").read_text().startswith("{")


def test_figures_have_a_folder_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/unstable-score.png").write_text("mine")
    for output, code in (("figures", None), ("figures", None), ("mine", 2)):
        words = ["figures", str(tmp_path / "run"), "--output", str(tmp_path / output)]
        if code is None:
            main(words)
        else:
            with pytest.raises(SystemExit) as end:
                main(words)
            assert end.value.code == code and "no command of steadydetr has made it" in capsys.readouterr().err
    assert (tmp_path / "mine/unstable-score.png").read_text() == "mine"


def test_claimed_folders(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new/inner", "figures")
    assert (tmp_path / "new/inner" / MARKER).read_text() == "figures\n"
    claim_folder(tmp_path / "new/inner", "figures")  # nothing but the marker is in it
    write_text(tmp_path / "new/inner/a.png", "")
    claim_folder(tmp_path / "new/inner", "figures", again=True)
    for command, again in (("figures", False), ("predict", True)):
        with pytest.raises(FileExistsError, match="was made by `steadydetr figures`: choose another --output, or add --overwrite"):
            claim_folder(tmp_path / "new/inner", command, again=again)
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / MARKER).symlink_to(tmp_path / "new/inner" / MARKER)
    (tmp_path / "marked/mine").write_text("mine")
    with pytest.raises(FileExistsError, match="no command of steadydetr has made it"):
        claim_folder(tmp_path / "marked", "figures", again=True)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a", "before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_bytes(tmp_path / "a", b"after")
    assert (tmp_path / "a").read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * (1 << 21))
    for name, said in (("pipe", "is a pipe, not a file"), (".", "is a folder, not a file"), ("/dev/zero", "is a device, not a file")):
        with pytest.raises(ValueError, match=said):
            read_bytes(tmp_path / name)
    with pytest.raises(ValueError, match="has 2 MiB; at most 1 are read"):
        read_bytes(tmp_path / "long", limit=1 << 20)
    refuse_existing(None, False)


def test_names_of_strangers_are_printable() -> None:
    assert printable("a\x1b[31m\nb\u202e\udc80ü[/red]\u200d") == "a\\x1b[31m\\nb\\u202e\\udc80ü[/red]\u200d"
