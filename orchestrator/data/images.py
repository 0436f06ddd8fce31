"""From encoded bytes to RGB pixels and back, with every conversion named and every damaged image refused."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin

from orchestrator.errors import DataError

# The limit is `max_pixels`, checked below for every image; Pillow's own would warn at one size and refuse at another.
Image.MAX_IMAGE_PIXELS = None

SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
SOURCE_FORMATS = (*SHARD_FORMATS, "GIF", "BMP", "TIFF")
SUFFIXES = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP", ".tif": "TIFF",
    ".tiff": "TIFF",
}  # fmt: skip
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_PIXELS = 178_956_970
PLAIN = frozenset({"gray"})
"""Notes of images that every decoder shows alike; an image with any other note was converted."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


class ImageError(DataError):
    """One image cannot be used; the message is a short reason without a name, which the caller knows."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image as every consumer sees it."""

    pixels: np.ndarray  # (H, W, 3) uint8
    notes: frozenset[str]
    format: str  # JPEG, PNG, ...
    subsampling: int = 0
    """Of the chroma planes of a JPEG, as Pillow numbers it: 0 none (4:4:4), 1 4:2:2, 2 4:2:0."""


def decode_image(data: bytes, max_pixels: int) -> tuple[np.ndarray, frozenset[str]]:
    """Pixels (H, W, 3) uint8 of a JPEG, PNG or WebP, and what was converted on the way.

    Notes: cmyk, 16bit (scaled to 8), animated (first frame), exif (turned upright), alpha (laid on white), palette,
    gray.
    Raises ImageError.
    """
    decoded = decode(data, max_pixels, SHARD_FORMATS)
    return decoded.pixels, decoded.notes


def decode(data: bytes, max_pixels: int, formats: tuple[str, ...]) -> Decoded:
    """Like `decode_image`, for a choice of formats; says which one it was. Raises ImageError."""
    if not data:
        raise ImageError("zero bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata is no fault of the pixels
        image = _open(data, formats)
        if image.width * image.height > max_pixels:
            raise ImageError(f"claims {image.width:,} x {image.height:,} pixels, at most {max_pixels:,} are decoded")
        try:
            return _convert(image)
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise anything on damaged bytes
            raise ImageError(f"truncated or damaged ({error or type(error).__name__})") from error


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except Image.UnidentifiedImageError:
        raise ImageError(f"not a readable {', '.join(formats)}") from None
    except Exception as error:
        raise ImageError(f"damaged header ({error or type(error).__name__})") from error


def _convert(image: Image.Image) -> Decoded:
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with previews behind it
    subsampling = max(0, JpegImagePlugin.get_sampling(image)) if kind == "JPEG" else 0
    notes = set()
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        notes.add("animated")
    if ";16" in str(getattr(image, "tile", "")) or image.mode.startswith("I;16"):
        notes.add("16bit")
    if _orientation(image) in _TURNS:
        notes.add("exif")
    image.load()
    turn = _TURNS.get(_orientation(image))  # asked again: Pillow turns TIFFs while loading
    rgb = _to_rgb(image, notes)
    pixels = np.asarray(rgb.transpose(turn) if turn is not None else rgb)
    return Decoded(pixels, frozenset(notes), kind, subsampling)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF: the pixels are still good
        return 1


def _to_rgb(image: Image.Image, notes: set[str]) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ImageError(f"{image.mode} pixels of 32 bits have no fixed range")
    if image.mode.startswith("I;16"):
        notes.add("gray")
        return Image.fromarray(_scale_16_to_8(np.asarray(image))).convert("RGB")
    if image.mode == "CMYK":
        notes.add("cmyk")
    if image.mode in ("L", "1", "LA", "La"):
        notes.add("gray")
    if image.mode in ("P", "PA"):
        notes.add("palette")
    if image.has_transparency_data:
        notes.add("alpha")
        return _lay_on_white(image.convert("RGBA"))
    return image.convert("RGB")


def _scale_16_to_8(values: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, rounded: 257 is 65535 / 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _lay_on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def shrink(pixels: np.ndarray, max_side: int | None, short_side: int | None = None) -> np.ndarray:
    """(H, W, 3) scaled so that neither side exceeds `max_side` nor the shorter one `short_side`; never enlarged."""
    height, width = pixels.shape[:2]
    longest = max_side / max(height, width) if max_side else 1.0
    shortest = short_side / min(height, width) if short_side else 1.0
    scale = min(longest, shortest)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))


def encode_image(pixels: np.ndarray, kind: str, quality: int, subsampling: int = 0) -> bytes:
    """(H, W, 3) or (H, W) uint8 as JPEG (`quality` 1..100, `subsampling` as Pillow's) or PNG, without metadata."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if kind == "JPEG":
        # Pillow optimises in a buffer of one byte a pixel, which noise without subsampling exceeds.
        ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 4 * image.width * image.height)
        image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, optimize=True)
    else:
        image.save(buffer, "PNG", optimize=False)
    return buffer.getvalue()
