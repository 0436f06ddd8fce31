"""What a JPEG file says before its first compressed byte, and windows cut out of files with restart markers.

The same as `native/jpeg_file.h`, for machines without the compiled kernel. ITU-T T.81, annex B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

SOF0, SOF2, DHT, RST0, EOI, SOS, DRI, APP1 = 0xC0, 0xC2, 0xC4, 0xD0, 0xD9, 0xDA, 0xDD, 0xE1
XMP = b"http://ns.adobe.com/xap/1.0/"

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_XMP_TURN = re.compile(rb"tiff:Orientation[=>][\"']?(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Size and MCUs in pixels, restart interval in MCUs (0 = none), offsets of the height field and of the data."""

    width: int
    height: int
    mcu_width: int
    mcu_height: int
    interval: int
    baseline: bool
    size_at: int
    data_at: int


class Window(NamedTuple):
    """Whole restart intervals as a JPEG of its own: its bytes, and the pixel where it begins."""

    data: bytes
    left: int
    top: int


def parse_jpeg(data: bytes) -> JpegHeader | None:
    """The header of a plain JPEG (8 bits, gray or three components, upright) that has its end; None for any other."""
    return parse_start(data) if has_end(data) else None


def has_end(data: bytes) -> bool:
    """Whether a file goes on to its end marker, behind which some programs leave a few bytes."""
    return b"\xff\xd9" in data[-66:]


def parse_start(data: bytes) -> JpegHeader | None:
    """The same of a file whose first bytes are known; None also where they end within the header."""
    if data[:2] != b"\xff\xd8":
        return None
    at, size_at, frame, interval, sequential = 2, 0, None, 0, True
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + length]
        if len(segment) < length - 2:
            return None
        if SOF0 <= marker <= SOF2:
            frame, size_at, sequential = _parse_frame(segment), at + 5, marker != SOF2
        elif marker == DRI:
            interval = int.from_bytes(segment[:2], "big")
        elif marker == SOS:
            if frame is None:
                return None
            baseline = sequential and segment[0] == frame[4]
            return JpegHeader(*frame[:4], interval, baseline, size_at, at + 2 + length)
        elif (marker == APP1 and _is_turned(segment)) or (SOF2 < marker < RST0 and marker != DHT) or marker < SOF0:
            return None
        at += 2 + length
    return None


def _parse_frame(segment: bytes) -> tuple[int, int, int, int, int] | None:
    """Width, height, MCU width and height, number of components."""
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    components = segment[5]
    if segment[0] != 8 or not width or not height or components not in (1, 3):
        return None
    sampling = segment[7::3] if components == 3 else b"\x11"
    return width, height, 8 * max(s >> 4 for s in sampling), 8 * max(s & 15 for s in sampling), components


def _is_turned(segment: bytes) -> bool:
    """Whether an APP1 segment asks for the image to be turned."""
    if segment.startswith(XMP):
        found = _XMP_TURN.search(segment)
        return found is not None and found[1] != b"1"
    if not segment.startswith(b"Exif\0\0") or len(segment) < 20:
        return False
    tiff, order = segment[6:], "little" if segment[6:7] == b"I" else "big"
    at = int.from_bytes(tiff[4:8], order)
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(tiff[at : at + 2], order), 12):
        if int.from_bytes(tiff[entry : entry + 2], order) == 0x0112:
            return 2 <= int.from_bytes(tiff[entry + 8 : entry + 10], order) <= 8
    return False


def cut_window(data: bytes, header: JpegHeader, box: tuple[int, int, int, int]) -> Window | None:
    """The restart intervals that cover a box in pixels; None where the file has none that divide its rows."""
    columns, rows = -(-header.width // header.mcu_width), -(-header.height // header.mcu_height)
    if not (header.baseline and header.interval) or columns % header.interval:
        return None
    per_row, step = columns // header.interval, header.mcu_width * header.interval
    first, last = max(box[0], 0) // step, min(per_row, -(-box[2] // step))
    top, bottom = max(box[1], 0) // header.mcu_height, min(rows, -(-box[3] // header.mcu_height))
    ends = [match.start() for match in _RESTART.finditer(data, header.data_at)]
    ends.append(data.rindex(b"\xff\xd9"))
    if len(ends) != per_row * rows:
        return None
    starts = [header.data_at, *(end + 2 for end in ends)]
    wanted = [row * per_row + i for row in range(top, bottom) for i in range(first, last)]
    parts = [data[: header.size_at], _size_bytes(header, first, last, top, bottom)]
    parts.append(data[header.size_at + 4 : header.data_at])
    for number, i in enumerate(wanted):
        parts.append(data[starts[i] : ends[i]])
        parts.append(bytes((0xFF, RST0 + number % 8)))
    parts[-1] = b"\xff\xd9"
    return Window(b"".join(parts), first * step, top * header.mcu_height)


def _size_bytes(header: JpegHeader, first: int, last: int, top: int, bottom: int) -> bytes:
    step = header.mcu_width * header.interval
    width = min(last * step, header.width) - first * step
    height = min(bottom * header.mcu_height, header.height) - top * header.mcu_height
    return height.to_bytes(2, "big") + width.to_bytes(2, "big")


def end_early(data: bytes, header: JpegHeader, bottom: int) -> bytes:
    """The file as if it ended at row `bottom`: a decoder reads the scan of a baseline file no further than that."""
    if not header.baseline or bottom >= header.height:
        return data
    return b"".join((data[: header.size_at], bottom.to_bytes(2, "big"), data[header.size_at + 2 :]))
