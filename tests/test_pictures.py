"""Image files of every kind are decoded by one function, for training, evaluation, `check` and `predict` alike."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from steadydetr.data import images, open_data
from steadydetr.data.check import check_data
from steadydetr.data.images import TURNS, decode_picture, decode_reduced, open_picture, picture_size
from steadydetr.limits import DEFAULT_LIMITS
from tests.data_folders import coco_folder, coco_with, picture

Y, X = np.mgrid[:48, :64]
SMOOTH = np.stack([Y * 4, X * 3, (X + Y) * 2], -1).astype(np.uint8)
KINDS = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {})]


def encoded(form: str, pixels: NDArray[np.generic] = SMOOTH, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_said", set())


@pytest.mark.parametrize(("form", "options"), KINDS)
def test_files_that_miss_their_end_are_read_with_a_remark(
    form: str, options: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = (written(tmp_path / name, content) for name, content in (("whole", encoded(form, **options)), ("cut", b"")))
    cut.write_bytes(whole.read_bytes()[:-30])
    shown, there = (np.asarray(open_picture(path)).astype(int) for path in (cut, whole))
    differs = np.abs(shown - there).max((1, 2)) > (40 if options else 0)
    assert shown.shape == there.shape and differs.mean() < 0.5
    said = [record.getMessage() for record in caplog.records]
    assert (len(said) == 1 and f"{cut} is read, but the file ends too early" in said[0]) or (form == "PNG" and not differs.any())
    assert not decode_picture(whole).cut


@pytest.mark.parametrize(("form", "options"), [kind for kind in KINDS if not kind[1]])
def test_files_that_miss_more_than_a_third_are_named(form: str, options: dict, tmp_path: Path) -> None:
    content = encoded(form, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path = written(tmp_path / "half", content[: len(content) * 11 // 20])
    with pytest.raises(ValueError, match=r"cannot read the image .*half"):
        open_picture(path)


NOISE = np.random.default_rng(1).integers(0, 250, (160, 120))
CUT_MODES = {
    "16 bits": ("PNG", (NOISE * 257).astype(np.uint16)),
    "12 bits": ("PNG", (NOISE * 16).astype(np.uint16)),
    "float of 0 .. 1": ("TIFF", (NOISE / 255).astype(np.float32)),
    "float of another range": ("TIFF", (NOISE + 300.0).astype(np.float32)),
    "1 bit": ("TIFF", NOISE > 125),
    "grey as missing pixels are": ("BMP", np.full((160, 120), images.MISSING, np.uint8)),
}


@pytest.mark.parametrize(("form", "pixels"), CUT_MODES.values(), ids=CUT_MODES)
def test_missing_rows_are_counted_and_change_no_others(form: str, pixels: NDArray[np.generic], tmp_path: Path) -> None:
    content = encoded(form, pixels)
    whole = np.asarray(open_picture(written(tmp_path / "whole", content)))
    cut = decode_picture(written(tmp_path / "cut", content[: len(content) * 3 // 4]))
    same = (np.asarray(cut.image) == whole).all((1, 2))
    assert 0.2 < float(cut.cut.split()[-6].strip("%")) / 100 < 0.3 and same.mean() > 0.7
    with pytest.raises(ValueError, match="truncated"):
        decode_picture(written(tmp_path / "less", content[: len(content) * 3 // 5]))


@pytest.mark.parametrize("height", [8, 16, 24, 32, 64])
def test_one_byte_that_a_jpeg_lacks_is_no_row(height: int, tmp_path: Path) -> None:
    content = encoded("JPEG", np.random.default_rng(0).integers(0, 256, (height, 64, 3), np.uint8))
    assert decode_picture(written(tmp_path / "a.jpg", content[:-1])).cut == "the file ends too early"


def test_progressive_pictures_are_whole_after_their_first_scan(tmp_path: Path) -> None:
    content = encoded("JPEG", progressive=True)
    first, second = [at for at in range(len(content)) if content[at : at + 2] == images.SCAN_OF_JPEG][:2]
    with pytest.raises(ValueError, match="truncated"):
        open_picture(written(tmp_path / "a.jpg", content[: (first + second) // 2]))
    shown = np.asarray(open_picture(written(tmp_path / "b.jpg", content[: second + 20]))).astype(int)
    assert np.abs(shown - SMOOTH).mean() < 12


def test_few_remarks_are_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        for number in range(images.MOST_SAID + 2):
            open_picture(written(tmp_path / f"{number}.jpg", encoded("JPEG")[:-30]))
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * images.MOST_SAID
    assert "Further ones are not named" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(form: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    path = written(tmp_path / "a", encoded(form, exif=exif))
    expected = np.asarray(Image.fromarray(SMOOTH).transpose(TURNS[orientation])).astype(int)
    shown = np.asarray(open_picture(path)).astype(int)
    assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 6
    assert picture_size(path, DEFAULT_LIMITS) == shown.shape[:2]


@pytest.mark.parametrize("content", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x63\0\0\0\0\0\0", b""])
def test_broken_exif_is_no_orientation(content: bytes, tmp_path: Path) -> None:
    assert decode_picture(written(tmp_path / "a.jpg", encoded("JPEG", exif=content))).orientation == 1


def test_pillow_warns_nobody(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Of metadata that end too early, or of a palette with transparency, whose colours stay."""
    palette = Image.fromarray(SMOOTH).convert("P")
    written(tmp_path / "exif.jpg", encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05garbage"))
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    for name in ("exif.jpg", "palette.png"):
        open_picture(tmp_path / name)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "palette.png")), np.asarray(palette.convert("RGB")))
    assert not [str(warning.message) for warning in recwarn]


def test_a_pillow_image_stays_as_its_owner_sees_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    with Image.open(written(tmp_path / "a.png", encoded("PNG", exif=exif))) as opened:
        assert np.array_equal(np.asarray(open_picture(opened)), SMOOTH) and open_picture(opened) is not opened


GREY = SMOOTH[..., 0]
DEEP = {
    "16 bits": (GREY.astype(np.uint16) * 257, GREY),
    "12 bits": (GREY.astype(np.uint16) * 16 + 15, (GREY * 16.0 + 15) / 4095 * 255),
    "8 bits in 16": (GREY.astype(np.uint16), GREY),
    "float of 0 .. 1": (GREY.astype(np.float32) / 255, GREY),
    "float of 0 .. 255": (GREY.astype(np.float32), GREY),
    "float of any range": (GREY.astype(np.float32) * 7 - 500, (GREY - GREY.min()) / np.ptp(GREY) * 255),
    "32 bits": (GREY.astype(np.int32) * 70_000 - 9, (GREY - GREY.min()) / np.ptp(GREY) * 255),
}


@pytest.mark.parametrize("kind", DEEP)
def test_pixels_of_more_than_8_bits_are_scaled(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values, expected = DEEP[kind]
    forms = ("TIFF", "PNG") if values.dtype == np.uint16 else ("TIFF",)
    for form in forms:
        shown = np.asarray(open_picture(written(tmp_path / form, encoded(form, values))))
        assert np.abs(shown - np.round(expected)[..., None]).max() <= 1, form
        assert "scaled to 0 .. 255" in caplog.records[-1].getMessage()
    assert np.array_equal(np.asarray(open_picture(Image.fromarray(values))), shown)


def test_values_that_are_not_finite_are_black(tmp_path: Path) -> None:
    values = GREY.astype(np.float32) / 255
    values[0, :3] = np.nan, np.inf, -np.inf
    assert not np.asarray(open_picture(written(tmp_path / "a.tif", encoded("TIFF", values))))[0, :3].any()


def turned_folder(root: Path, orientation: int = 6, **changes: object) -> Path:
    """Two pictures of 8 x 6 stored pixels, the first with an orientation."""
    coco_folder(root, coco_with(**changes), ("train", "val"))
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    for split in ("train", "val"):
        picture(root / split / "1.png", exif=exif)
    return root


def of_images(root: Path) -> list[tuple[str, bool, str]]:
    return [(f.kind, f.fatal, f.message) for f in check_data(root, ("train",)).findings]


def test_annotated_sizes_decide_whether_a_picture_is_turned(tmp_path: Path) -> None:
    turned = turned_folder(tmp_path / "turned", image={"width": 6, "height": 8})
    assert open_data(turned).load_image(0).shape == (8, 6, 3) and not of_images(turned)
    unknown = turned_folder(tmp_path / "unknown", image={"width": None})
    assert open_data(unknown).load_image(0).shape == (8, 6, 3) and not of_images(unknown)
    stored = turned_folder(tmp_path / "stored")
    assert open_data(stored).load_image(0).shape == (6, 8, 3)
    ((kind, fatal, message),) = of_images(stored)
    assert (kind, fatal) == ("image not turned", False) and "EXIF orientation 6" in message and "as it is stored, 8 x 6" in message


def test_boxes_that_fit_only_the_other_picture_are_named(tmp_path: Path) -> None:
    root = turned_folder(tmp_path, annotation={"bbox": [0, 2, 3, 6]})
    with pytest.raises(ValueError, match=r"1\.png .*boxes fit only the picture turned as its EXIF orientation 6 says, 6 x 8: swap width"):
        open_data(root).load_image(0)
    (kind, fatal, message), *_ = of_images(root)[::-1]
    assert (kind, fatal) == ("wrong image size", True) and "swap width and height" in message


def test_boxes_that_fit_the_stored_picture_alone_are_named(tmp_path: Path) -> None:
    """Whether the size of the turned picture is annotated or none is."""
    for name, fields in (("turned", {"width": 6, "height": 8}), ("unknown", {"width": None})):
        root = turned_folder(tmp_path / name, image=fields, annotation={"bbox": [0, 0, 8, 6]})
        ((kind, _, message),) = (f for f in of_images(root) if "picture" in f[0])
        assert kind == "boxes of the stored picture" and "turned, 6 x 8, but its boxes fit only the picture as it is stored" in message


def test_other_sizes_than_both_name_the_orientation(tmp_path: Path) -> None:
    root = turned_folder(tmp_path, image={"width": 9})
    with pytest.raises(ValueError, match="has 6 x 8 pixels turned as its EXIF orientation 6 says, its annotation says 9 x 6"):
        open_data(root).load_image(0)


def test_check_says_what_it_read_and_how(tmp_path: Path) -> None:
    """What all images share is one finding; none stops training."""
    root = turned_folder(tmp_path, orientation=3)
    Image.fromarray(np.full((6, 8), 999, np.uint16)).save(root / "train" / "2.png")
    assert [kind for kind, _, _ in of_images(root)] == ["image of more than 8 bits", "turned image"]
    for number in (1, 2):
        Image.fromarray(np.full((6, 8), 999, np.uint16)).save(root / "train" / f"{number}.png")
    (finding,) = check_data(root, ("train",)).findings
    assert finding.entry.startswith("2 images, the first is ") and not finding.fatal
    path = root / "train" / "1.png"
    path.write_bytes(encoded("BMP", np.full((6, 8, 3), 9, np.uint8))[:-30])
    assert ("image cut off", False) in [(kind, fatal) for kind, fatal, _ in of_images(root)]


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("orientation", [1, *TURNS])
@pytest.mark.parametrize("pixels", [SMOOTH[:47, :61], SMOOTH[..., 0]])
def test_reduced_jpegs_are_turned_and_lie_where_the_whole_ones_do(
    reduction: int, orientation: int, pixels: NDArray[np.generic], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[images.ORIENTATION] = orientation
    path = written(tmp_path / "a.jpg", encoded("JPEG", pixels, exif=exif, quality=95))
    whole = open_picture(path)
    found = decode_reduced(path, DEFAULT_LIMITS, whole.size[::-1], reduction)
    assert found is not None and found.shape == (-(-whole.height // reduction), -(-whole.width // reduction), 3)
    # a turned picture begins with the pixel that stands for fewer where the size does not divide
    left, top = (-whole.width % reduction, -whole.height % reduction) if orientation != 1 else (0, 0)
    if not (left or top):
        box = (0, 0, *(side // reduction * reduction for side in whole.size))
        expected = np.asarray(whole.crop(box).reduce(reduction)).astype(int)
        assert np.abs(found[: expected.shape[0], : expected.shape[1]] - expected).mean() < 4


def test_what_cannot_be_reduced_is_left_to_who_decodes_it_whole(tmp_path: Path) -> None:
    def reduced(content: bytes, size: tuple[int, int] = (48, 64)) -> object:
        return decode_reduced(written(tmp_path / "a.jpg", content), DEFAULT_LIMITS, size, 2)

    cmyk = io.BytesIO()
    Image.fromarray(SMOOTH).convert("CMYK").save(cmyk, "JPEG")
    assert reduced(encoded("JPEG")) is not None
    for content in (encoded("PNG"), cmyk.getvalue(), encoded("JPEG")[:-30]):
        assert reduced(content) is None
    assert reduced(encoded("JPEG"), (64, 48)) is None
    with pytest.raises(ValueError, match=r"cannot read the image .*a\.jpg"):
        reduced(b"nonsense")
