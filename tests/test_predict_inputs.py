"""What `predict` takes, and what can be done with what it gives."""

from __future__ import annotations

import csv
import io
import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import steadydetr
from steadydetr.checkpoints.card import DetectorCard
from steadydetr.checkpoints.folder import save_detector
from steadydetr.cli import main
from steadydetr.cli.predict import PredictArguments
from steadydetr.data import FixedSize, ShortestSide
from steadydetr.data.images import open_picture
from steadydetr.drawing.boxes import class_colour, draw_boxes
from steadydetr.tools.detections import THRESHOLD, Detections
from steadydetr.tools.image_files import predict_files
from steadydetr.tools.predictor import Predictor
from tests.conftest import DETECTORS, make_method

NAMES = ("disc", "square", "triangle", "cross", "ring")
COLOURS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)  # [H, W, 3]
GREY = COLOURS[..., 0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "detector"
    card = DetectorCard(DETECTORS["dino"], NAMES, (1, 2, 3, 4, 5), FixedSize(64, 64), top=9)
    save_detector(folder, make_method(DETECTORS["dino"]).student.state_dict(), card)
    return folder


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return steadydetr.load(checkpoint, "cpu")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(COLOURS).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Five frames, each of one grey that is lighter than the one before."""
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(5):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (40 * number,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def served(photo: Path) -> Iterator[str]:
    """The address of a server of the photo's folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(photo.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# what stands for an image


def test_every_way_to_give_an_image_gives_the_same_pixels(photo: Path, served: str) -> None:
    pixels = torch.from_numpy(COLOURS).permute(2, 0, 1)
    with open(photo, "rb") as file:
        ways = [photo, str(photo), photo.read_bytes(), bytearray(photo.read_bytes()), file, io.BytesIO(photo.read_bytes())]
        ways += [f"{served}/photo.png", COLOURS, Image.fromarray(COLOURS), pixels, pixels / 255, (pixels / 255).double().requires_grad_()]
        for way in ways:
            assert np.array_equal(np.asarray(open_picture(way)), COLOURS), way


def test_grey_is_the_same_in_all_channels() -> None:
    grey = np.repeat(GREY[..., None], 3, 2)
    for way in (GREY, GREY[..., None], torch.from_numpy(GREY), torch.from_numpy(GREY)[None], Image.fromarray(GREY)):
        assert np.array_equal(np.asarray(open_picture(way)), grey)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (COLOURS.astype(np.float32), r"an image array must be \[H, W, 3\] RGB or .* of uint8, not \[12, 20, 3\] float32"),
        (COLOURS.transpose(2, 0, 1), r"not \[3, 12, 20\] uint8"),
        (COLOURS[None], r"not \[1, 12, 20, 3\] uint8; give several images as a list"),
        (np.zeros((0, 5, 3), np.uint8), r"not \[0, 5, 3\]"),
        (np.zeros(3, np.uint8), r"not \[3\]"),
        (torch.zeros(12, 20, 3), r"an image tensor must be \[3, H, W\] RGB .*, not \[12, 20, 3\] float32"),
        (torch.zeros(2, 3, 12, 20), r"not \[2, 3, 12, 20\] float32; give several"),
        (torch.zeros(3, 12, 20, dtype=torch.int64), r"not \[3, 12, 20\] int64"),
        (torch.full((3, 12, 20), 255.0), "this one has values from 255 to 255"),
        (torch.full((3, 12, 20), torch.nan), "this one has values from nan to nan"),
        (b"abc", "cannot read the image in 3 bytes: it is damaged, or none of BMP"),
        (io.BytesIO(b"x"), r"cannot read the image in the open file BytesIO: it is damaged"),
        (io.StringIO("x"), "it gives text; open it with 'rb'"),
        ("", "is a folder"),
        ("absent.png", r"there is no image absent\.png"),
        ("absent.mp4", r"there is no video absent\.mp4"),
    ],
)
def test_what_is_no_image_is_one_sentence(image: Any, message: str, predictor: Predictor) -> None:
    for given in (image,) if isinstance(image, str) else (image, [image]):
        with pytest.raises(ValueError, match=message):
            predictor.predict(given)


@pytest.mark.parametrize("image", [None, 3, {"a": 1}, {1}, object(), [None], [[COLOURS]], [3.5]])
def test_what_could_be_no_image_is_a_type_error(image: Any, predictor: Predictor) -> None:
    with pytest.raises(TypeError, match="an image is a path, an address"):
        predictor.predict(image)


def test_addresses_that_cannot_be_fetched_are_one_sentence(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/photo.png"
    for address in (nobody, "http://no-such-host.invalid/photo.png", f"{served}/absent.png", "http://", "https://[", f"{served}/a b"):
        with pytest.raises(ValueError, match=r"^cannot fetch http.*\. Without a network, give a file instead$"):
            open_picture(address)


def test_a_server_that_dawdles_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            while not ended.wait(0.05):  # always something, never all
                self.wfile.write(b"x")

    ended = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("steadydetr.data.picture_inputs.FETCH_SECONDS", 0.3)
    try:
        with pytest.raises(ValueError, match=r"cannot fetch http.*: it takes more than 0\.3 seconds"):
            open_picture(f"http://127.0.0.1:{server.server_port}/photo.png")
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


def test_detections_do_not_depend_on_the_others_of_the_list(checkpoint: Path) -> None:
    predictor = steadydetr.load(checkpoint, "cpu")
    predictor = Predictor(
        predictor.detector, DetectorCard(DETECTORS["dino"], NAMES, (1, 2, 3, 4, 5), ShortestSide(32, 64), top=9), predictor.device
    )
    pictures = [torch.rand(3, height, 20) for height in (20, 30, 15)]
    for picture, among_others in zip(pictures, predictor.predict(pictures, 0), strict=True):
        alone = predictor.predict(picture, 0)
        assert torch.equal(alone.scores, among_others.scores) and torch.equal(alone.boxes_xyxy, among_others.boxes_xyxy)
    assert predictor.predict([]) == [] and len(predictor.predict(iter(pictures))) == 3


def test_a_long_list_is_opened_a_batch_at_a_time(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of thousands of photos needs no more memory than one of a few."""
    batches, taken = [], []
    original = Predictor._sample
    monkeypatch.setattr(Predictor, "_sample", lambda self, picture: taken.append(picture) or original(self, picture))
    collate = steadydetr.tools.predictor.collate
    monkeypatch.setattr(steadydetr.tools.predictor, "collate", lambda some: batches.append((len(some), len(taken))) or collate(some))
    assert len(predictor.predict((torch.rand(3, 12, 20) for _ in range(7)), 0, batch_size=3)) == 7
    assert batches == [(3, 3), (3, 6), (1, 7)]
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        predictor.predict([COLOURS], batch_size=0)


@pytest.mark.parametrize("threshold", [None, "0.5", 50, -0.1, float("nan")])
def test_a_threshold_is_a_score(threshold: Any, predictor: Predictor) -> None:
    with pytest.raises(ValueError, match=r"threshold .* must be a number in 0 to 1: it is a score"):
        predictor.predict(COLOURS, threshold)


def test_addresses_with_blanks_and_foreign_letters(served: str, photo: Path) -> None:
    named = photo.with_name("föto 1.png")
    photo.rename(named)
    for written in ("föto 1.png", "f%C3%B6to%201.png", "föto 1.png?größe=1&x=%20"):
        assert np.array_equal(np.asarray(open_picture(f"{served}/{written}")), COLOURS)


def test_a_path_may_begin_at_home(photo: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(photo.parent))
    assert np.array_equal(np.asarray(open_picture("~/photo.png")), COLOURS)
    assert predict_files(predictor, ["~/photo.png"], tmp_path / "out", draw=False).images == 1


# videos


def test_a_video_is_predicted_frame_by_frame(video: Path, predictor: Predictor) -> None:
    pairs = list(predictor.predict_video(video, 0, batch_size=2))
    assert [np.asarray(picture).mean().round(-1) for picture, _ in pairs] == [0, 40, 80, 120, 160]
    for given in (video, str(video)):
        found = predictor.predict(given, 0)
        assert len(found) == 5 and all(torch.equal(a.scores, b.scores) for a, (_, b) in zip(found, pairs, strict=False))


def test_videos_of_the_command_line(checkpoint: Path, predictor: Predictor, video: Path, photo: Path, served: str, tmp_path: Path) -> None:
    """Every frame has an id of its own and a picture; a damaged one is named and costs nothing else; addresses are images too."""
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    report = predict_files(predictor, [tmp_path, f"{served}/photo.png", f"{served}/absent.png"], tmp_path / "out", batch_size=3)
    assert report.images == 7 and len(report.failures) == 2
    assert "bad.mp4" in report.failures[0] and "cannot fetch" in report.failures[1]
    rows = json.loads((tmp_path / "out/results.json").read_text())
    frames = {(row["image_id"], row["frame"]) for row in rows if row["file_name"] == str(video)}
    assert sorted(frame for _, frame in frames) == [1, 2, 3, 4, 5]
    assert len({row["image_id"] for row in rows}) == 7 and len(rows) == 7 * 9
    assert {path.name for path in (tmp_path / "out/clip_frames").iterdir()} == {f"00000{n}.png" for n in range(1, 6)}
    assert (tmp_path / "out/photo.png").exists() and (tmp_path / "out/photo_png.png").exists()
    main(["predict", str(checkpoint), str(video), f"{served}/photo.png", "--output", str(tmp_path / "again"), "--device", "cpu"])
    assert len(json.loads((tmp_path / "again/results.json").read_text())) == 6 * 9


def test_a_video_that_breaks_off_gives_the_frames_before(video: Path, predictor: Predictor, tmp_path: Path) -> None:
    content = video.read_bytes()
    (tmp_path / "sound.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read the video .*sound\.mp4: "):
        predictor.predict(tmp_path / "sound.mp4")
    video.write_bytes(content[: len(content) * 2 // 3])
    report = predict_files(predictor, [video], tmp_path / "out", draw=False)
    assert 0 < report.images < 5


def test_without_pyav_the_extra_is_named(video: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'steadydetr\[video\]'"):
        predictor.predict(video)


# predictor and detections


def test_a_predictor_is_called_and_keeps_evaluation_mode(predictor: Predictor, photo: Path) -> None:
    found = predictor(photo, threshold=0)
    assert len(found) == 9
    predictor.detector.train()
    again = predictor(photo, threshold=0)
    predictor.detector.eval()
    assert torch.equal(again.scores, found.scores) and torch.equal(again.boxes_xyxy, found.boxes_xyxy)
    assert repr(predictor) == "Predictor(DINO, 5 classes, FixedSize(height=64, width=64), on cpu)"


def test_only_likely_detections_are_given_unless_all_are_asked_for(predictor: Predictor, photo: Path, tmp_path: Path) -> None:
    everything = predictor.predict(photo, threshold=0)
    assert len(everything) == 9 and len(predictor.predict(photo)) == int((everything.scores >= THRESHOLD).sum())
    assert len(predictor.predict(photo, threshold=1)) == 0
    assert PredictArguments.threshold == THRESHOLD
    assert predict_files(predictor, [photo], tmp_path / "out").detections == 9


@pytest.fixture
def found() -> Detections:
    boxes = torch.tensor([[-2.0, 1.0, 5.0, 6.0], [3.0, 4.0, 30.0, 14.0], [0.0, 0.0, 20.0, 12.0]])
    return Detections(boxes, torch.tensor([0.9, 0.5, 0.25]), torch.tensor([1, 0, 1]), ("cat", "dog"), (12, 20))


def test_detections_are_a_sequence(found: Detections) -> None:
    assert [(d.class_name, d.score) for d in found] == [("dog", pytest.approx(0.9)), ("cat", 0.5), ("dog", 0.25)]
    assert found[0].box_xyxy == (-2, 1, 5, 6) and found[-1] == found[2] == list(found)[2] == found[torch.tensor(2)] == found[np.int64(2)]
    assert found[1:].class_names == ["cat", "dog"] and found[[2, 0]].scores.tolist() == found.scores[[2, 0]].tolist()
    for mask in (found.scores < 0.8, (found.scores < 0.8).numpy(), [False, True, True]):
        assert found[mask].class_names == ["cat", "dog"]
    assert len(found[[]]) == len(found[5:]) == 0
    for wrong in (3, -4):
        with pytest.raises(IndexError):
            found[wrong]


def test_detections_are_filtered_and_clipped(found: Detections) -> None:
    assert found.above(0.5).class_names == ["dog", "cat"] and found.of_classes("dog").scores.tolist() == found.scores[[0, 2]].tolist()
    assert len(found.of_classes()) == 0 and len(found.of_classes("cat", "dog")) == 3
    with pytest.raises(ValueError, match=r"there is no class 'dgo'; did you mean 'dog'\?"):
        found.of_classes("dgo")
    assert found.clipped().boxes_xyxy.tolist() == [[0, 1, 5, 6], [3, 4, 20, 12], [0, 0, 20, 12]]


def test_detections_are_written_down(found: Detections) -> None:
    assert json.loads(found.to_json()) == found.to_dicts()
    assert found.to_dicts()[1] == {"class_name": "cat", "label": 0, "score": 0.5, "box_xyxy": [3, 4, 30, 14]}
    assert found.to_columns()["x0"] == [-2, 3, 0] and found.to_columns()["class_name"] == ["dog", "cat", "dog"]
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert rows[1] == {"class_name": "cat", "label": "0", "score": "0.5", "x0": "3.0", "y0": "4.0", "x1": "30.0", "y1": "14.0"}
    none = found[[]]
    assert none.to_dicts() == [] and none.to_json() == "[]" and set(map(len, none.to_columns().values())) == {0} and not list(none)
    assert len(none.to_csv().splitlines()) == 1
    assert repr(found) == "Detections(2 dog, 1 cat; scores 0.25 to 0.90)" and repr(none) == "Detections(none)"


def test_the_highest_score_is_drawn_above_the_others() -> None:
    boxes = [[2.0, 2.0, 60.0, 60.0]] * 2
    drawn = draw_boxes(Image.new("RGB", (80, 80)), boxes, [0, 1], ["", ""])
    assert drawn.getpixel((2, 30)) == class_colour(0)


def test_a_folder_gives_its_images_of_every_format(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is opened by its name is found in a folder too. What became of it, and where the pictures lie, is said."""
    (tmp_path / "photos").mkdir()
    for number, name in enumerate(["a.gif", "b.jfif", "c.ppm", "d.JPG", "e.pgm"]):
        picture = Image.fromarray(COLOURS).convert("L" if name.endswith("pgm") else "RGB")
        picture.save(tmp_path / "photos" / name, "JPEG" if number in (1, 3) else None)
    main(["predict", str(checkpoint), str(tmp_path / "photos"), "--output", str(tmp_path / "found"), "--threshold", "1"])
    assert sorted(p.name for p in (tmp_path / "found").glob("*.png")) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    said = capsys.readouterr().out
    assert f"Pictures in {tmp_path / 'found'} show the 0 with a score of at least 1; a lower --threshold shows more" in said


@pytest.mark.parametrize("address", ["ftp://example.org/a.jpg", "file:///etc/hostname", "s3://bucket/a.jpg"])
def test_addresses_of_other_kinds_are_not_fetched(address: str, checkpoint: Path, predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot fetch {address}: only addresses of http and https are taken"):
        predictor(address)
    assert "only addresses of http" in predict_files(predictor, [address], tmp_path / "found").failures[0]
