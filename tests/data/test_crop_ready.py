"""Crop-ready JPEGs: the same pixels for every decoder, hardly a byte more, and windows that never lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from jpegs import (
    SAMPLINGS,
    by_pillow,
    by_torch,
    decode,
    edge_boxes,
    jobs_of,
    jpeg,
    picture,
    pillow_jpeg,
    random_boxes,
    require_kernel,
)

from orchestrator.data.crop_ready import intervals, is_available, is_ready, make_crop_ready
from orchestrator.data.jpeg import cut_window, parse_jpeg
from orchestrator.data.kernel import DONE, OTHER
from orchestrator.data.wheels import WheelDecoder

SIZES = [(1, 1), (9, 7), (16, 16), (64, 48), (131, 97), (272, 40), (254, 187)]

pytestmark = pytest.mark.skipif(not is_available(), reason="no compiled kernel here")


def photos_of(shared_data: Path, every: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted((shared_data / "imagenet-sample").glob("*/*.JPEG"))[::every]]


def require_same_image(original: bytes, ready: bytes) -> None:
    """By decoders that share no code with the proof made at rewriting."""
    assert np.array_equal(by_pillow(original), by_pillow(ready))
    whole = simplejpeg.decode_jpeg(original, fastdct=False, fastupsample=False)
    assert np.array_equal(whole, simplejpeg.decode_jpeg(ready, fastdct=False, fastupsample=False))


def require_same_crops(original: bytes, ready: bytes, seed: int) -> None:
    """Random boxes: kernel and wheels, from the original and from the crop-ready file, are one and the same."""
    kernel, wheels = require_kernel(), WheelDecoder()
    facts = kernel.describe(ready)
    assert facts is not None
    boxes = random_boxes(facts.width, facts.height, 3, seed)
    flips = [0, 1, 0]
    wanted = decode(kernel, jobs_of([original] * 3, boxes, flips), 96)
    for decoder, data in ((kernel, ready), (wheels, original), (wheels, ready)):
        jobs = jobs_of([data] * 3, boxes, flips)
        assert np.array_equal(decode(decoder, jobs, 96), wanted)
        assert (jobs["status"] == DONE).all()


def check_photos(photos: list[bytes]) -> None:
    before = after = rewritten = 0
    for number, original in enumerate(photos):
        ready = make_crop_ready(original)
        before, after = before + len(original), after + len(ready or original)
        if ready is None:
            continue
        rewritten += 1
        facts = require_kernel().describe(ready)
        assert facts is not None
        assert is_ready(facts)
        assert make_crop_ready(ready) is None
        require_same_image(original, ready)
        require_same_crops(original, ready, number)
    print(f"{rewritten} of {len(photos)} rewritten, {after / before:.4f} x the bytes")
    assert rewritten >= 0.95 * len(photos)
    assert after <= 1.02 * before


def test_real_photos_stay_the_same_in_hardly_more_bytes(shared_data: Path) -> None:
    photos = photos_of(shared_data, 16)
    assert len(photos) >= 60
    check_photos(photos)


@pytest.mark.slow
def test_every_photo_of_the_sample_stays_the_same_in_hardly_more_bytes(shared_data: Path) -> None:
    check_photos(photos_of(shared_data, 1))


@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("sampling", [*SAMPLINGS, "progressive"])
def test_every_kind_and_size_stays_the_same_for_every_decoder(sampling: str, size: tuple[int, int]) -> None:
    from torchvision.io import ImageReadMode, decode_image

    kernel, pixels = require_kernel(), picture(*size)
    original = pillow_jpeg(pixels, progressive=True) if sampling == "progressive" else jpeg(pixels, sampling)
    facts = kernel.describe(original)
    assert facts is not None
    for interval in intervals(facts.columns):
        ready = kernel.rewrite(original, interval)
        assert ready
        described = kernel.describe(ready)
        assert described
        assert (described.interval, described.baseline) == (interval, True)
        assert (described.width, described.height) == size
        require_same_image(original, ready)
        read = [
            decode_image(torch.frombuffer(bytearray(d), dtype=torch.uint8), ImageReadMode.RGB)
            for d in (original, ready)
        ]
        assert torch.equal(*read)
        require_same_crops(original, ready, interval)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_windows_at_every_edge_are_the_pixels_of_the_whole(sampling: str) -> None:
    kernel, wheels = require_kernel(), WheelDecoder()
    original = jpeg(picture(254, 187), sampling)
    columns = (kernel.describe(original) or pytest.fail("no JPEG")).columns
    whole, boxes = by_pillow(original), edge_boxes(254, 187) + random_boxes(254, 187, 20)
    wanted = np.stack([by_torch(whole, box, 40, False) for box in boxes])
    for interval in (d for d in range(1, columns + 1) if columns % d == 0):
        ready = kernel.rewrite(original, interval) or b""
        for decoder in (kernel, wheels):
            assert np.array_equal(decode(decoder, jobs_of([ready] * len(boxes), boxes), 40), wanted)


@pytest.mark.parametrize("cubic", [False, True])
def test_boxes_between_pixels_are_within_a_level_between_kernel_and_wheels(cubic: bool) -> None:
    original = jpeg(picture(254, 187))
    ready = require_kernel().rewrite(original, 4) or b""
    boxes = [(33.5, 0.25, 220.5, 186.75), (0, 0, 254, 187), (100.1, 90.2, 140.3, 120.4)]
    shown = [
        decode(decoder, jobs_of([data] * 3, boxes, clip=False), 48, cubic).astype(int)
        for decoder in (require_kernel(), WheelDecoder())
        for data in (original, ready)
    ]
    assert np.array_equal(shown[0], shown[1])
    assert np.abs(shown[2] - shown[3]).max() <= 1  # Pillow computes boxes in 32 bits, and a window moves them
    assert np.abs(shown[0] - shown[2]).max() <= 1 + cubic


@pytest.mark.parametrize("sampling", ["420", "444", "progressive", "crop-ready", "Gray"])
@pytest.mark.parametrize("clip", [True, False])
def test_large_boxes_by_a_smaller_dct_are_within_a_level_between_kernel_and_wheels(sampling: str, clip: bool) -> None:
    pixels = picture(517, 389)
    data = pillow_jpeg(pixels, progressive=True) if sampling == "progressive" else jpeg(
        pixels, "420" if sampling == "crop-ready" else sampling
    )  # fmt: skip
    if sampling == "crop-ready":
        data = make_crop_ready(data) or b""
    boxes = [(0, 0, 517, 389), (17, 33, 417, 301), (100, 3, 517, 388), (250, 180, 350, 250), (3, 2, 190, 187)]
    boxes = boxes if clip else [tuple(edge * 0.993 + 0.3 for edge in box) for box in boxes]
    for side in (24, 48, 90):
        shown = []
        for decoder in (require_kernel(), WheelDecoder()):
            jobs = jobs_of([data] * len(boxes), boxes, [0, 1, 0, 1, 0], clip=clip)
            jobs["scaled"] = 1
            shown.append(decode(decoder, jobs, side).astype(int))
            assert (jobs["status"] == DONE).all()
        assert np.abs(shown[0] - shown[1]).max() <= 1


@pytest.mark.parametrize(("columns", "wanted"), [
    (1, [1]), (2, [2]), (3, [3]), (4, [4]), (5, [5]), (6, [3, 6]), (7, [7]), (8, [4, 8]), (9, [3, 9]), (10, [5, 10]),
    (14, [7, 14]), (16, [4, 8, 16]), (22, [2, 11, 22]), (23, [1, 23]), (24, [4, 6, 8, 12]), (32, [4, 8, 16, 32]),
    (35, [5, 7, 35]), (49, [7, 49]), (97, [1, 97]),
])  # fmt: skip
def test_the_interval_is_the_divisor_of_a_row_nearest_to_four_then_longer_ones(columns: int, wanted: list[int]) -> None:
    assert intervals(columns) == wanted


def test_a_file_that_would_grow_gets_longer_intervals_or_stays() -> None:
    flat = jpeg(np.full((64, 640, 3), 90, np.uint8), "444", 30)
    ready = make_crop_ready(flat)
    assert ready is None or len(ready) <= 1.02 * len(flat)
    busy = make_crop_ready(jpeg(picture(640, 64), "420", 90)) or b""
    facts = require_kernel().describe(busy)
    assert facts is not None
    assert facts.interval == 4


def test_a_progressive_file_may_grow_and_becomes_sequential() -> None:
    original = pillow_jpeg(picture(320, 240), progressive=True, quality=80)
    ready = make_crop_ready(original)
    assert ready is not None
    facts = require_kernel().describe(ready)
    assert facts is not None
    assert facts.baseline
    assert len(ready) <= 1.25 * len(original)
    require_same_image(original, ready)
    require_same_crops(original, ready, 0)


def test_what_is_ready_or_no_plain_jpeg_is_not_rewritten() -> None:
    data = jpeg(picture(131, 97))
    ready = make_crop_ready(data)
    assert ready is not None
    for other in (ready, ready[:-100], data[:500], b"", b"\x89PNG" * 40, data[: len(data) // 2] + b"\xff\xd9"):
        assert make_crop_ready(other) is None
    odd = require_kernel().rewrite(data, 5)
    assert odd is not None
    assert make_crop_ready(odd) is not None, "9 MCUs of a row are no multiple of 5"


def marks_of(data: bytes) -> list[int]:
    start = data.index(b"\xff\xda") + 14
    return [at for at in range(start, len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]


SPOILT = ("lost", "misnumbered", "doubled", "two swapped", "eight lost")


def spoil(data: bytes, how: str, which: int) -> bytes:
    marks, changed = marks_of(data), bytearray(data)
    at = marks[which]
    match how:
        case "lost":
            del changed[at : at + 2]
        case "misnumbered":
            changed[at + 1] = 0xD0 + (changed[at + 1] - 0xD0 + 3) % 8
        case "doubled":
            changed[at:at] = changed[at : at + 2]
        case "two swapped":
            other = marks[(which + 1) % len(marks)]
            changed[at + 1], changed[other + 1] = changed[other + 1], changed[at + 1]
        case _:
            for mark in reversed(marks[which : which + 8]):
                del changed[mark : mark + 2]
    return bytes(changed)


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("sampling", ["420", "444", "Gray"])
def test_spoilt_markers_never_show_wrong_pixels(how: str, sampling: str) -> None:
    """Either the pixels of the undamaged file, or those that Pillow makes of the damaged one, or left to Pillow."""
    kernel = require_kernel()
    ready = kernel.rewrite(jpeg(picture(256, 200), sampling, 90), 4) or b""
    boxes = edge_boxes(256, 200) + random_boxes(256, 200, 12)
    good = by_pillow(ready)
    left = 0
    for which in np.linspace(0, len(marks_of(ready)) - 1, 9).astype(int).tolist():
        data = spoil(ready, how, which)
        try:
            damaged = by_pillow(data)
        except OSError:
            damaged = good
        for decoder in (kernel, WheelDecoder()):
            jobs = jobs_of([data] * len(boxes), boxes)
            out = decode(decoder, jobs, 24)
            left += int((jobs["status"] == OTHER).sum())
            for row in np.flatnonzero(jobs["status"] == DONE):
                shown = [by_torch(image, boxes[row], 24, False) for image in (good, damaged)]
                assert any(np.array_equal(out[row], pixels) for pixels in shown), (which, boxes[row], decoder)
    assert left, "nothing was noticed"


def test_a_window_is_a_jpeg_of_its_own_and_small() -> None:
    ready = require_kernel().rewrite(jpeg(picture(512, 400), "420", 90), 4) or b""
    header = parse_jpeg(ready)
    assert header is not None
    window = cut_window(ready, header, (200, 100, 260, 160))
    assert window is not None
    assert (window.left, window.top) == (192, 96)
    assert len(window.data) < len(ready) / 4
    assert np.array_equal(by_pillow(window.data).shape, (64, 128, 3))
    assert cut_window(jpeg(picture(64, 64)), header, (0, 0, 9, 9)) is None
