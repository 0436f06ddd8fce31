"""Random access to the samples of a set: where their bytes are, in files kept open."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from orchestrator.data.damage import DamagedShard
from orchestrator.data.index import Members, ShardIndex, load_members
from orchestrator.data.remote import is_url
from orchestrator.data.store import OPEN_TRIES, Counts, ShardStore
from orchestrator.errors import DataError, TransientError
from orchestrator.options import OnDamage
from orchestrator.redact import redact

OPEN_SHARDS = 64
"""At least so many stay open; a rank that reads from more at a time says so."""
GOLDEN = (5**0.5 - 1) / 2

LOG = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One sample as it lies in its shard."""

    id: int
    key: str
    image: bytes
    label: int
    place: str


class Located(NamedTuple):
    """Where the images of some samples are; the descriptors stay open until the next call.

    Samples of quarantined shards have descriptor -1, size 0 and label 0.
    """

    descriptors: np.ndarray  # (n,) int64
    offsets: np.ndarray  # (n,) int64 bytes from the start of the tar
    sizes: np.ndarray  # (n,) int64 bytes
    labels: np.ndarray  # (n,) int64
    lost: np.ndarray  # (n,) bool: in a quarantined shard


class ShardReader:
    """Keeps the most recently used shards of a set open; one per process."""

    def __init__(
        self,
        index: ShardIndex,
        cache_gib: float = 0.0,
        on_damage: OnDamage = OnDamage.fail,
        open_shards: int = 0,
    ):
        self._index, self._store, self._on_damage = index, ShardStore(cache_gib), on_damage
        self._open_shards = max(open_shards, OPEN_SHARDS)
        self._is_remote = any(is_url(shard.location) for shard in index.shards)
        self._starts = np.cumsum([0, *(shard.nsamples for shard in index.shards)])
        self._open: OrderedDict[int, tuple[int, Members]] = OrderedDict()
        self._needed: set[int] = set()
        self._quarantined: set[int] = set()

    def locate(self, ids: np.ndarray) -> Located:
        """Where the samples with these numbers lie; those of damaged shards are marked under quarantine.

        Raises DamagedShard and what else `ShardStore.path` raises, DataError where a shard is not what the index says.
        """
        shards = self._shards_of(ids)
        rows = ids - self._starts[shards]
        found, lost = np.zeros((4, len(ids)), np.int64), np.zeros(len(ids), bool)
        found[0] = -1
        self._needed = set(np.unique(shards).tolist())
        for number in self._needed & self._open.keys():
            self._open.move_to_end(number)
        order = self._order_of_opening()
        for place, number in enumerate(order):
            self._fetch(order[place:])
            mine = shards == number
            if not self._usable(number):
                lost |= mine
                continue
            descriptor, members = self._shard(number)
            row = rows[mine]
            found[0, mine] = descriptor
            found[1:, mine] = members.image_offset[row], members.image_size[row], members.label[row]
        if lost.any():
            self._store.add(Counts(quarantined_samples=int(lost.sum())))
        return Located(found[0], found[1], found[2], found[3], lost)

    def ahead(self, ids: np.ndarray) -> None:
        """Begin to fetch what these samples need."""
        self._fetch(from_a_place_of_its_own(np.unique(self._shards_of(ids)).tolist()))

    def _order_of_opening(self) -> list[int]:
        needed = sorted(self._needed)
        return from_a_place_of_its_own(needed) if self._is_remote else needed

    def _fetch(self, numbers: list[int]) -> None:
        """Begin to fetch the first few of these shards that are not open; called again as they are opened."""
        if self._is_remote:
            coming = [number for number in numbers if number not in self._open and number not in self._quarantined]
            self._store.ahead(self._index.shards[number] for number in coming)

    def take_counts(self) -> Counts:
        """What reading cost since the last call."""
        return self._store.take_counts()

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
        return f"{redact(self._index.shards[number].location)}, member {member}, offset {members.image_offset[row]}"

    def close(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()
        self._store.close()

    def _shards_of(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, ids, side="right") - 1

    def _row(self, id: int) -> tuple[int, Members, int]:
        number = int(self._shards_of(np.array([id]))[0])
        return number, self._shard(number)[1], id - int(self._starts[number])

    def _usable(self, number: int) -> bool:
        """Whether the shard can be opened; False, once and for all, where it is damaged and quarantined."""
        if number in self._quarantined:
            return False
        try:
            self._shard(number)
        except DamagedShard as error:
            if self._on_damage is OnDamage.fail:
                raise
            self._quarantined.add(number)
            self._store.add(Counts(quarantined_shards=1))
            LOG.warning("left out: %s", error)
            return False
        return True

    def _shard(self, number: int) -> tuple[int, Members]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self._open_shards and next(iter(self._open)) not in self._needed:
            os.close(self._open.popitem(last=False)[1][0])
        entry = self._opened(number)
        self._open[number] = entry
        return entry

    def _opened(self, number: int) -> tuple[int, Members]:
        shard = self._index.shards[number]
        for _ in range(OPEN_TRIES):
            path, descriptor = self._store.open(shard)
            try:
                return descriptor, load_members(path, shard)
            except BaseException as error:
                os.close(descriptor)
                if not isinstance(error, FileNotFoundError):  # the file was evicted: its members are read by name
                    raise
        raise TransientError(f"{redact(shard.location)}: evicted while it was opened. Way out: raise data.cache_gib")


def from_a_place_of_its_own(numbers: list[int]) -> list[int]:
    """The same shards, begun elsewhere by each process, so that those of a machine do not all fetch the same one.

    Multiples of the golden ratio, here of process numbers, are the farther apart the fewer they are.
    """
    begin = int(len(numbers) * (os.getpid() * GOLDEN % 1))
    return numbers[begin:] + numbers[:begin]
