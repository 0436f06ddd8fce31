"""Random access to the samples of a set: where their bytes are, in files kept open."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from orchestrator.data.fetch import local_path
from orchestrator.data.index import Members, ShardIndex, load_members
from orchestrator.errors import DataError

OPEN_SHARDS = 64


class Sample(NamedTuple):
    """One sample as it lies in its shard."""

    id: int
    key: str
    image: bytes
    label: int
    place: str


class Located(NamedTuple):
    """Where the images of some samples are; the descriptors stay open until the next call."""

    descriptors: np.ndarray  # (n,) int64
    offsets: np.ndarray  # (n,) int64 bytes from the start of the tar
    sizes: np.ndarray  # (n,) int64 bytes
    labels: np.ndarray  # (n,) int64


class ShardReader:
    """Keeps the most recently used shards of a set open; one per process."""

    def __init__(self, index: ShardIndex):
        self._index = index
        self._starts = np.cumsum([0, *(shard.nsamples for shard in index.shards)])
        self._open: OrderedDict[int, tuple[int, Members]] = OrderedDict()
        self._needed: set[int] = set()

    def locate(self, ids: np.ndarray) -> Located:
        """Where the samples with these numbers lie. Raises DataError where a shard is not what the index says."""
        shards = self._shards_of(ids)
        rows = ids - self._starts[shards]
        found = np.empty((4, len(ids)), np.int64)
        self._needed = set(np.unique(shards).tolist())
        for number in self._needed & self._open.keys():
            self._open.move_to_end(number)
        for number in sorted(self._needed):
            descriptor, members = self._shard(number)
            mine = shards == number
            row = rows[mine]
            found[0, mine] = descriptor
            found[1:, mine] = members.image_offset[row], members.image_size[row], members.label[row]
        return Located(*found)

    def read(self, id: int) -> Sample:
        """The sample with this number. Raises DataError where its bytes are not all there."""
        self._needed = set()
        number, members, row = self._row(id)
        offset, size = int(members.image_offset[row]), int(members.image_size[row])
        image, place = os.pread(self._open[number][0], size, offset), self.place(id)
        if len(image) != size:
            raise DataError(
                f"{place}: {len(image)} of {size} bytes. Way out: `orchestrator shards verify` names all faults"
            )
        return Sample(id, members.keys[row], image, int(members.label[row]), place)

    def place(self, id: int) -> str:
        """Shard, member and offset of a sample, for messages."""
        number, members, row = self._row(id)
        member = f"{members.keys[row]}.{members.extension[row]}"
        return f"{self._index.shards[number].location}, member {member}, offset {members.image_offset[row]}"

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _shards_of(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, ids, side="right") - 1

    def _row(self, id: int) -> tuple[int, Members, int]:
        number = int(self._shards_of(np.array([id]))[0])
        return number, self._shard(number)[1], id - int(self._starts[number])

    def _shard(self, number: int) -> tuple[int, Members]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= OPEN_SHARDS and next(iter(self._open)) not in self._needed:
            os.close(self._open.popitem(last=False)[1][0])
        shard = self._index.shards[number]
        path = local_path(shard)
        entry = os.open(path, os.O_RDONLY), load_members(path, shard)
        self._open[number] = entry
        return entry
