"""Where the images in the cells of tables lie as bytes: in the file itself, or laid out once in one that is ours.

An Arrow file that is not compressed holds every image as it is, so that a packing process reads it where it lies. A
parquet file is compressed in row groups of a hundred images or so: shuffled shards that read it by row would unpack
each group a hundred times. It is therefore read once, from the beginning to the end, and its images laid end to end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from orchestrator.errors import DataError

ROWS_AT_ONCE = 256
BYTES_AT_ONCE = 8 << 20
READ_AHEAD = 1 << 20
"""Bytes of a column that are read at a time; pyarrow would buffer all row groups of the file ahead."""
_DAMAGED = "Way out: download this file again"


@dataclass(frozen=True, slots=True)
class CellReader:
    """Images by (number of the file, offset, size), or by the path that a cell names instead of holding bytes."""

    paths: tuple[str, ...]

    def __call__(self, ref: tuple[int, int, int] | str) -> bytes:
        if isinstance(ref, str):
            return Path(ref).read_bytes()
        number, offset, size = ref
        with open(self.paths[number], "rb") as file:
            return os.pread(file.fileno(), size, offset)


@dataclass(frozen=True, slots=True)
class Cells:
    """Labels of some rows as they stand there, and where their images are: byte offsets into file `number`."""

    labels: list[Any]
    number: int
    offsets: np.ndarray  # (rows,) int64
    sizes: np.ndarray  # (rows,) int64, bytes
    elsewhere: dict[int, str]  # row -> path, where a cell names a file instead


@dataclass(slots=True)
class Layout:
    """The files that references number: 0 is the one laid out at `target`, None lays out nothing and only counts."""

    target: Path | None
    paths: list[str] = field(default_factory=list)
    size: int = 0
    file: IO[bytes] | None = None

    def __enter__(self) -> Layout:
        self.paths.append(str(self.target or ""))
        self.file = self.target.open("wb") if self.target else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def append(self, data: memoryview) -> int:
        """Where `data` begins in the file that is laid out."""
        begin, self.size = self.size, self.size + len(data)
        if self.file:
            self.file.write(data)
        return begin


def read_schema(path: Path, is_arrow: bool) -> Any:
    """The Arrow schema of a parquet file or of an Arrow stream. Raises DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if is_arrow:
            with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
                return stream.schema
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as a table ({error}). {_DAMAGED}") from error


def count_rows(path: Path, is_arrow: bool) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not is_arrow:
            return pq.read_metadata(path).num_rows
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
            return sum(batch.num_rows for batch in stream)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as a table ({error}). {_DAMAGED}") from error


def read_cells(path: Path, is_arrow: bool, columns: tuple[str, str], layout: Layout) -> Iterator[Cells]:
    """All rows of one file, by the names of its columns of images and labels; a few hundred are in memory at a time.

    Raises DataError for a damaged file and for cells that hold no images, OSError of the disk laid out on.
    """
    import pyarrow as pa

    mapped = pa.memory_map(str(path)).read_buffer() if is_arrow else None
    if mapped is not None:
        layout.paths.append(str(path.resolve()))
    for batch in _batches(path, mapped, columns):
        yield _locate(path, batch, columns, layout, mapped)


def _batches(path: Path, mapped: Any, columns: tuple[str, str]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if mapped is not None:
            with pa.ipc.open_stream(mapped) as stream:
                yield from stream
            return
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_AHEAD, page_checksum_verification=True) as file:
            yield from file.iter_batches(_rows_at_once(file.metadata), columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged ({error}). {_DAMAGED}") from error


def _rows_at_once(facts: Any) -> int:
    """So many rows of average size as fit in `BYTES_AT_ONCE`; facts are a parquet file's own."""
    size = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
    return min(max(BYTES_AT_ONCE * facts.num_rows // max(size, 1), 1), ROWS_AT_ONCE)


def _locate(path: Path, batch: Any, columns: tuple[str, str], layout: Layout, mapped: Any) -> Cells:
    images = batch.column(columns[0])
    data, elsewhere = _binary(path, images)
    bounds, values = _bounds(data)
    if mapped is not None and mapped.address <= values.address < mapped.address + mapped.size:
        number, begin = len(layout.paths) - 1, values.address - mapped.address
    else:
        number, begin = 0, layout.append(memoryview(values)[bounds[0] : bounds[-1]]) - int(bounds[0])
    return Cells(batch.column(columns[1]).to_pylist(), number, bounds[:-1] + begin, np.diff(bounds), elsewhere)


def _bounds(data: Any) -> tuple[np.ndarray, Any]:
    """Where each value begins, and the last one ends, (rows + 1,) int64, in the buffer of all values."""
    import pyarrow as pa

    _, offsets, values = data.buffers()
    bounds = np.frombuffer(offsets, np.int64)[data.offset : data.offset + len(data) + 1]
    return bounds, values if values is not None else pa.py_buffer(b"")


def _binary(path: Path, images: Any) -> tuple[Any, dict[int, str]]:
    """The images as one array of large_binary, empty where a cell has no bytes, and the paths such cells name."""
    import pyarrow as pa

    elsewhere: dict[int, str] = {}
    kind = images.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        cells = dict(zip((part.name for part in kind), images.flatten(), strict=True))
        images = cells["bytes"]
        if images.null_count and "path" in cells:
            rows = np.flatnonzero(images.is_null().to_numpy(zero_copy_only=False)).tolist()
            named = cells["path"].take(rows).to_pylist()
            elsewhere = {row: str(path.parent / name) for row, name in zip(rows, named, strict=True) if name}
    if not is_binary(images.type):
        raise DataError(
            f"{path}: images are {kind}, must be binary or a struct of bytes and path. "
            "Way out: --image-column, or cast the column to datasets.Image()"
        )
    return images.cast(pa.large_binary()), elsewhere


def is_binary(kind: Any) -> bool:
    """Whether values of this Arrow type are bytes that are laid end to end after a cast."""
    import pyarrow as pa

    types = pa.types
    return any(
        check(kind)
        for check in (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    )


def holds_images(kind: Any) -> bool:
    """Whether this Arrow type is binary, or Hugging Face's struct of bytes and path."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    return is_binary(kind)
