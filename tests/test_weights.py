"""WEIGHTS: what a user may name a trained detector by, on this machine and in the table of official checkpoints."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
import torch

from steadydetr.checkpoints import official
from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import save_detector
from steadydetr.checkpoints.official import BY_HAND, HUB, find_official, official_weights
from steadydetr.checkpoints.weights import options_of, read_weights
from steadydetr.cli import main
from steadydetr.cli.quick import check_start
from steadydetr.data.coco_classes import IDS, NAMES
from steadydetr.data.transforms import FixedSize, ShortestSide
from steadydetr.fetching import fetch_file
from steadydetr.kinds import register
from steadydetr.nn.named_tensors import NamedTensors, Untraced
from tests.conftest import DETECTORS
from tests.servers import closed_port, serving
from tests.test_convert import LINEAR, LinearConfig

CARD = DetectorCard(DETECTORS["dino"], ("cat", "dog"), (3, 7), FixedSize(64, 48), top=50)


@dataclass(frozen=True)
class HeadsConfig(LinearConfig):
    """Of a detector whose heads no tensor tells."""

    heads: int = 8

    @classmethod
    def from_tensors(cls, tensors: NamedTensors) -> Self | None:
        plain = super().from_tensors(tensors)
        return plain and cls(plain.width, tensors.untraced.heads)


def save(folder: Path, value: float = 0.0) -> dict[str, torch.Tensor]:
    """A checkpoint of ours whose parameters of one kind are `value`."""
    state = CARD.detector.build(2).state_dict()
    state["level_embed"] = torch.full_like(state["level_embed"], value)
    save_detector(folder, state, CARD)
    return state


@pytest.mark.parametrize("named", ["run", "run/best", "run/best/model.safetensors"])
def test_a_run_of_ours(named: str, tmp_path: Path) -> None:
    save(tmp_path / "run" / "last", 1.0)
    state = save(tmp_path / "run" / "best", 2.0)
    (tmp_path / "run" / "config.json").write_text('{"recipe": {}}')
    found = read_weights(tmp_path / named)
    assert found.card == CARD and found.where == str(tmp_path / named)
    assert found.state.keys() == state.keys() and found.state["level_embed"].unique().tolist() == [2.0]
    assert read_weights(tmp_path / "run" / "last").state["level_embed"].unique().tolist() == [1.0]


def test_a_checkpoint_of_ours_that_is_damaged(tmp_path: Path) -> None:
    save(tmp_path / "ours", torch.inf)
    with pytest.raises(ValueError, match=r"is of no use: 1 of .*level_embed"):
        read_weights(tmp_path / "ours")
    (tmp_path / "ours" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        read_weights(tmp_path / "ours")


@pytest.fixture
def linear(table: None, tmp_path: Path) -> Path:
    """A file of another project, of a detector with 5 classes whose layout is that of the originals."""
    register("linear")(HeadsConfig)
    torch.save({"model": LINEAR}, tmp_path / "theirs.pth")
    return tmp_path / "theirs.pth"


def test_a_file_of_another_project(linear: Path, tmp_path: Path) -> None:
    found = read_weights(linear)
    assert found.card.detector == HeadsConfig(4, heads=8) and found.card.resize == ShortestSide()
    assert found.card.classes == tuple(f"class {i}" for i in range(5)) and found.card.category_ids == (1, 2, 3, 4, 5)
    assert found.state.keys() == HeadsConfig(4).build(5).state_dict().keys()
    (tmp_path / "config.json").write_text('{"model_type": "of whatever it lies beside"}')
    (tmp_path / "names.txt").write_text("\n".join("abcde"))
    assert read_weights(linear, str(tmp_path / "names.txt")).card.classes == tuple("abcde")


def test_a_file_with_as_many_rows_as_coco_has_its_classes(linear: Path) -> None:
    rows = {key: torch.zeros(80, *value.shape[1:]) if "class_embed" in key else value for key, value in LINEAR.items()}
    torch.save(rows, linear)
    card = read_weights(linear).card
    assert card.classes == NAMES and card.category_ids == IDS


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ("nothing", ValueError, r"there is no file or folder nothing, and no official weights are called 'nothing'"),
        ("dino-4scale-r50-12ep", ValueError, "did you mean 'dino-4scale-r50-12ep-detrex'"),
        ("runs/nothing", FileNotFoundError, "there is no file or folder runs/nothing: name a run, a checkpoint folder, a file of another"),
        ("nothing.pth", FileNotFoundError, r"there is no file or folder nothing\.pth: name a run"),
        ("http://127.0.0.1/a.pth", ValueError, r"http://127\.0\.0\.1/a\.pth is an address, from which no weights are fetched: fetch the"),
        ("https://example.org/a.pth", ValueError, "is an address"),
        ("hub:name", ValueError, "hub:name names no repository: write hub:owner/name, or hub:owner/name@revision"),
        ("hub:owner/name/file.bin", ValueError, "names no repository"),
        ("hub:../../etc", ValueError, "names no repository"),
        ("empty", FileNotFoundError, r"empty holds no checkpoint: expected model\.safetensors and config\.json in it, or in best or last"),
        ("parts", ValueError, "tells of a model in several files: save it in one"),
        ("noise.pth", ValueError, r"noise\.pth cannot be read as a file of tensors"),
        ("other.pth", ValueError, r"other\.pth: no known layout: none of .* writes keys like head\.weight"),
    ],
)
def test_what_cannot_be_read(named: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "noise.pth").write_bytes(b"no tensors at all")
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "other.pth")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as found:
        read_weights(named)
    assert "\n" not in str(found.value)


# The table


def test_the_table_is_well_formed() -> None:
    rows = official_weights()
    assert len({row.name for row in rows}) == len(rows) > 20
    for row in rows:
        assert re.fullmatch(r"[a-z0-9-]+", row.name) and "/" not in row.file and row.file
        assert re.fullmatch(r"\d\d\.\d( \(LVIS\))?", row.reported) and row.licence and row.detector and row.classes and row.source
        assert re.fullmatch(r"(\d+)?", row.megabytes) and re.fullmatch(r"([0-9a-f]{8}|[0-9a-f]{64})?", row.sha256)
        assert row.where.startswith(("https://", HUB, BY_HAND)) and set(options_of(row)) <= vars(Untraced()).keys()
        if row.where.startswith("https://"):
            assert urlsplit(row.where).path.endswith(f"/{row.file}") and urlsplit(row.where).scheme == "https"
        else:
            assert row.file in ("model.safetensors", "pytorch_model.bin") or row.where.startswith(BY_HAND)


def test_digests_in_names_of_files_are_in_the_table() -> None:
    found = [row for row in official_weights() if re.search(r"-[0-9a-f]{8}\.pth$", row.file)]
    assert found and all(row.sha256 == row.file[-12:-4] for row in found)


@pytest.fixture
def shelf(linear: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A table with one row of a server on this machine, an empty cache, and the row's place there."""
    content = linear.read_bytes()
    monkeypatch.setenv("STEADYDETR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(official, "fetch_file", partial(fetch_file, scheme="http"))
    monkeypatch.setattr(official, "FILE", tmp_path / "table.tsv")

    def put(where: str, digest: str = hashlib.sha256(content).hexdigest(), megabytes: str = "") -> Path:
        row = ["linear", "Linear", "49.0", "5", megabytes, "MIT", "theirs.pth", where, digest, "heads=2", "here"]
        (tmp_path / "table.tsv").write_text("a first line\n" + "\t".join(row) + "\n")
        return find_official("linear").place

    return put, content


def test_a_name_of_the_table(shelf: Any) -> None:
    put, content = shelf
    with serving({"/theirs.pth": content}) as server:
        place = put(f"{server.address}/theirs.pth")
        for name in ("linear", "Linear"):
            found = read_weights(name)
            assert found.card.detector == HeadsConfig(4, heads=2) and found.where == "linear"
        assert server.asked == ["GET /theirs.pth"] and place.read_bytes() == content


def test_a_file_that_is_not_what_the_table_says(shelf: Any) -> None:
    put, content = shelf
    with serving({"/theirs.pth": content}) as server:
        place = put(f"{server.address}/theirs.pth", "1234abcd")
        with pytest.raises(ValueError, match=r"^linear: .*has the SHA-256 .* instead of 1234abcd: it is damaged, or another file"):
            read_weights("linear")
        assert not place.exists()
        put(f"{server.address}/theirs.pth", megabytes="0")
        assert find_official("linear").bound == 0
        with pytest.raises(ValueError, match="has more than 0 MB"):
            read_weights("linear")
        assert not place.exists()


def test_without_a_network_a_file_can_be_brought(shelf: Any) -> None:
    put, content = shelf
    address = closed_port()
    place = put(f"{address}/theirs.pth")
    with pytest.raises(ConnectionError) as error:
        read_weights("linear")
    reason = "127.0.0.1 cannot be reached (Connection refused)"
    assert str(error.value) == f"linear: {reason}. Without a network, bring {address}/theirs.pth and put it at {place}"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    assert read_weights("linear").card.detector == HeadsConfig(4, heads=2)
    place.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"theirs\.pth has the SHA-256"):
        read_weights("linear")


def test_a_file_that_is_fetched_by_hand(shelf: Any) -> None:
    put, content = shelf
    place = put(f"{BY_HAND}https://example.org/folder")
    with pytest.raises(
        FileNotFoundError, match=rf"linear is fetched by hand: get theirs\.pth from https://example\.org/folder and put it at {place}"
    ):
        read_weights("linear")
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert read_weights("linear").card.detector == HeadsConfig(4, heads=2)


# The command


def test_the_list_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    main(["weights"])
    shown = capsys.readouterr().out
    assert all(row.name in shown and row.reported.split()[0] in shown for row in official_weights())


def test_all_of_one_and_where_it_lies(shelf: Any, capsys: pytest.CaptureFixture[str]) -> None:
    put, content = shelf
    with serving({"/theirs.pth": content}) as server:
        place = put(f"{server.address}/theirs.pth")
        main(["weights", "linear"])
        shown = capsys.readouterr().out
        assert f"not yet; it will lie at {place}" in shown and "heads=2" in shown and f"{server.address}/theirs.pth" in shown
        main(["weights", "linear", "--fetch"])
        assert f"here  {place}\n" in capsys.readouterr().out and place.read_bytes() == content


def test_one_of_the_hub_lies_in_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    main(["weights", "deformable-detr-r50-50ep-hf"])
    assert f"it will lie at {tmp_path / 'models--SenseTime--deformable-detr'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fetch"], "name the weights that are meant"),
        (["dino"], "no official weights are called 'dino'; did you mean"),
        (["dino", "--output", "x"], "no official weights are called 'dino'"),
        (["hub:owner/name", "--fetch"], "hub:owner/name is not of the list: add --output FOLDER"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["weights", *words])
    shown = capsys.readouterr().err
    assert end.value.code == 2 and message in shown and shown.count("\n") == 1


def test_nothing_is_written_over(shelf: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put, _ = shelf
    put(f"{closed_port()}/theirs.pth")
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit):
        main(["weights", "linear", "--output", str(tmp_path / "mine")])
    assert "mine exists already: choose another folder" in capsys.readouterr().err


def test_a_run_that_goes_on_needs_its_weights_no_more() -> None:
    """They may have been moved since: what it starts from is in its own checkpoint."""
    for words in (["--resume"], ["--resume", "auto"], ["--resume=yes"]):
        check_start("runs/moved", words)
    with pytest.raises(FileNotFoundError, match="there is no file or folder runs/moved"):
        check_start("runs/moved", ["--output", "x"])


def test_one_of_several_processes_leaves_it_to_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a mistake is told once."""
    monkeypatch.setenv("RANK", "1")
    check_start("runs/moved", [])
