"""The one reader of image files: every kind of pixel, whichever way up, and nothing that is no image."""

import io
import os
import struct
import subprocess

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from fairref.errors import UserError
from fairref.files.images import read_image, read_rgba

# EXIF 2.3, table of tag 274: what the file's first row and first column show of the scene, for "F" seen upright
F = np.array([[9, 9, 9], [9, 0, 0], [9, 9, 0], [9, 0, 0], [9, 0, 0]], np.uint8) * 28
AS_STORED = {
    1: F,  # top, left
    2: F[:, ::-1],  # top, right
    3: F[::-1, ::-1],  # bottom, right
    4: F[::-1],  # bottom, left
    5: F.T,  # left, top
    6: F.T[::-1],  # right, top: the first row is the scene's right side, the first column its top
    7: F.T[::-1, ::-1],  # right, bottom
    8: F.T[:, ::-1],  # left, bottom
}


def values(path, mode="RGB"):
    return np.asarray(read_image(path, mode))


def grey(path):
    x = values(path)
    assert x.dtype == np.uint8 and (x == x[..., :1]).all()
    return x[..., 0]


@pytest.mark.parametrize("kind", ["png", "webp", "tif", "16.png"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_an_image_stands_as_its_camera_says(tmp_path, orientation, kind):
    stored, mark = AS_STORED[orientation], Image.Exif()
    mark[274] = orientation
    stored = stored.astype(np.uint16) * 257 if kind == "16.png" else np.repeat(stored[..., None], 3, 2)
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{kind}", exif=mark, lossless=True)
    np.testing.assert_array_equal(grey(tmp_path / f"a.{kind}"), F)


def test_a_photograph_of_a_camera_stands_as_it_says(tmp_path):
    mark = Image.Exif()
    mark[274] = 6
    stored = np.kron(AS_STORED[6], np.ones((16, 16), np.uint8))
    Image.fromarray(stored).save(tmp_path / "a.jpg", exif=mark, quality=100)
    assert abs(grey(tmp_path / "a.jpg")[8::16, 8::16].astype(int) - F).max() <= 2


GREY16 = np.array([[0, 128, 129, 257], [32767, 32768, 65406, 65535]], np.uint16)
GREY8 = np.array([[0, 0, 1, 1], [127, 128, 254, 255]], np.uint8)  # GREY16 / 257, to the nearest


def tiff(data, shape, order="<", bits=16, photometric=1, format_=1):
    """An uncompressed TIFF file of one grey value a pixel, written by hand."""
    tags = {256: shape[1], 257: shape[0], 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: shape[0],
            279: len(data), 339: format_}  # fmt: skip
    rows = b"".join(struct.pack(order + "HHIHxx", tag, 3, 1, value) for tag, value in tags.items())
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + rows + bytes(4)


def test_grey_of_16_bits_is_scaled(tmp_path):
    np.testing.assert_array_equal(np.round(GREY16 / 65535 * 255), GREY8)
    Image.fromarray(GREY16).save(tmp_path / "a.png")
    (tmp_path / "b.tif").write_bytes(tiff(GREY16.astype("<u2").tobytes(), GREY16.shape))
    (tmp_path / "c.tif").write_bytes(tiff(GREY16.astype(">u2").tobytes(), GREY16.shape, ">"))
    for name in ("a.png", "b.tif", "c.tif"):
        np.testing.assert_array_equal(grey(tmp_path / name), GREY8)


def test_grey_of_12_bits_is_scaled_by_them(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(bytes.fromhex("000800fff0"), (1, 3), bits=12))
    np.testing.assert_array_equal(grey(tmp_path / "a.tif"), [[0, 128, 255]])


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_tiff_whose_zero_is_white_is_turned_round(tmp_path, bits):
    array = {8: GREY8, 16: GREY16.astype("<u2"), 32: (GREY8 / 255).astype("<f4")}[bits]
    file = tiff(array.tobytes(), array.shape, bits=bits, photometric=0, format_=3 if bits == 32 else 1)
    (tmp_path / "a.tif").write_bytes(file)
    np.testing.assert_array_equal(grey(tmp_path / "a.tif"), 255 - GREY8)


def test_floats_are_in_0_to_1(tmp_path):
    Image.fromarray((GREY8 / 255).astype(np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(grey(tmp_path / "a.tif"), GREY8)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([[0.0, 255.0]], np.float32), "its pixels go from 0 to 255, expected 0 to 1"),
        (np.array([[-0.5, 1.0]], np.float32), "its pixels go from -0.5 to 1, expected 0 to 1"),
        (np.array([[np.nan, 1.0]], np.float32), "its pixels go from nan to nan, expected 0 to 1"),
        (np.array([[0, 70000]], np.int32), "whole numbers of unknown range; save it with 8 or 16 bits"),
    ],
)
def test_pixels_of_unknown_range_are_refused(tmp_path, array, said):
    Image.fromarray(array).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: can't be read as an image \(.*" + said):
        read_image(tmp_path / "a.tif")


def test_other_kinds_of_pixels(tmp_path):
    bits = np.array([[0, 255, 255]], np.uint8)
    Image.fromarray(bits).convert("1").save(tmp_path / "1.png")
    np.testing.assert_array_equal(grey(tmp_path / "1.png"), bits)

    Image.fromarray(np.array([[[40, 255], [40, 0], [40, 51]]], np.uint8), "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(grey(tmp_path / "la.png"), [[40, 255, 212]])  # 40 x .2 + 255 x .8
    found = read_rgba(tmp_path / "la.png") * 255
    torch.testing.assert_close(
        found[0], torch.tensor([[40.0, 40, 40, 255], [40, 40, 40, 0], [40, 40, 40, 51]])
    )

    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    palette.putdata([1, 0, 2])
    for name, transparent in (("p.png", 2), ("p.gif", 2), ("q.png", bytes((255, 255, 0)))):
        palette.save(tmp_path / name, transparency=transparent)
        np.testing.assert_array_equal(
            values(tmp_path / name), [[[200, 100, 50], [10, 20, 30], [255, 255, 255]]]
        )
        assert read_rgba(tmp_path / name)[0, :, 3].tolist() == [1, 1, 0]
    palette.save(tmp_path / "p.bmp")
    np.testing.assert_array_equal(values(tmp_path / "p.bmp")[0, 2], [0, 0, 0])

    rgb = np.array([[[255, 0, 0], [1, 2, 3]]], np.uint8)
    Image.fromarray(rgb).save(tmp_path / "t.png", transparency=(255, 0, 0))
    np.testing.assert_array_equal(values(tmp_path / "t.png"), [[[255, 255, 255], [1, 2, 3]]])
    np.testing.assert_array_equal(values(tmp_path / "t.png", "RGBA")[..., 3], [[0, 255]])


@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_cmyk_is_ink_on_white(tmp_path, kind):
    ink = np.full((16, 16, 4), (0, 128, 255, 51), np.uint8)  # a dim orange
    Image.fromarray(ink, "CMYK").save(tmp_path / f"a.{kind}", quality=100)
    wanted = (1 - ink[0, 0, :3] / 255) * (1 - ink[0, 0, 3] / 255) * 255
    assert abs(values(tmp_path / f"a.{kind}")[8, 8] - wanted).max() <= 3


def test_of_several_frames_the_first_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.tif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_array_equal(values(tmp_path / name), np.asarray(frames[0]))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_named_jpg_starts_no_program(tmp_path, monkeypatch):
    started = []

    class Popen:
        def __init__(self, command, **_):
            started.append(command)
            raise OSError("no program is started in this test")

    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(OSError, match="no program"), Image.open(tmp_path / "a.jpg") as image:
        image.load()
    assert started.pop()[0] == "gs" and not started  # Pillow alone does it
    with pytest.raises(
        UserError, match=r"a\.jpg: can't be read as an image \(its content is of another kind\)"
    ):
        read_image(tmp_path / "a.jpg")
    assert not started


def test_a_name_says_nothing_and_content_all(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.jpg", "PNG")
    assert values(tmp_path / "a.jpg")[0, 0].tolist() == [255, 0, 0]
    for kind in ("PPM", "TGA", "ICNS", "PDF"):
        Image.new("RGB", (16, 16)).save(tmp_path / "b.png", kind)
        with pytest.raises(UserError, match="another kind"):
            read_image(tmp_path / "b.png")


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a.png")  # to open it would be to wait for a writer
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    for path, said in (
        (tmp_path / "a.png", "it is no regular file"),
        ("/dev/zero", "it is no regular file"),
        (tmp_path, "it is no regular file"),
        ("nowhere.png", "there is no such file"),
    ):
        with pytest.raises(UserError, match=said):
            read_image(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """40,000 x 40,000 pixels in a GIF file of 1 kB."""
    small = io.BytesIO()
    Image.new("L", (1, 1)).save(small, "gif")
    size = (40_000).to_bytes(2, "little") * 2
    (tmp_path / "a.gif").write_bytes(small.getvalue()[:6] + size + small.getvalue()[10:])
    with pytest.raises(UserError, match=r"a\.gif: can't be read .*1600000000 pixels.* exceeds limit"):
        read_image(tmp_path / "a.gif")
