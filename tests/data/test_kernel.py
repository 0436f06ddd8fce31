"""The compiled decoder: torch's own pixels for every kind of JPEG and box, and nothing else for anything damaged."""

from __future__ import annotations

import ctypes
import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from jpegs import (
    LIMIT,
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
from PIL import Image

from orchestrator.data.kernel import DONE, JOB, OTHER, SHORT_READ, Kernel, _libjpegs, load_kernel
from orchestrator.data.native import build
from orchestrator.data.native.build import FLAGS, HERE, SOURCES

SIZES = [(1, 1), (7, 5), (16, 16), (33, 47), (131, 97), (254, 187)]
SIDES = (1, 7, 8, 32, 33, 224)
PILLOW_SAMPLINGS = {"444": 0, "422": 1, "420": 2}
FUZZ = Path(__file__).with_name("fuzz_kernel.py")
COMPILER = shutil.which("gcc") or shutil.which("cc")

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C compiler: the kernel's own sources cannot be checked")
pytestmark = pytest.mark.skipif(isinstance(load_kernel(), str), reason=f"the kernel is {load_kernel()}")


@pytest.fixture
def kernel() -> Kernel:
    return require_kernel()


def kinds_of(pixels: np.ndarray, sampling: str) -> dict[str, bytes]:
    """The same picture plain, progressive, and with restart intervals that divide its rows or do not."""
    kernel, plain = require_kernel(), jpeg(pixels, sampling)
    facts = kernel.describe(plain)
    assert facts is not None
    kinds: dict[str, bytes | None] = {"plain": plain, "every MCU": kernel.rewrite(plain, 1)}
    divisors = [d for d in range(2, facts.columns + 1) if facts.columns % d == 0]
    others = [d for d in range(2, facts.columns) if facts.columns % d]
    kinds |= {f"every {d} MCUs": kernel.rewrite(plain, d) for d in divisors[:1] + others[:1]}
    if sampling in PILLOW_SAMPLINGS:
        kinds["progressive"] = pillow_jpeg(pixels, subsampling=PILLOW_SAMPLINGS[sampling], progressive=True)
    assert None not in kinds.values()
    return {name: data for name, data in kinds.items() if data}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_pixels_equal_torchs_resize_of_the_whole_image_bit_for_bit(
    kernel: Kernel, sampling: str, size: tuple[int, int]
) -> None:
    for kind, data in kinds_of(picture(*size), sampling).items():
        whole = by_pillow(data)
        for side in SIDES:
            boxes = (edge_boxes(*size) + random_boxes(*size, 6, side))[:: 3 if side == 224 else 1]
            flips = np.arange(len(boxes)) % 2
            for cubic in (False, True):
                jobs = jobs_of([data] * len(boxes), boxes, flips)
                out = decode(kernel, jobs, side, cubic)
                assert (jobs["status"] == DONE).all()
                for row, box in enumerate(boxes):
                    wanted = by_torch(whole, box, side, cubic, bool(flips[row]))
                    assert np.array_equal(out[row], wanted), (kind, side, cubic, box)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("interval", [0, 1, 4, 40])
def test_every_place_of_a_large_image_is_reached(kernel: Kernel, sampling: str, interval: int) -> None:
    pixels = picture(640, 477)
    data = jpeg(pixels, sampling)
    data = (kernel.rewrite(data, interval) or b"") if interval else data
    boxes = random_boxes(640, 477, 60, interval)
    out = decode(kernel, jobs_of([data] * 60, boxes), 64)
    whole = by_pillow(data)
    assert all(np.array_equal(out[i], by_torch(whole, box, 64, False)) for i, box in enumerate(boxes))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("quality", [1, 30, 75, 96, 100])
def test_codes_of_every_length_are_read_as_libjpeg_reads_them(kernel: Kernel, quality: int, optimize: bool) -> None:
    """Noise of high quality has codes of 16 bits and values of 10; what is nearly flat has long runs of zeros."""
    random = np.random.default_rng(quality)
    noise = random.integers(0, 256, (95, 130, 3), np.uint8)
    spots = np.where(random.random((95, 130, 3)) < 0.004, 255, 0).astype(np.uint8)
    for pixels in (noise, spots, noise // 16 + 100):
        data = pillow_jpeg(pixels, quality=quality, optimize=optimize, subsampling=2)
        for whole in (data, kernel.rewrite(data, 3), kernel.rewrite(data, 9)):
            assert whole
            boxes = [(0, 0, 130, 95), (70, 60, 130, 95), (20, 30, 60, 50)]
            jobs = jobs_of([whole] * 3, boxes)
            out = decode(kernel, jobs, 120)
            assert (jobs["status"] == DONE).all()
            for row, box in enumerate(boxes):
                assert np.array_equal(out[row], by_torch(by_pillow(data), box, 120, False))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_smaller_dct_of_a_region_is_that_of_the_whole_image(kernel: Kernel, sampling: str, factor: int) -> None:
    """Boxes on multiples of 8, so that they lie on whole pixels of the smaller image."""
    side, width, height = 13, 424, 328
    data = jpeg(picture(width, height), sampling)
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (width // factor, height // factor))
        whole = np.asarray(image.convert("RGB"))
    assert whole.shape == (height // factor, width // factor, 3)
    boxes = [tuple(8 * c for c in box) for box in random_boxes(width // 8, height // 8, 400)]
    boxes = [b for b in boxes if 2 * side * factor > min(b[2] - b[0], b[3] - b[1]) >= side * factor]
    assert len(boxes) > 10
    jobs = jobs_of([data] * len(boxes), boxes)
    jobs["scaled"] = 1
    out = decode(kernel, jobs, side)
    for row, box in enumerate(boxes):
        assert np.array_equal(out[row], by_torch(whole, [c // factor for c in box], side, False)), box


def test_a_progressive_image_whose_last_scans_never_came_shows_what_pillow_shows(kernel: Kernel) -> None:
    data = pillow_jpeg(picture(200, 150), progressive=True, subsampling=2)
    scans = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    for end in scans[1:]:
        cut = data[:end] + b"\xff\xd9"
        boxes = edge_boxes(200, 150) + random_boxes(200, 150, 12)
        jobs = jobs_of([cut] * len(boxes), boxes)
        out = decode(kernel, jobs, 32)
        whole = by_pillow(cut)
        for row, box in enumerate(boxes):
            assert jobs["status"][row] == OTHER or np.array_equal(out[row], by_torch(whole, box, 32, False))


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_evaluations_boxes_between_pixels_are_within_a_level_of_pillow(
    kernel: Kernel, sampling: str, cubic: bool
) -> None:
    """Bicubic weights of both signs double the rounding of the first pass: 2 levels in 1 of 5,000 values of noise."""
    resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    for width, height, side in ((500, 375, 224), (333, 257, 224), (97, 301, 32), (40, 31, 64), (225, 224, 176)):
        short = min(width, height) * side / (side * 8 / 7)
        left, top = (width - short) / 2, (height - short) / 2
        boxes = [
            (left, top, left + short, top + short),
            (0, 0, width, height),
            (0.3, 0.7, width - 0.1, height - 0.9),
            (width / 3, height / 7, width / 2, height / 3),
        ]
        for data in (jpeg(picture(width, height), sampling), kernel.rewrite(jpeg(picture(width, height), sampling), 1)):
            assert data
            jobs = jobs_of([data] * 4, boxes, clip=False)
            out = decode(kernel, jobs, side, cubic).astype(int)
            assert (jobs["status"] == DONE).all()
            whole = Image.fromarray(by_pillow(data))
            for row, box in enumerate(boxes):
                wanted = np.asarray(whole.resize((side, side), resample, box=box)).transpose(2, 0, 1)
                difference = np.abs(out[row] - wanted)
                assert (difference > 1).mean() <= 2e-4 * cubic, (width, height, box)
                assert difference.max() <= 1 + cubic, (width, height, box)


def large_photos(shared_data: Path) -> list[bytes]:
    """Real photos of 640 pixels and more: as JPEGs where they are, else encoded as a camera does."""
    folder = Path(skimage.__file__).parent / "data"
    found = [(folder / name).read_bytes() for name in ("retina.jpg", "hubble_deep_field.jpg", "rocket.jpg")]
    for name in ("motorcycle_left.png", "ihc.png", "astronaut.png", "coffee.png"):
        with Image.open(folder / name) as image:
            found.append(pillow_jpeg(np.asarray(image.convert("RGB")), quality=90))
    files = sorted((shared_data / "imagenet-sample").glob("*/*.JPEG"), key=lambda path: path.stat().st_size)
    return found + [path.read_bytes() for path in files[-6:]]


def test_a_smaller_dct_stays_within_the_stated_difference_on_large_photos(kernel: Kernel, shared_data: Path) -> None:
    """Stated: mean 1.6 levels, 99 % of all values within 14; where a DCT of full size is taken, none at all."""
    data, boxes = [], []
    for number, photo in enumerate(large_photos(shared_data)):
        facts = kernel.describe(photo)
        if facts is None:
            continue
        random = np.random.default_rng(number)
        for _ in range(5):
            width, height = (int(random.integers(side * 6 // 10, side + 1)) for side in (facts.width, facts.height))
            left, top = random.integers(facts.width - width + 1), random.integers(facts.height - height + 1)
            data.append(photo)
            boxes.append((left, top, left + width, top + height))
    shares = {}
    for side in (64, 160, 224):
        exact, scaled = jobs_of(data, boxes), jobs_of(data, boxes)
        scaled["scaled"] = 1
        difference = np.abs(decode(kernel, exact, side).astype(int) - decode(kernel, scaled, side))
        assert (exact["status"] == DONE).all()
        assert (scaled["status"] == DONE).all()
        smallest = (scaled["box"][:, 2:] - scaled["box"][:, :2]).min(1)
        assert not difference[smallest < 2 * side].any()
        apart = difference[smallest >= 2 * side]
        shares[side] = len(apart)
        assert (apart.reshape(len(apart), -1).max(1) > 0).all(), "the smaller DCT was not taken"
        print(f"side {side}: {len(apart)} crops, mean {apart.mean():.3f}, p99 {np.percentile(apart, 99):.0f}")
        assert apart.mean() <= 1.6
        assert np.percentile(apart, 99) <= 14
    assert min(shares.values()) >= 15


@pytest.fixture(scope="module")
def plain_kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    """The kernel for a processor without AVX2."""
    return compile_kernel(tmp_path_factory.mktemp("plain") / "plain.so", "-DPLAIN_CPU")


def compile_kernel(path: Path, *flags: str) -> Kernel:
    command = [str(COMPILER), *FLAGS, *flags, "-o", str(path), str(HERE / SOURCES[0]), "-ldl", "-lm"]
    subprocess.run(command, check=True, capture_output=True)
    return open_kernel(path)


def open_kernel(path: Path) -> Kernel:
    library = ctypes.CDLL(str(path))
    assert any(library.kernel_open(place.encode()) == 0 for place in _libjpegs())
    return Kernel(library)


@needs_compiler
@pytest.mark.parametrize("cubic", [False, True])
def test_processors_with_and_without_avx2_agree_bit_for_bit(kernel: Kernel, plain_kernel: Kernel, cubic: bool) -> None:
    assert_same_pixels(kernel, plain_kernel, cubic)


def assert_same_pixels(kernel: Kernel, other: Kernel, cubic: bool) -> None:
    for size in SIZES:
        data = jpeg(picture(*size))
        for side in (*SIDES, 5, 63):
            boxes = edge_boxes(*size) + random_boxes(*size, 6)
            for clip in (True, False):
                jobs = jobs_of([data] * len(boxes), boxes, np.arange(len(boxes)) % 2, clip)
                assert np.array_equal(decode(kernel, jobs, side, cubic), decode(other, jobs, side, cubic))


@pytest.mark.parametrize(
    ("system", "compiler", "built", "needs"),
    [
        ("linux x86_64", None, False, [build.COMPILER_WHEEL]),
        ("linux x86_64", "/usr/bin/cc", False, []),
        ("linux x86_64", None, True, []),
        ("linux ppc64le", None, False, []),
        ("darwin arm64", None, False, []),
    ],
)
def test_a_compiler_is_fetched_only_where_one_is_missing_and_can_be_had(
    system: str, compiler: str | None, built: bool, needs: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    platform, machine = system.split()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build.shutil, "which", lambda name: compiler if name == "cc" else None)
    monkeypatch.setattr(build, "kernel_path", lambda: HERE / SOURCES[0] if built else tmp_path / "absent.so")
    assert build.build_needs() == needs


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel is written for Linux")
def test_a_wheel_built_without_a_compiler_on_the_path_carries_a_kernel_with_the_same_pixels(
    kernel: Kernel, tmp_path: Path
) -> None:
    root, copy, bare = Path(__file__).parents[2], tmp_path / "copy", tmp_path / "bin"
    for folder in ("orchestrator", "conf", "jobs", "k8s"):
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("kernel-*.so", "__pycache__"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    bare.mkdir()
    uv = [str(Path(sys.executable).with_name("uv")), "build", "--wheel", "--python", sys.executable]
    variables = {name: value for name, value in os.environ.items() if name != "CC"} | {"PATH": str(bare)}
    subprocess.run([*uv, "--out-dir", str(tmp_path / "dist"), str(copy)], env=variables, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if Path(name).match("native/kernel-*.so")]
        built = open_kernel(Path(archive.extract(member, tmp_path)))
    for cubic in (False, True):
        assert_same_pixels(kernel, built, cubic)


OFFSETS = """
#include <stddef.h>
#include <stdio.h>
#include <jpeglib.h>
#include "libjpeg_constants.h"
#define SAME(name, value) \\
    if ((long)(name) != (long)(value)) printf(#name ": %ld, the header says %ld\\n", (long)(name), (long)(value));
#define AT(name, type, field) SAME(name, offsetof(struct type, field))
int main(void) {
    if (JPEG_LIB_VERSION != LIBJPEG_VERSION) { printf("interface %d\\n", JPEG_LIB_VERSION); return 3; }
    SAME(D_SIZE, sizeof(struct jpeg_decompress_struct)) SAME(C_SIZE, sizeof(struct jpeg_compress_struct))
    SAME(E_SIZE, sizeof(struct jpeg_error_mgr)) SAME(I_SIZE, sizeof(jpeg_component_info))
    AT(D_ERR, jpeg_decompress_struct, err) AT(D_MEM, jpeg_decompress_struct, mem)
    AT(D_IMAGE_WIDTH, jpeg_decompress_struct, image_width) AT(D_IMAGE_HEIGHT, jpeg_decompress_struct, image_height)
    AT(D_NUM_COMPONENTS, jpeg_decompress_struct, num_components)
    AT(D_OUT_COLOR_SPACE, jpeg_decompress_struct, out_color_space)
    AT(D_SCALE_NUM, jpeg_decompress_struct, scale_num) AT(D_SCALE_DENOM, jpeg_decompress_struct, scale_denom)
    AT(D_OUTPUT_WIDTH, jpeg_decompress_struct, output_width) AT(D_OUTPUT_HEIGHT, jpeg_decompress_struct, output_height)
    AT(D_OUTPUT_SCANLINE, jpeg_decompress_struct, output_scanline) AT(D_COEF_BITS, jpeg_decompress_struct, coef_bits)
    AT(D_COMP_INFO, jpeg_decompress_struct, comp_info)
    AT(D_CLIENT_DATA, jpeg_decompress_struct, client_data) AT(D_SRC, jpeg_decompress_struct, src)
    AT(D_DC_TABLES, jpeg_decompress_struct, dc_huff_tbl_ptrs) AT(D_AC_TABLES, jpeg_decompress_struct, ac_huff_tbl_ptrs)
    AT(D_RESTART_INTERVAL, jpeg_decompress_struct, restart_interval)
    AT(D_CUR_COMP_INFO, jpeg_decompress_struct, cur_comp_info)
    AT(D_BLOCKS_IN_MCU, jpeg_decompress_struct, blocks_in_MCU)
    AT(D_MCU_MEMBERSHIP, jpeg_decompress_struct, MCU_membership) AT(D_ENTROPY, jpeg_decompress_struct, entropy)
    SAME(T_BITS, offsetof(JHUFF_TBL, bits)) SAME(T_VALUES, offsetof(JHUFF_TBL, huffval))
    AT(S_NEXT, jpeg_source_mgr, next_input_byte) AT(S_LEFT, jpeg_source_mgr, bytes_in_buffer)
    AT(C_ERR, jpeg_compress_struct, err) AT(C_OPTIMIZE_CODING, jpeg_compress_struct, optimize_coding)
    AT(C_RESTART_INTERVAL, jpeg_compress_struct, restart_interval)
    AT(E_ERROR_EXIT, jpeg_error_mgr, error_exit) AT(E_EMIT_MESSAGE, jpeg_error_mgr, emit_message)
    AT(E_OUTPUT_MESSAGE, jpeg_error_mgr, output_message)
    AT(M_ACCESS_VIRT_BARRAY, jpeg_memory_mgr, access_virt_barray)
#define OF(name, field) SAME(name, offsetof(jpeg_component_info, field))
    OF(I_H_SAMP, h_samp_factor) OF(I_V_SAMP, v_samp_factor) OF(I_WIDTH_IN_BLOCKS, width_in_blocks)
    OF(I_DC_TABLE, dc_tbl_no) OF(I_AC_TABLE, ac_tbl_no)
    OF(I_HEIGHT_IN_BLOCKS, height_in_blocks) OF(I_QUANT_TABLE, quant_table)
    SAME(OUR_RGBX, JCS_EXT_RGBX)
    printf("checked\\n");
    return 0;
}
"""


@needs_compiler
def test_offsets_are_those_of_the_systems_own_header(tmp_path: Path) -> None:
    ours = (HERE / "libjpeg.h").read_text()
    constants = "\n".join(line for line in ours.split("typedef")[0].splitlines() if not line.startswith("#include"))
    (tmp_path / "libjpeg_constants.h").write_text(constants.replace("JCS_EXT_RGBX", "OUR_RGBX") + "\n#endif\n")
    (tmp_path / "offsets.c").write_text(OFFSETS)
    command = [str(COMPILER), "-I", str(tmp_path), "-o", str(tmp_path / "offsets"), str(tmp_path / "offsets.c")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "jpeglib.h: No such file" in built.stderr:
        pytest.skip("no jpeglib.h here (package libjpeg62-turbo-dev)")
    assert built.returncode == 0, built.stderr
    told = subprocess.run([tmp_path / "offsets"], capture_output=True, text=True, check=False)
    if told.returncode == 3:
        pytest.skip(f"the system's libjpeg has another {told.stdout.strip()}, not 62")
    assert told.stdout == "checked\n"


def turned(orientation: int, order: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.endian = "<" if order == "II" else ">"
    return pillow_jpeg(picture(24, 16), exif=exif.tobytes())


def with_xmp(orientation: int, form: str) -> bytes:
    text = f'tiff:Orientation="{orientation}"' if form == "=" else f"<tiff:Orientation>{orientation}<"
    body = b"http://ns.adobe.com/xap/1.0/\0" + f"<x:xmpmeta {text} />".encode()
    data = jpeg(picture(24, 16))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


ORIENTATIONS = [(turned, order, turn) for order in ("II", "MM") for turn in range(10)]
ORIENTATIONS += [(with_xmp, form, turn) for form in "=>" for turn in range(1, 9)]


@pytest.mark.parametrize(("make", "form", "orientation"), ORIENTATIONS)
def test_turned_images_are_left_to_others_and_upright_ones_are_not(
    kernel: Kernel, make: Any, form: str, orientation: int
) -> None:
    data = make(orientation, form)
    jobs = jobs_of([data], [(0, 0, 24, 16)])
    out = decode(kernel, jobs, 8)
    if 2 <= orientation <= 8:
        assert (jobs["width"][0], jobs["status"][0], int(out.min()), int(out.max())) == (0, OTHER, 77, 77)
        assert kernel.describe(data) is None
    else:
        assert jobs["status"][0] == DONE


def arithmetic() -> bytes:
    data = bytearray(jpeg(picture(24, 16)))
    data[data.index(b"\xff\xc0") + 1] = 0xC9
    return bytes(data)


def claims(width: int, height: int) -> bytes:
    data = bytearray(jpeg(picture(24, 16)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(24, 16)).save(buffer, "PNG")
    return buffer.getvalue()


def cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(24, 16)).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        cmyk(), png(), arithmetic(), claims(65535, 65535), claims(0, 16), claims(24, 0), b"", b"\xff", b"\xff\xd8",
        b"\0" * 5000, jpeg(picture(24, 16))[:300], b"\xff\xd8\xff\xd9" * 10, jpeg(picture(24, 16))[:2] + b"\xff" * 6000,
    ],
    ids=["CMYK", "PNG", "arithmetic", "giant", "no width", "no height", "empty", "1 byte", "2 bytes", "zeros",
         "cut in the header", "nothing but ends", "fill bytes"],
)  # fmt: skip
def test_what_is_no_plain_jpeg_is_left_to_others(kernel: Kernel, data: bytes) -> None:
    good = jpeg(picture(24, 16))
    jobs = jobs_of([good, data, good], [(0, 0, 24, 16)] * 3)
    out = decode(kernel, jobs, 8)
    assert jobs["status"].tolist() == [DONE, OTHER, DONE]
    assert jobs["width"].tolist() == [24, 0, 24]
    assert (out[1] == 77).all()
    assert np.array_equal(out[0], out[2])
    assert data == claims(65535, 65535) or kernel.describe(data) is None


def damaged(kind: str) -> bytes:
    data = jpeg(picture(131, 97), quality=95)
    match kind:
        case "cut":
            return data[: len(data) // 2]
        case "cut, with an end":
            return data[: len(data) // 2] + b"\xff\xd9"
        case "foreign marker":
            at = len(data) // 2
            return data[:at] + b"\xff\xd3" + data[at:]
        case _:
            return data + b"\0" * 70


@pytest.mark.parametrize("kind", ["cut", "cut, with an end", "foreign marker", "long tail"])
def test_damage_that_libjpeg_notices_is_left_to_others(kernel: Kernel, kind: str) -> None:
    data = damaged(kind)
    jobs = jobs_of([data], [(0, 0, 131, 97)])
    out = decode(kernel, jobs, 32)
    assert jobs["status"][0] == OTHER
    assert (out == 77).all()
    assert kernel.rewrite(data, 1) is None or kind == "long tail"


def damage(data: bytes, kind: str, random: np.random.Generator) -> bytes:
    """A fault somewhere in the compressed bytes; in restart markers where the kind says so."""
    changed, start = bytearray(data), data.index(b"\xff\xda") + 14
    at = int(random.integers(start, len(data) - 40))
    marks = [i for i in range(start, len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    mark = marks[int(random.integers(len(marks)))] if marks else at
    match kind:
        case "a bit turned":
            changed[at] ^= 1 << int(random.integers(8))
        case "bytes replaced":
            changed[at : at + 6] = random.bytes(6)
        case "bytes lost":
            del changed[at : at + int(random.integers(1, 30))]
        case "a marker lost":
            del changed[mark : mark + 2]
        case _:
            changed[mark + 1] = 0xD0 + (changed[mark + 1] + int(random.integers(1, 8))) % 8
    return bytes(changed)


@pytest.mark.parametrize(
    "kind", ["a bit turned", "bytes replaced", "bytes lost", "a marker lost", "a marker misnumbered"]
)
@pytest.mark.parametrize("interval", [0, 1, 4, 17])
def test_damaged_data_never_show_other_pixels_than_pillow_shows(kernel: Kernel, kind: str, interval: int) -> None:
    """Libjpeg passes over much damage in silence: then both show the same."""
    random = np.random.default_rng((len(kind), interval))
    left = shown = 0
    for number in range(12):
        data = jpeg(picture(260, 170), SAMPLINGS[number % 6], 90)
        data = damage((kernel.rewrite(data, interval) or b"") if interval else data, kind, random)
        boxes = edge_boxes(260, 170) + random_boxes(260, 170, 8, number)
        jobs = jobs_of([data] * len(boxes), boxes)
        out = decode(kernel, jobs, 24)
        left += int((jobs["status"] == OTHER).sum())
        try:
            whole = by_pillow(data)
        except OSError:
            continue
        for row in np.flatnonzero(jobs["status"] == DONE):
            shown += 1
            assert np.array_equal(out[row], by_torch(whole, boxes[row], 24, False)), (number, boxes[row])
    assert shown
    assert left or "marker" not in kind or not interval


def test_a_few_bytes_behind_the_end_do_no_harm(kernel: Kernel) -> None:
    data = jpeg(picture(131, 97))
    padded = [data + b"\0" * n for n in (0, 1, 30)]
    jobs = jobs_of(padded, [(5, 5, 90, 90)] * 3)
    out = decode(kernel, jobs, 32)
    assert jobs["status"].tolist() == [DONE] * 3
    assert (out == out[0]).all()


def test_images_in_files_are_those_in_memory_and_a_file_that_ends_early_is_named(
    kernel: Kernel, tmp_path: Path
) -> None:
    images = [jpeg(picture(60 + i, 50)) for i in range(4)]
    path = tmp_path / "joined"
    path.write_bytes(b"x" * 11 + b"".join(images))
    jobs = jobs_of(images, [(0, 0, 50, 50)] * 4)
    wanted = decode(kernel, jobs, 16)
    offsets = 11 + np.cumsum([0, *map(len, images)])
    with path.open("rb") as file:
        jobs["fd"], jobs["offset"] = file.fileno(), offsets[:-1]
        assert np.array_equal(decode(kernel, jobs, 16), wanted)
        os.truncate(path, int(offsets[3]) + 2000 if len(images[3]) > 2000 else int(offsets[4]) - 9)
        out = decode(kernel, jobs, 16)
    assert jobs["status"].tolist() == [DONE, DONE, DONE, SHORT_READ]
    assert np.array_equal(out[:3], wanted[:3])
    assert (out[3] == 77).all()


def test_rows_go_where_the_job_says_and_jobs_do_not_touch_each_other(kernel: Kernel) -> None:
    images = [jpeg(picture(90, 70, seed)) for seed in range(6)]
    jobs = jobs_of(images, [(3, 3, 80, 60)] * 6, [0, 1] * 3)
    wanted = decode(kernel, jobs, 24)
    order = np.random.default_rng(0).permutation(6)
    shuffled = jobs[order].copy()
    assert np.array_equal(decode(kernel, shuffled, 24), wanted)
    some = jobs[2:4].copy()
    out = np.zeros((6, 3, 24, 24), np.uint8)
    kernel.decode(some, out, False)
    assert np.array_equal(out[2:4], wanted[2:4])
    assert not out[[0, 1, 4, 5]].any()


def test_the_layout_of_a_job_is_the_same_on_both_sides() -> None:
    library: Any = require_kernel()._library
    assert library.kernel_job_size() == JOB.itemsize == 80


def fuzz(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, str(FUZZ), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_three_hundred_damaged_files_do_not_crash_it() -> None:
    done = fuzz("11", "300")
    assert done.returncode == 0, done.stderr
    decoded, rewritten = map(int, done.stdout.split())
    assert decoded > 30, "too few mutations got as far as the decoder"
    assert rewritten > 5


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("seed", ["21", "22"])
def test_three_thousand_damaged_files_touch_no_byte_that_is_not_theirs(tmp_path: Path, seed: str) -> None:
    runtime = [
        subprocess.check_output([str(COMPILER), f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan", "stdc++")
    ]
    sanitize = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    command = [str(COMPILER), *FLAGS, *sanitize, "-o", str(tmp_path / "checked.so"), str(HERE / SOURCES[0])]
    built = subprocess.run([*command, "-ldl", "-lm"], capture_output=True, text=True, check=False)
    if built.returncode or not all(Path(library).is_absolute() for library in runtime):
        pytest.skip(f"no sanitizers here: {built.stderr[-300:]}")
    done = fuzz(
        seed, "3000", str(tmp_path / "checked.so"),
        LD_PRELOAD=":".join(runtime), PYTHONMALLOC="malloc", ASAN_OPTIONS="detect_leaks=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_over_two_thousand_images_good_and_bad(kernel: Kernel) -> None:
    good = jpeg(picture(300, 200))
    images = [good, damaged("foreign marker"), damaged("cut"), kernel.rewrite(good, 1) or b"", png()]
    out = np.zeros((5, 3, 64, 64), np.uint8)

    def work(rounds: int) -> None:
        for _ in range(rounds):
            jobs = jobs_of(images, [(0, 0, 97, 97)] * 5)
            kernel.sizes(jobs, LIMIT)
            kernel.decode(jobs, out, False)
            for data in images[:3]:
                kernel.rewrite(data, 3)
                kernel.describe(data)

    work(50)
    before = resident_bytes()
    work(400)
    assert resident_bytes() - before < 4 << 20
