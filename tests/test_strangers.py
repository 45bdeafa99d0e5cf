"""Checkpoints and recipes of strangers: nothing of theirs is run or fetched, sizes are bounded before memory is taken."""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steadydetr.checkpoints.card import DetectorCard, read_card
from steadydetr.checkpoints.convert import load_foreign
from steadydetr.checkpoints.folder import load_detector, load_training_state, save_detector
from steadydetr.cli.training_arguments import find_or_read
from steadydetr.config import to_plain
from steadydetr.data.coco_classes import class_list
from steadydetr.data.transforms import FixedSize
from steadydetr.detectors import DINOConfig
from steadydetr.files import write_json
from steadydetr.nn.configs import TimmBackboneConfig
from steadydetr.recipes import find
from steadydetr.runs.models import load_models
from steadydetr.tensor_files import read_pickled, read_tensors, tensor_shapes
from steadydetr.training.run import restore
from tests.conftest import CLASSES, DETECTORS

Plain = dict[str, Any]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    config = DETECTORS["dino"]
    state = config.build(CLASSES).state_dict()
    extra = {"method": {}, "teachers": {}, "average": None, "optimiser": {}, "state": {"step": 1}}
    save_detector(folder, state, DetectorCard(config, tuple("abcde"), (1, 2, 3, 4, 5), FixedSize(32, 32)), extra)
    return folder


def rewrite(path: Path, change: Callable[[Plain], Any]) -> None:
    plain = json.loads(path.read_text())
    change(plain)
    write_json(path, plain)


# names


@pytest.mark.parametrize(
    "name",
    ["hf-hub:attacker/beacon", "hf_hub:attacker/beacon", "local-dir:/tmp", "timm/resnet18", "https://example.org/resnet18", "../resnet18"],
)
@pytest.mark.parametrize("weights", ["hub", "none"])
def test_a_backbone_is_one_of_timms_own_table(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was reached")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ValueError, match=r"is no model of timm.*Only names of timm's own table"):
        TimmBackboneConfig(name, weights=weights).build()


def test_a_checkpoint_fetches_nothing(checkpoint: Path) -> None:
    """Whatever its config says of weights: they are in the checkpoint."""
    config = DINOConfig(TimmBackboneConfig("test_resnet", weights="none"), DETECTORS["dino"].transformer, queries=12)  # type: ignore[attr-defined]
    save_detector(checkpoint, config.build(2).state_dict(), DetectorCard(config, ("a", "b"), (1, 2)))
    for weights in ("hub", "https://example.org/x.pth", "\\\\host\\share\\x.pth", "/dev/zero"):
        rewrite(checkpoint / "config.json", lambda plain, w=weights: plain["detector"]["backbone"].update(weights=w))
        load_detector(checkpoint)
    rewrite(checkpoint / "config.json", lambda plain: plain["detector"]["backbone"].update(name="hf-hub:attacker/beacon"))
    with pytest.raises(ValueError, match=r"config\.json: its detector cannot be built: .*'hf-hub:attacker/beacon' is no model of timm"):
        load_detector(checkpoint)


@pytest.mark.parametrize(
    "place",
    [
        "\\\\host\\share\\w.pth",
        "//host/share",
        "https://host/w.pth",
        " file://host/w.pth",
        "s3://b/w.pth",
        "a+ //host/share",
        "a+hf:owner/name",
        "a,images-in=s3://b/images",
    ],
)
@pytest.mark.parametrize("field", ["detector.backbone.weights", "data.source", "teachers.checkpoint"])
def test_a_recipe_of_a_file_names_no_place_in_the_network(place: str, field: str, tmp_path: Path) -> None:
    plain = json.loads(json.dumps(to_plain(find("detrdistill-dino-4scale-r101-r18-12ep")))) | {"notes": "https://arxiv.org/abs/1"}
    path = tmp_path / "recipe.json"
    write_json(path, plain)
    assert find_or_read(str(path)).notes.startswith("https")
    *above, last = field.split(".")
    part = plain
    for name in above:
        part = part[name][0] if name == "teachers" else part[name]
    part[last] = place
    write_json(path, plain)
    with pytest.raises(ValueError, match=rf"recipe\.json: {field} = .* is a place in the network, which a file may not name"):
        find_or_read(str(path))


@pytest.mark.parametrize("weights", ["/etc/passwd", "/dev/zero", "/tmp", "a\0b", "x" * 300])
def test_weights_that_are_no_file_of_tensors(weights: str) -> None:
    with pytest.raises(ValueError, match=r"^backbone\.weights") as error:
        TimmBackboneConfig("test_resnet", weights=weights).build()
    assert "\n" not in str(error.value) and "root:" not in str(error.value)


# sizes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["detector"]["transformer"].update(width=10**9), "transformer.width = 1000000000 must lie in"),
        (lambda c: c["detector"].update(queries=10**7), "detector.queries = 10000000 must lie in"),
        (lambda c: c["detector"].update(queries=10**6), r"does not fit its config.json: .*shapes: .*\[1000000, 16\]"),
        (lambda c: c["detector"]["transformer"].update(encoder_layers=10**6), "encoder_layers = 1000000 must lie in"),
        (lambda c: c["detector"]["transformer"].update(encoder_layers=1000), "it has more than .* parameters, many more than model.safe"),
        (lambda c: c["detector"]["transformer"].update(ffn=2**20, width=2**16), "shapes: "),
        (lambda c: c["detector"]["transformer"].update(share_decoder=True, decoder_layers=10**6), "decoder_layers = 1000000 must lie in"),
        (lambda c: c["detector"]["backbone"].update(channels=[4] * 10**5), r"detector\.backbone\.channels = .* must be four numbers"),
        (lambda c: c.update(classes=["x"] * 10**5, category_ids=list(range(10**5))), r"shapes: .*\[100000"),
        (lambda c: c.update(classes=[], category_ids=[]), "0 classes and 0 category_ids"),
        (lambda c: c.update(category_ids=[1]), "5 classes and 1 category_ids"),
        (lambda c: c.update(resize={"kind": "fixed-size", "height": 10**6, "width": 10}), "height = 1000000 must lie in"),
        (lambda c: c.update(resize={"kind": "shortest-side", "longest": 10**6}), "longest = 1000000 must lie in"),
        (lambda c: c.update(top=10**9), "card.top = 1000000000 must lie in"),
        (lambda c: c.update(nms=7), "card.nms = 7 must lie in"),
        (lambda c: c["detector"]["backbone"].update(kind="timm-backbone", name="vit_giant_patch14_dinov2"), "has no field"),
        (lambda c: c["detector"].update(backbone={"kind": "timm-backbone", "name": "resnet152"}), "does not fit|more than"),
    ],
)  # fmt: skip
def test_sizes_of_a_config_are_bounded_before_memory_is_taken(checkpoint: Path, change: Callable[[Plain], Any], said: str) -> None:
    rewrite(checkpoint / "config.json", change)
    with pytest.raises(ValueError, match=rf"(config\.json|model\.safetensors).*({said})") as error:
        load_detector(checkpoint)
    assert len(str(error.value)) < 3000 and "\n" not in str(error.value)


def safetensors(path: Path, header: Plain | bytes, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    return path


def test_headers_that_claim_more_than_the_file(tmp_path: Path) -> None:
    huge = {"a": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    for header, length in ((huge, None), (b"{}", 2**62), (b"[" * 10**5, None), (b"\xff" * 8, None), (b"", None)):
        path = safetensors(tmp_path / "x.safetensors", header, length)
        for read in (tensor_shapes, read_tensors, load_foreign):
            with pytest.raises(ValueError, match=r"x\.safetensors is damaged, it cannot be read as a safetensors file"):
                read(path)


def test_weights_that_do_not_fit_are_one_line(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    state = read_tensors(path)
    name = next(iter(state))
    for change, said in (({name: torch.zeros(3)}, rf"shapes: {name} \[3\] for"), ({"\x1b[2J": torch.zeros(1)}, r"left over: \\x1b\[2J")):
        save_file(state | change, path)
        with pytest.raises(ValueError, match=rf"model\.safetensors does not fit its config\.json: .*{said}"):
            load_detector(checkpoint)
    save_file({key: value for key, value in state.items() if key != name}, path)
    with pytest.raises(ValueError, match=rf"missing: {name}$"):
        load_detector(checkpoint)


# pickles


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


class Runs:
    """What an attacker's pickle would call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def test_nothing_of_a_pickle_is_run(checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for attack in (Runs(os.system, f"touch {mark}"), Runs(exec, f"open({str(mark)!r}, 'w')"), Runs(os.mkdir, str(mark))):
        for content in (attack, {"model": {"a": torch.zeros(1)}, "b": attack}):
            path = saved(tmp_path / "evil.pth", content)
            with pytest.raises(ValueError, match=r"evil\.pth cannot be read as a file of tensors: beside tensors it holds a [\w.]+, "):
                load_foreign(path)
            with pytest.raises(ValueError, match=r"backbone\.weights: .*evil\.pth"):
                TimmBackboneConfig("test_resnet", weights=str(path)).build()
            shutil.copy(path, checkpoint / "training_state.pt")
            with pytest.raises(ValueError, match=r"training_state\.pt cannot be read as"):
                load_training_state(checkpoint)
    assert not mark.exists()


def test_what_is_foreign_is_named_in_one_line(tmp_path: Path) -> None:
    path = saved(tmp_path / "np.pth", {"model": {"transformer.level_embed": torch.zeros(4, 4)}, "best": np.float64(0.4)})
    with pytest.raises(ValueError, match=r"np\.pth .* it holds a numpy\.\S+\.scalar, .* save the weights alone: ") as error:
        load_foreign(path)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def looped() -> Plain:
    content: Plain = {}
    content["model"] = content
    return content


def doubled(content: Any, times: int) -> Any:
    """Few lists, in which there are 2**times values."""
    return doubled([content, content], times - 1) if times else content


def compressed(path: Path) -> Path:
    torch.save({"a": torch.zeros(1000)}, file := io.BytesIO())
    with zipfile.ZipFile(file) as before, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as after:
        for entry in before.infolist():
            after.writestr(entry.filename, before.read(entry))
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (compressed, "is a compressed archive"),
        (lambda path: saved(path, {"a": torch.zeros(1).expand(10**6, 10**6)}), r"claims a tensor of the shape \[1000000, 1000000\]"),
        (lambda path: saved(path, {"a": torch.empty(10**6, 10**6, device="meta")}), "without values"),
        (lambda path: saved(path, [argparse.Namespace(a=torch.zeros(2, 2).to_sparse())]), "sparse"),
        (lambda path: saved(path, {"a": Runs(bytearray, 10**10)}), "holds a bytearray"),
        (lambda path: saved(path, {"a": Runs(torch.FloatTensor, 10**4)}), "larger than the file|cannot be read"),
        (lambda path: saved(path, dict.fromkeys(map(str, range(999)), torch.zeros(999))), "larger than the file"),
        (lambda path: saved(path, looped()), "nested without end"),
        (lambda path: saved(path, doubled(torch.zeros(0), 40)), "nested without end"),
        (lambda path: saved(path, functools.reduce(lambda inner, _: [inner], range(100), 1)), "nested without end"),
        (lambda path: saved(path, {"model": torch.zeros(2)}) and path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "EOFError"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "cannot be read"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "cannot be read"),
        (lambda path: path.mkdir(), "model.safetensors"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_files_that_would_grow_or_are_none(make: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    make(path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"x\.pth.*({said})") as error:
        load_foreign(path)
    assert "\n" not in str(error.value)


def test_prefixes_of_wrapped_models_are_removed(tmp_path: Path) -> None:
    """Of several processes, compiled, or both; and in several files."""
    for key in ("a.b", "module.a.b", "_orig_mod.a.b", "module._orig_mod.a.b", "a._orig_mod.b"):
        assert list(load_foreign(saved(tmp_path / "x.pth", {key: torch.zeros(1)}))) == ["a.b"]
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json tells of a model in several files: save it in one"):
        load_foreign(tmp_path)


def test_honest_files_are_read(tmp_path: Path) -> None:
    """Tied heads, old format, views, parameters, optimisers."""
    shared = torch.arange(6.0).view(2, 3)
    content = {"model": {str(i): shared for i in range(6)} | {"t": shared.T, "p": torch.nn.Parameter(shared), "e": torch.zeros(0)}}
    for zipped in (True, False):
        torch.save(content | {"args": argparse.Namespace(lr=1)}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        assert torch.equal(load_foreign(tmp_path / "x.pth")["t"], shared.T)
        assert read_pickled(tmp_path / "x.pth")["args"].lr == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1], "it holds a list"),
        ({"format": 1}, "its method, optimiser, average is missing"),
        ({"format": 99}, "its format is 99"),
        ({"format": 2, "method": 3, "optimiser": {}, "average": None}, "its method is missing"),
    ],
)
def test_training_states_that_are_none(checkpoint: Path, content: Any, said: str) -> None:
    saved(checkpoint / "training_state.pt", content)
    with pytest.raises(ValueError, match=rf"training_state\.pt.*{said}"):
        load_training_state(checkpoint)


def test_an_average_of_another_detector_is_one_line(checkpoint: Path) -> None:
    for average, said in (({"a": torch.zeros(1)}, "does not fit its config.json: missing: .* left over: a"), ({"a": 1}, "no tensors")):
        saved(checkpoint / "training_state.pt", {"format": 2, "method": {}, "optimiser": {}, "state": {}, "average": average})
        with pytest.raises(ValueError, match=rf"training_state\.pt.*{said}") as error:
            load_models(checkpoint, "cpu")
        assert "\n" not in str(error.value)


# what is no file


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training_state.pt"])
def test_pipes_and_devices_in_a_checkpoint_block_nothing(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(ValueError, match=rf"{name} is a pipe, not a file"):
        load_models(checkpoint, "cpu")
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"{name} is a device, not a file"):
        load_models(checkpoint, "cpu")


@pytest.mark.parametrize(
    "read",
    [load_foreign, lambda path: find_or_read(f"{path}"), lambda path: class_list(str(path), 3), load_detector],
)
def test_pipes_that_a_user_names_block_nothing(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"pipe\.json"):
        read(path)


def test_class_lists_are_read_with_a_byte_order_mark_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\nMäuse\n".encode())
    assert class_list(str(path), 2) == (("cat", "Mäuse"), (1, 2))
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"names\.txt is not utf-16 text"):
        class_list(str(path), 2)


def test_a_config_of_another_kind(checkpoint: Path) -> None:
    write_json(checkpoint / "config.json", {"format": 2} | to_plain(FixedSize()))
    with pytest.raises(ValueError, match=r"config\.json is not that of a checkpoint but a FixedSize"):
        read_card(checkpoint)
    write_json(checkpoint / "config.json", [1])
    with pytest.raises(ValueError, match=r"config\.json is damaged: it holds a list instead of an object"):
        read_card(checkpoint)


def test_a_state_of_another_run_is_one_line() -> None:
    """A training state that is whole, but whose values are not those of the run."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.AdamW([parameter])
    method: Any = SimpleNamespace(teachers={}, fingerprints={}, load_training_state=torch.nn.Linear(2, 2).load_state_dict)
    good = {"method": torch.nn.Linear(2, 2).state_dict(), "optimiser": optimiser.state_dict(), "average": None}
    for changed in (
        {"optimiser": {"state": {}}},
        {"optimiser": {"state": 1, "param_groups": [{}]}},
        {"method": {"weight": torch.zeros(9)}},
        {},
    ):
        saved_state: Any = SimpleNamespace(checkpoint=Path("run/last"), training=good | changed, progress={"stride": 1}, best=None)
        with pytest.raises(ValueError, match=r"^run/last does not fit its run, or is damaged: .+$") as error:
            restore(saved_state, method, None, optimiser)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
