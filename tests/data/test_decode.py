"""Batches of whatever shards hold: fast and exact alike, faults by row, and no row moved by its neighbours."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jpegs import LIMIT, SAMPLINGS, jobs_of, jpeg, picture, pillow_jpeg
from PIL import Image

from orchestrator.compose import compose
from orchestrator.config import DataConfig
from orchestrator.data.crop_ready import is_available
from orchestrator.data.decode import BatchDecoder, ViewsOf, jobs_in_files, read_job, region_decoder
from orchestrator.data.images import decode_image
from orchestrator.data.kernel import Kernel
from orchestrator.data.transforms import BLOCKS, Preprocessing, eval_pixels, eval_views, show, train_views
from orchestrator.keyed import draws
from orchestrator.options import Decode, Interpolation

SIDE = 64
SPEC = Preprocessing(SIDE, 72, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def config() -> DataConfig:
    return compose(["data=imagenet", f"data.image_size={SIDE}", "data.eval_resize=72"]).config.data


def encoded(pixels: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(110, 90, orientation), "JPEG", exif=exif)


@cache
def good_images() -> dict[str, bytes]:
    """Every kind that shards may hold; no crop of them is twice the target, where a smaller DCT would be taken."""
    pixels = picture(120, 100)
    found = {f"jpeg {sampling}": jpeg(picture(120 + i, 100 + i), sampling) for i, sampling in enumerate(SAMPLINGS)}
    found |= {f"turned {turn}": turned(turn) for turn in (1, 2, 3, 6, 8)}
    return found | {
        "progressive": pillow_jpeg(pixels, progressive=True),
        "restarts": pillow_jpeg(pixels, restart_marker_blocks=2),
        "tiny": jpeg(picture(3, 2)),
        "png": encoded(pixels, "PNG"),
        "gray png": encoded(pixels[..., 0].copy(), "PNG"),
        "16 bit": encoded(np.arange(12_000, dtype=np.uint16).reshape(100, 120) * 5, "PNG"),
        "palette": encoded(Image.fromarray(pixels).quantize(16), "PNG"),
        "webp": encoded(pixels, "WEBP", quality=80),
        "cmyk": encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
    }


@cache
def bad_images() -> dict[str, tuple[bytes, str]]:
    whole = jpeg(picture(120, 100))
    return {
        "cut": (whole[: len(whole) // 2], "truncated or damaged"),
        "cut png": (encoded(picture(120, 100), "PNG")[:3000], "truncated or damaged"),
        "empty": (b"", "zero bytes"),
        "text": (b"<html>" * 9, "not a readable JPEG, PNG, WEBP"),
        "gif": (encoded(picture(9, 9), "GIF"), "not a readable JPEG, PNG, WEBP"),
        "giant": (encoded(Image.new("1", (17_000, 17_000)), "PNG"), "claims 17,000 x 17,000 pixels"),
        "giant jpeg": (whole.replace(b"\x00\x64\x00\x78", b"\xff\xff\xff\xff", 1), "claims 65,535 x 65,535"),
    }


def training(config: DataConfig, copies: int = 0) -> ViewsOf:
    def views_of(rows: np.ndarray, sizes: np.ndarray) -> Any:
        return train_views(sizes, draws((0, "test"), rows, np.full(len(rows), copies), BLOCKS), config)

    return views_of


def evaluation(rows: np.ndarray, sizes: np.ndarray) -> Any:
    return eval_views(sizes, SPEC)


def fill(how: Decode, images: list[bytes], views_of: ViewsOf, cubic: bool = False) -> tuple[np.ndarray, dict[int, str]]:
    out = np.full((len(images), 3, SIDE, SIDE), 77, np.uint8)
    decoder = BatchDecoder(how, Interpolation.bicubic if cubic else Interpolation.bilinear, LIMIT)
    return out, decoder.fill(jobs_of(images), views_of, out)


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("copies", range(4))
def test_fast_and_exact_show_the_same_to_a_level_and_equal_what_is_no_plain_jpeg(
    config: DataConfig, copies: int, cubic: bool
) -> None:
    """Each is within a level of the exact sum; ties, such as a scale of 1.25 has, part them by 2 in a few values."""
    images = good_images()
    for views_of in (training(config, copies), evaluation):
        exact, faults = fill(Decode.exact, list(images.values()), views_of, cubic)
        fast, more_faults = fill(Decode.fast, list(images.values()), views_of, cubic)
        assert faults == more_faults == {}
        for row, (name, data) in enumerate(images.items()):
            difference = np.abs(fast[row].astype(int) - exact[row])
            assert difference.max() <= 2, name
            assert (difference > 1).mean() < 1e-3, name
            plain = data[:2] == b"\xff\xd8" and name not in ("cmyk", *(f"turned {turn}" for turn in range(2, 9)))
            assert plain or not difference.any(), name


def test_exact_is_pillow_on_the_whole_image(config: DataConfig) -> None:
    images = list(good_images().values())
    shown, _ = fill(Decode.exact, images, training(config))
    evaluated, _ = fill(Decode.exact, images, evaluation)
    for row, data in enumerate(images):
        pixels = decode_image(data, LIMIT)[0]
        views = training(config)(np.array([row]), np.array([pixels.shape[1::-1]]))
        assert np.array_equal(shown[row], show(pixels, views, 0, SIDE, Interpolation.bilinear))
        assert np.array_equal(evaluated[row], eval_pixels(pixels, SPEC))


@pytest.mark.parametrize("how", list(Decode))
def test_faults_are_told_by_row_and_leave_their_neighbours_alone(config: DataConfig, how: Decode) -> None:
    good, bad = list(good_images().values()), bad_images()
    wanted, _ = fill(how, good, training(config))
    images, rows = list(good), []
    for place, (data, _) in zip(range(1, 100, 3), bad.values(), strict=False):
        images.insert(place, data)
        rows.append(place)
    where = [row for row in range(len(images)) if row not in rows]

    def views_of(numbers: np.ndarray, sizes: np.ndarray) -> Any:
        return training(config)(np.searchsorted(where, numbers), sizes)

    shown, faults = fill(how, images, views_of)
    assert sorted(faults) == rows
    for row, (name, (_, reason)) in zip(rows, bad.items(), strict=True):
        assert reason in faults[row], name
    assert np.array_equal(shown[where], wanted)


@pytest.mark.parametrize("how", list(Decode))
def test_a_row_does_not_depend_on_the_batch_it_is_in(config: DataConfig, how: Decode) -> None:
    images = [*good_images().values(), *(data for data, _ in bad_images().values())]
    whole, faults = fill(how, images, training(config))
    random = np.random.default_rng(0)
    decoder = BatchDecoder(how, Interpolation.bilinear, LIMIT)
    for _ in range(6):
        some = random.permutation(len(images))[: random.integers(1, len(images))]
        jobs = jobs_of(images)[some].copy()
        out = np.full_like(whole, 77)
        assert decoder.fill(jobs, training(config), out) == {int(i): faults[i] for i in some if i in faults}
        assert np.array_equal(out[some], whole[some])
        others = np.setdiff1d(np.arange(len(images)), some)
        assert (out[others] == 77).all()


@pytest.mark.parametrize("how", list(Decode))
def test_images_in_files_are_those_in_memory_and_a_file_that_ends_early_is_a_fault(
    config: DataConfig, tmp_path: Path, how: Decode
) -> None:
    images = list(good_images().values())
    path = tmp_path / "tar"
    path.write_bytes(b"-" * 512 + b"".join(images))
    wanted, _ = fill(how, images, training(config))
    offsets, sizes = 512 + np.cumsum([0, *map(len, images)])[:-1], np.array(list(map(len, images)))
    decoder, out = BatchDecoder(how, Interpolation.bilinear, LIMIT), np.zeros_like(wanted)
    with path.open("rb") as file:
        jobs = jobs_in_files(np.full(len(images), file.fileno()), offsets, sizes)
        assert [read_job(job) for job in jobs] == images
        assert decoder.fill(jobs, training(config), out) == {}
        assert np.array_equal(out, wanted)
        os.truncate(path, path.stat().st_size - 10)
        jobs = jobs_in_files(np.full(len(images), file.fileno()), offsets, sizes)
        last = len(images) - 1
        assert decoder.fill(jobs, training(config), out) == {
            last: f"{len(images[last]) - 10} of {len(images[last])} bytes"
        }


def digest_of_training(seed_of: DataConfig, images: list[bytes]) -> str:
    """sha256 over the training pixels of three epochs, as `fast` decodes them."""
    digest = hashlib.sha256()
    for copies in range(3):
        out, faults = fill(Decode.fast, images, training(seed_of, copies))
        assert faults == {}
        digest.update(out.tobytes())
    return digest.hexdigest()


def decoder_name() -> str:
    found = region_decoder()
    return "kernel" if isinstance(found, Kernel) else str(getattr(found, "name", found))


@pytest.mark.skipif(not is_available(), reason="no compiled kernel to compare with")
def test_training_sees_the_same_pixels_with_and_without_the_kernel(config: DataConfig) -> None:
    code = (
        "from orchestrator.compose import compose; import test_decode as t;"
        f"c = compose(['data=imagenet', 'data.image_size={SIDE}', 'data.eval_resize=72']).config.data;"
        "print(t.decoder_name(), t.digest_of_training(c, list(t.good_images().values())), sep='|')"
    )
    here = Path(__file__)
    environment = os.environ | {"PYTHONPATH": f"{here.parents[2]}:{here.parent}", "OMP_NUM_THREADS": "1"}
    told = subprocess.check_output(
        [sys.executable, "-c", code], env=environment | {"ORCHESTRATOR_KERNEL": "off"}, text=True
    )
    assert decoder_name() == "kernel"
    assert told.strip().split("|") == [
        "simplejpeg and torch",
        digest_of_training(config, list(good_images().values())),
    ]
