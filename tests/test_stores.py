"""Images in tar files and at addresses: the same images in the same order as from files, and every fault named in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from steadydetr.cli import main
from steadydetr.data import DataConfig, EvalLoader, FixedSize, FixedSizeTransform, TrainLoader, for_training, open_data
from steadydetr.data.check import check_data
from steadydetr.data.opening import open_train_and_val
from steadydetr.limits import Limits
from tests.data_folders import voc_folder
from tests.servers import closed_port, serving

IMAGES = 6


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYDETR_CACHE", str(tmp_path / "cache"))


def photos(root: Path, split: str = "train") -> Path:
    """COCO data of a few images of noise, JPEG and PNG. Gives the folder of the images."""
    rng, content = np.random.default_rng(len(split)), dict[str, Any](images=[], annotations=[], categories=[{"id": 1, "name": "nut"}])
    (root / split).mkdir(parents=True)
    for number in range(IMAGES):
        name, height, width = f"{split}-{number}.{'png' if number % 3 == 0 else 'jpg'}", 20 + number, 30 - number
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / split / name)
        content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        content["annotations"].append({"id": number, "image_id": number, "category_id": 1, "bbox": [number, 2, 9, 8]})
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root / split


def pack(folder: Path, shards: Path, prefix: str = "", form: int = tarfile.PAX_FORMAT) -> Path:
    """Move the files of a folder into two tar files, dealt in turn, as WebDataset names them."""
    shards.mkdir(exist_ok=True)
    files = sorted(folder.iterdir())
    for number in range(2):
        with tarfile.open(shards / f"shard-{number:06d}.tar", "w", format=form) as tar:
            for path in files[number::2]:
                tar.add(path, prefix + path.name)
    shutil.rmtree(folder)
    return shards


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """The same data with files, and with tar files in place of them in the folder `shards`."""
    photos(tmp_path / "files")
    shutil.copytree(tmp_path / "files", tmp_path / "tars")
    pack(tmp_path / "tars/train", tmp_path / "tars/shards")
    return tmp_path / "files", tmp_path / "tars"


def batches(where: str | Path, start_step: int = 0, workers: int = 0, **options: Any) -> list[Any]:
    """What training and evaluation load of a data set."""
    data, config = open_data(where), DataConfig(transform=FixedSizeTransform(16, 24), resize=FixedSize(16, 16), workers=workers)
    loader, evaluation = TrainLoader(for_training(data)[0], config, 2, **options), EvalLoader(data, config, 2)
    found = [batch for step in loader.epoch(1, start_step) for batch in step] + list(evaluation)
    loader.close(), evaluation.close()
    return [(b.images.tolist(), b.targets.boxes.tolist(), b.image_ids, b.original_sizes) for b in found]


@pytest.mark.parametrize("images", ["shards", "shards/*.tar", "file://shards/*.tar"])
def test_images_in_tar_files_are_those_of_files_in_their_order(images: str, both: tuple[Path, Path]) -> None:
    files, tars = both
    where = f"{tars},images-in={images.replace('shards', str(tars / 'shards'))}"
    assert batches(where) == batches(files)
    assert batches(where, start_step=2, rank=1, world=2) == batches(files, start_step=2, rank=1, world=2)
    open_data(where).check_files()  # type: ignore[attr-defined]
    assert not check_data(where, ("train",)).failed


def test_a_divided_place_keeps_each_image_with_its_member(both: tuple[Path, Path]) -> None:
    """What is held out to validate on, and what is left to train on."""
    files, tars = both
    where = f"{tars},images-in={tars}/shards"
    expected, found = (open_train_and_val(DataConfig(source=source)) for source in (str(files), where))
    for one, other in ((expected.train, found.train), (expected.val, found.val)):
        assert [one.load_image(i).tolist() for i in range(len(one.index))] == [
            other.load_image(i).tolist() for i in range(len(other.index))
        ]


def test_loading_processes_read_tar_files_and_addresses(both: tuple[Path, Path]) -> None:
    files, tars = both
    for images in (f"{tars}/shards", f"file://{tars}/shards/*.tar", f"file://{files}/train"):
        assert batches(f"{tars},images-in={images}", workers=1) == batches(files)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_any_format_of_tar_are_found_by_their_end(form: int, tmp_path: Path) -> None:
    folder = photos(tmp_path / "files")
    long = f"{'deep/' * 18}été/" if form != tarfile.USTAR_FORMAT else "deep/"
    shutil.copytree(folder, tmp_path / "again")
    pack(tmp_path / "again", tmp_path / "shards", f"./{long}", form)
    assert batches(f"{tmp_path}/files,images-in={tmp_path}/shards") == batches(tmp_path / "files")


def test_of_two_members_of_a_name_the_one_in_that_folder_is_taken(tmp_path: Path) -> None:
    """And where the folder does not tell, it is an error that names both."""
    voc_folder(tmp_path / "voc", image="a.jpg")
    expected = open_data(tmp_path / "voc").load_image(0)
    other = Image.fromarray(np.zeros((6, 8, 3), np.uint8))
    for folder in ("JPEGImages", "other"):
        (tmp_path / "all" / folder).mkdir(parents=True)
    shutil.move(tmp_path / "voc/JPEGImages/a.jpg", tmp_path / "all/JPEGImages/a.jpg")
    other.save(tmp_path / "all/other/a.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "all", "top")
    where = f"{tmp_path}/voc,images-in={tmp_path}/a.tar"
    assert np.array_equal(open_data(where).load_image(0), expected) and expected.any()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "all/JPEGImages", "one")
        tar.add(tmp_path / "all/other", "two")
    with pytest.raises(ValueError, match=r"a\.jpg is twice in the tar files, as one/a\.jpg in \S*a\.tar, two/a\.jpg in \S*a\.tar"):
        open_data(where)


def test_a_folder_elsewhere_takes_the_place_of_the_images(tmp_path: Path) -> None:
    folder = photos(tmp_path / "files")
    expected = batches(tmp_path / "files")
    folder.rename(tmp_path / "elsewhere")
    assert batches(f"{tmp_path}/files,images-in={tmp_path}/elsewhere") == expected
    with pytest.raises(ValueError, match=r"images-in=.*nowhere: there is no such folder, and no tar file of that name"):
        open_data(f"{tmp_path}/files,images-in={tmp_path}/nowhere")


def test_the_index_is_made_once_and_again_when_a_tar_file_changes(both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    files, tars = both
    where, expected = f"{tars},images-in={tars}/shards", batches(files)
    opened, original = list[str](), tarfile.open

    def counting(*arguments: Any, **options: Any) -> Any:
        opened.append("")
        return original(*arguments, **options)

    monkeypatch.setattr(tarfile, "open", counting)
    assert batches(where) == batches(where) == expected and len(opened) == 2
    os.utime(tars / "shards/shard-000001.tar", (1, 1))
    assert batches(where) == expected and len(opened) == 3
    for kept in (tars.parent / "cache/tar-index").iterdir():
        kept.write_bytes(b"damaged")
    assert batches(where) == expected and len(opened) == 5


def test_a_tar_file_that_changes_during_a_run_is_named(both: tuple[Path, Path]) -> None:
    _, tars = both
    data = open_data(f"{tars},images-in={tars}/shards")
    data.load_image(0)
    os.utime(tars / "shards/shard-000000.tar", (1, 1))
    with pytest.raises(ValueError, match=r"shard-000000\.tar has changed since the run has begun: start again"):
        data.load_image(0)
    data.load_image(1)


@pytest.mark.parametrize("kept", [100, 512, 600, 2048, -10240, -9000])
def test_tar_files_that_are_cut_off_are_named(kept: int, both: tuple[Path, Path]) -> None:
    """Within a head, after one, within an image, and before the empty blocks at the end."""
    _, tars = both
    shard = tars / "shards/shard-000001.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[-1].offset_data
    shard.write_bytes(
        whole[:kept] if kept > 0 else whole[: end + 512] if kept == -9000 else whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512]
    )
    with pytest.raises(ValueError, match=r"shard-000001\.tar .*(cut off|no tar file)"):
        open_data(f"{tars},images-in={tars}/shards")


@pytest.mark.parametrize(
    ("ending", "compress"), [("tar.gz", gzip.compress), ("tgz", gzip.compress), ("tar", bz2.compress), ("tar.xz", lzma.compress)]
)
def test_compressed_tar_files_are_refused_with_what_to_do(ending: str, compress: Any, both: tuple[Path, Path]) -> None:
    _, tars = both
    shard = tars / "shards/shard-000001.tar"
    shard.with_suffix(f".{ending}").write_bytes(compress(shard.read_bytes()))
    if ending != "tar":
        shard.unlink()
    with pytest.raises(ValueError, match=rf"shard-000001\.{ending} is compressed .*unpack it, (gunzip|bunzip2|unxz) FILE"):
        open_data(f"{tars},images-in={tars}/shards")


def test_images_that_no_tar_file_has_are_named_before_training(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, tars = both
    where = f"{tars},images-in={tars}/shards/shard-000000.tar"
    data = open_data(where)
    with pytest.raises(ValueError, match=r"3 images are in none of the 1 tar file of .*shard-000000\.tar, the first is train-1\.jpg"):
        data.check_files()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"train-1\.jpg is in none of the 1 tar file"):
        data.load_image(1)
    assert {finding.kind for finding in check_data(where, ("train",)).findings if finding.fatal} == {"missing image", "missing split"} - {
        "missing split"
    }


def test_a_member_larger_than_allowed_is_refused(both: tuple[Path, Path]) -> None:
    _, tars = both
    large = tars / "train-0.png"
    large.write_bytes(bytes(2**20 + 1))
    with tarfile.open(tars / "shards/shard-000000.tar", "w") as tar:
        tar.add(large, large.name)
    data = open_data(f"{tars},images-in={tars}/shards", limits=Limits(max_file_mb=1))
    with pytest.raises(ValueError, match=r"train-0\.png has 1 MiB, more than max_file_mb = 1 allows"):
        data.load_image(0)


def test_links_among_tar_files_lead_nowhere_else_unless_allowed(both: tuple[Path, Path]) -> None:
    _, tars = both
    shutil.move(tars / "shards/shard-000001.tar", tars / "moved.tar")
    (tars / "shards/shard-000001.tar").symlink_to(tars / "moved.tar")
    for images in (f"{tars}/shards", f"{tars}/shards/*.tar"):
        with pytest.raises(ValueError, match=r"is a link to .*moved\.tar, outside the data folder .*shards: it is read only with"):
            open_data(f"{tars},images-in={images}")
        assert len(open_data(f"{tars},images-in={images}", limits=Limits(outside="allow")).index) == IMAGES


# Addresses


@pytest.fixture
def memory() -> Any:
    """An empty file system in memory."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.store.clear(), system.pseudo_dirs.clear()
    yield system
    system.store.clear(), system.pseudo_dirs.clear()


def test_images_and_tar_files_in_memory(both: tuple[Path, Path], memory: Any) -> None:
    files, tars = both
    for path in [*(files / "train").iterdir(), *(tars / "shards").iterdir()]:
        memory.pipe(f"/{path.parent.name}/{path.name}", path.read_bytes())
    expected = batches(files)
    shutil.rmtree(files / "train")
    for images in ("memory://shards/*.tar", "memory://train", "memory://train/"):
        assert batches(f"{files},images-in={images}") == expected
    data = open_data(f"{files},images-in=memory://shards/*.tar")
    memory.pipe("/shards/shard-000000.tar", b"changed")
    with pytest.raises(ValueError, match=r"shard-000000\.tar gives 0 bytes where \d+ were asked for"):
        data.load_image(0)
    memory.rm("/train/train-0.png")
    with pytest.raises(ValueError, match=r"there is no file memory://train/train-0\.png"):
        open_data(f"{files},images-in=memory://train").load_image(0)
    with pytest.raises(ValueError, match=r"images-in=memory://nothing/\*\.tar: there is no such folder, and no tar file"):
        open_data(f"{files},images-in=memory://nothing/*.tar")


def test_images_and_tar_files_of_a_server(both: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    files, _ = both
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(files / "train", "train")
    served = {f"/train/{path.name}": path.read_bytes() for path in (files / "train").iterdir()}
    expected = batches(files)
    shutil.rmtree(files / "train")
    with serving(served | {"/all.tar": (tmp_path / "all.tar").read_bytes()}) as server:
        assert batches(f"{files},images-in={server.address}/all.tar") == expected
        server.asked.clear()
        assert batches(f"{files},images-in={server.address}/all.tar", workers=1) == expected
        for images in ("/train", "/nothing"):
            data = open_data(f"{files},images-in={server.address}{images}")
            if images == "/train":
                assert np.array_equal(data.load_image(1), open_data(f"{files},images-in={server.address}/all.tar").load_image(1))
            else:
                with pytest.raises(ValueError, match=r"there is no file http://.*/nothing/train-1\.jpg"):
                    data.load_image(1)


def test_what_cannot_be_reached_is_one_line(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, _ = both
    with pytest.raises(SystemExit) as left:
        main(["check", f"{files},images-in={closed_port()}/all.tar"])
    assert left.value.code == 1 and "127.0.0.1 cannot be reached" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"cannot read s4://bucket.*: Protocol not known"):
        open_data(f"{files},images-in=s4://bucket/*.tar")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ValueError, match=r"memory://train needs the package fsspec: pip install 'steadydetr\[fsspec\]'"):
        open_data(f"{files},images-in=memory://train").load_image(0)


def test_only_data_of_files_have_images_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data shapes has no image files, so images-in=a\.tar means nothing there"):
        open_data("shapes,images-in=a.tar")
    with pytest.raises(ValueError, match=r"no layout of data was recognised\. Found there: nothing\. What was looked for"):
        open_data(f"{tmp_path},images-in=a.tar")
    with pytest.raises(ValueError, match=r"nowhere: there is no such folder; a data set is"):
        open_data(f"{tmp_path}/nowhere,images-in=a.tar")
