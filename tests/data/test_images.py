"""Every kind of image becomes the same upright RGB pixels, or one short reason."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from orchestrator.data.crop_ready import is_available
from orchestrator.data.images import (
    SOURCE_FORMATS,
    ImageError,
    decode,
    decode_image,
    encode_image,
    shrink,
)
from orchestrator.data.pack import ImageRules, store_image

LIMIT = 1_000_000
QUARTERS = np.zeros((16, 24, 3), np.uint8)
QUARTERS[:8, :12], QUARTERS[:8, 12:], QUARTERS[8:, :12] = (250, 10, 10), (10, 250, 10), (10, 10, 250)
KEEP = ImageRules(format="keep", quality=None, max_side=None, max_pixels=LIMIT)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_by_hand(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """Pillow writes no 16-bit RGB and no header that lies."""

    def chunk(tag: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_plain_image_keeps_its_pixels_and_has_no_note(kind: str):
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    pixels, notes = decode_image(encoded(Image.fromarray(QUARTERS), kind, **options), LIMIT)
    assert notes == frozenset()
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - QUARTERS).max() <= (12 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_undone_for_each_of_the_eight_turns(orientation: int, kind: str):
    upright = np.kron(np.arange(6).reshape(2, 3), np.ones((8, 8)))[..., None].repeat(3, 2).astype(np.uint8) * 50
    stored = {  # how a camera stores `upright` under each orientation (EXIF 2.3, table of tag 274)
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = decode(
        encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options), LIMIT, SOURCE_FORMATS
    )
    assert ("exif" in image.notes) == (orientation > 1)
    assert image.pixels.shape == upright.shape
    assert np.abs(image.pixels.astype(int) - upright).max() <= 6


def test_sixteen_bit_gray_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 129, 257, 32768, 65278, 65535]], np.uint16)
    pixels, notes = decode_image(encoded(Image.fromarray(values), "PNG"), LIMIT)
    assert notes == {"16bit", "gray"}
    assert pixels[0, :, 0].tolist() == [round(v * 255 / 65535) for v in values[0].tolist()]


def test_sixteen_bit_rgb_is_noticed_and_scaled():
    row = b"\0" + struct.pack(">6H", 65535, 0, 32768, 257, 4096, 65280)
    pixels, notes = decode_image(png_by_hand(2, 1, 16, 2, row), LIMIT)
    assert notes == {"16bit"}
    assert pixels[0].tolist() == [[255, 0, 128], [1, 16, 255]]


def test_cmyk_jpeg_shows_the_colours_it_was_made_from():
    pixels, notes = decode_image(encoded(Image.fromarray(QUARTERS).convert("CMYK"), "JPEG", quality=98), LIMIT)
    assert notes == {"cmyk"}
    assert np.abs(pixels[2, 2].astype(int) - (250, 10, 10)).max() < 12
    assert np.abs(pixels[2, -3].astype(int) - (10, 250, 10)).max() < 12


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    image = decode(data, LIMIT, SOURCE_FORMATS)
    assert "animated" in image.notes
    assert (image.pixels == (255, 0, 0)).all()


def test_transparency_is_laid_on_white():
    half = Image.new("RGBA", (2, 1))
    half.putpixel((0, 0), (200, 0, 0, 0))
    half.putpixel((1, 0), (200, 0, 0, 255))
    pixels, notes = decode_image(encoded(half, "PNG"), LIMIT)
    assert notes == {"alpha"}
    assert pixels.tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_a_palette_is_resolved_and_gray_gets_three_equal_channels():
    pixels, notes = decode_image(encoded(Image.fromarray(QUARTERS).quantize(4), "PNG"), LIMIT)
    assert notes == {"palette"}
    assert np.abs(pixels[1, 1].astype(int) - (250, 10, 10)).max() <= 4
    pixels, notes = decode_image(encoded(Image.new("L", (3, 3), 77), "PNG"), LIMIT)
    assert notes == {"gray"}
    assert (pixels == 77).all()


@pytest.mark.parametrize("kind", SOURCE_FORMATS)
def test_every_cut_of_an_image_is_refused_without_another_exception(kind: str):
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for share in (0.02, 0.1, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match=r"truncated|damaged|not a readable"):
            decode(data[: int(len(data) * share)], LIMIT, SOURCE_FORMATS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"<html>no image</html>" * 9, "not a readable"),
        (png_by_hand(60_000, 60_000, 8, 2, b"\0"), r"claims 60,000 x 60,000 pixels, at most 1,000,000"),
        (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "no fixed range"),
    ],
)
def test_what_cannot_be_used_says_why(data: bytes, reason: str):
    with pytest.raises(ImageError, match=reason):
        decode(data, LIMIT, SOURCE_FORMATS)


def test_shards_may_only_hold_jpeg_png_and_webp():
    with pytest.raises(ImageError, match="not a readable JPEG, PNG, WEBP"):
        decode_image(encoded(Image.fromarray(QUARTERS), "GIF"), LIMIT)


@pytest.mark.parametrize(("height", "width", "side"), [(10, 10, 10), (10, 40, 20), (300, 3, 100), (7, 5, 9)])
def test_shrinking_bounds_the_longer_side_and_keeps_the_shape(height: int, width: int, side: int):
    small = shrink(np.zeros((height, width, 3), np.uint8), side)
    assert max(small.shape[:2]) == min(side, max(height, width))
    assert small.shape[0] == max(1, round(height * max(small.shape[:2]) / max(height, width)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_plain_original_is_stored_byte_for_byte(kind: str):
    data = encoded(Image.fromarray(QUARTERS), kind)
    stored = store_image(data, KEEP)
    assert stored.data is data
    assert (stored.size, stored.conversions) == ("24x16", frozenset())


@pytest.mark.parametrize(
    ("data", "extension", "conversions"),
    [
        (encoded(Image.fromarray(QUARTERS).convert("CMYK"), "JPEG"), "jpg", {"cmyk", "reencoded"}),
        (encoded(Image.fromarray(QUARTERS), "BMP"), "png", {"other_format", "reencoded"}),
        (encoded(Image.fromarray(QUARTERS).convert("RGBA"), "PNG"), "png", {"alpha", "reencoded"}),
        (encoded(Image.fromarray(np.full((4, 4), 999, np.uint16)), "PNG"), "png", {"16bit", "reencoded"}),
    ],
)
def test_a_converted_original_is_stored_as_what_every_reader_understands(
    data: bytes, extension: str, conversions: set[str]
):
    stored = store_image(data, KEEP)
    before = decode(data, LIMIT, SOURCE_FORMATS).pixels
    after, notes = decode_image(stored.data, LIMIT)
    assert (stored.extension, stored.conversions) == (extension, conversions)
    assert notes <= {"gray"}
    assert np.abs(after.astype(int) - before).max() <= (25 if extension == "jpg" else 0)


def test_rules_change_what_is_stored():
    jpeg = encoded(Image.fromarray(QUARTERS), "JPEG")
    assert store_image(jpeg, ImageRules(format="png", quality=None, max_side=None, max_pixels=LIMIT)).extension == "png"
    small = store_image(jpeg, ImageRules(format="keep", quality=None, max_side=12, max_pixels=LIMIT))
    assert (small.size, small.conversions) == ("12x8", {"resized", "reencoded"})
    low, high = (
        len(store_image(jpeg, ImageRules(format="keep", quality=q, max_side=None, max_pixels=LIMIT)).data)
        for q in (5, 100)
    )
    assert low < high


@pytest.mark.parametrize("sampling", [0, 1, 2])
def test_a_jpeg_that_is_encoded_anew_keeps_its_subsampling(sampling: int):
    data = encoded(Image.fromarray(np.kron(QUARTERS, np.ones((2, 2, 1), np.uint8))), "JPEG", subsampling=sampling)
    for rules in (replace(KEEP, quality=80), replace(KEEP, short_side=20), replace(KEEP, max_side=20, crop_ready=True)):
        with Image.open(io.BytesIO(store_image(data, rules).data)) as image:
            assert JpegImagePlugin.get_sampling(image) == sampling
    assert decode(data, LIMIT, SOURCE_FORMATS).subsampling == sampling


def test_what_was_no_jpeg_keeps_its_chroma_whole():
    data = encoded(Image.fromarray(QUARTERS), "PNG")
    with Image.open(io.BytesIO(store_image(data, replace(KEEP, format="jpeg")).data)) as image:
        assert JpegImagePlugin.get_sampling(image) == 0


@pytest.mark.skipif(not is_available(), reason="no compiled kernel here")
def test_a_crop_ready_jpeg_shows_the_pixels_of_the_original_and_says_so():
    noise = np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        data = encoded(Image.fromarray(noise), "JPEG", **options)
        stored = store_image(data, replace(KEEP, crop_ready=True))
        assert (stored.extension, stored.size, stored.conversions) == ("jpg", "120x80", {"crop_ready"})
        assert np.array_equal(decode_image(stored.data, LIMIT)[0], decode_image(data, LIMIT)[0])
        again = store_image(stored.data, replace(KEEP, crop_ready=True))
        assert again.data is stored.data
        assert again.conversions == frozenset()
    png = encoded(Image.fromarray(noise), "PNG")
    assert store_image(png, replace(KEEP, crop_ready=True)).data is png


@pytest.mark.parametrize(
    ("height", "width", "wanted"), [(10, 40, (8, 32)), (300, 3, (300, 3)), (7, 9, (7, 9)), (80, 8, (80, 8))]
)
def test_shrinking_bounds_the_shorter_side_and_never_enlarges(height: int, width: int, wanted: tuple[int, int]):
    assert shrink(np.zeros((height, width, 3), np.uint8), None, 8).shape[:2] == wanted
    assert max(shrink(np.zeros((height, width, 3), np.uint8), 20, 8).shape[:2]) <= 20


def test_encoded_gray_pixels_come_back_exactly():
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    pixels, notes = decode_image(encode_image(values, "PNG", 95), LIMIT)
    assert notes == {"gray"}
    assert (pixels[..., 0] == values).all()


@pytest.mark.parametrize("quality", [50, 90, 94, 95, 100])
def test_noise_without_subsampling_is_encoded_at_every_quality(quality: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (352, 500, 3)).astype(np.uint8)
    assert decode_image(encode_image(noise, "JPEG", quality), 10**6)[0].shape == noise.shape
