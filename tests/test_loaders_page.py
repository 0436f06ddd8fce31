"""The page of the loaders' comparison says of itself where this project is behind, and draws what was measured."""

from __future__ import annotations

from typing import Any

from tests.bench.loaders import remote
from tests.bench.loaders.behind import COLUMNS, PEERS, sentences
from tests.bench.loaders.catalogue import LIMIT, LOADERS


def figure(speed: float, seconds: float = 1.0, mib: int = 100) -> dict[str, Any]:
    one = {
        "images_per_cpu_s": speed, "images_per_cpu_s_range": [speed - 5, speed + 5], "images_per_s": speed,
        "first_batch_s": seconds, "memory_mib_per_worker": mib, "ratio": 1.0,
    }  # fmt: skip
    return {"1": one, "2": one}


def measured(**changed: dict[str, Any]) -> dict[str, Any]:
    """Ours ahead of all in everything, but for what is changed."""
    figures = {name: figure(1000) if loader.is_ours else figure(500, 2.0, 200) for name, loader in LOADERS.items()}
    return {"loaders": figures | changed}


def test_nothing_is_said_where_ours_is_ahead_in_all() -> None:
    assert sentences(measured()) == []


def test_a_faster_peer_is_named_with_both_figures() -> None:
    assert sentences(measured(ffcv=figure(1200, 2.0, 200)))[:2] == [
        "orchestrator, images/s per core: FFCV has 1,200 against 1,000.",
        "orchestrator, images/s with two workers: FFCV has 1,200 against 1,000.",
    ]


def test_a_difference_within_the_rounds_is_called_one() -> None:
    said = sentences(measured(ffcv_rn50=figure(1008, 2.0, 200)))
    assert (
        "orchestrator, half-size shards, images/s per core: FFCV, rn50 format has 1,008 against 1,000 (the rounds'"
        in (" ".join(said))
    )


def test_of_seconds_and_memory_less_is_ahead() -> None:
    assert sentences(measured(dali=figure(500, 0.5, 50))) == [
        "orchestrator, seconds to the first batch: NVIDIA DALI on CPU has 0.5 against 1.0.",
        "orchestrator, MiB with one worker: NVIDIA DALI on CPU has 50 against 100.",
        "orchestrator, MiB per worker with two: NVIDIA DALI on CPU has 50 against 100.",
    ]


def test_the_limit_is_compared_with_shards_that_it_reads_too_and_only_there() -> None:
    (said,) = sentences(measured(**{LIMIT: figure(1100, 0.1, 1)}))
    assert said.startswith("orchestrator, other people's shards, images/s per core: practical limit")


def test_measurements_of_other_modules_are_told_where_they_exist() -> None:
    result = measured() | {
        "resume": {"ours": {"fresh_s": 0.5, "midway_s": 0.4}, "litdata": {"fresh_s": 0.4, "midway_s": 0.6}},
        "remote": {"ours": {"cold_images_per_s": 10.0}, "mosaic_io": {"absent": "no"}, "litdata": "broken"},
    }
    assert sentences(result) == ["orchestrator, seconds to a fresh epoch's first batch: litdata has 0.4 against 0.5."]
    assert sentences({"loaders": {}, "remote": {"absent": "no weed"}}) == []


def test_every_peer_and_column_is_looked_at() -> None:
    for name in PEERS:
        assert len(sentences(measured(**{name: figure(9000, 0.1, 1)}))) >= 5
    assert len({column.place for column in COLUMNS}) == len(COLUMNS)


class FakeLoader:
    """Fails from some round on."""

    def __init__(self, good: int):
        self._good = good

    def round(self, number: int) -> dict[str, float]:
        if number >= self._good:
            raise RuntimeError("lost its store")
        return {"cold_images_per_s": float(number), "warm_images_per_s": 10.0}


def test_a_loader_that_fails_from_the_store_leaves_the_others_their_figures() -> None:
    loaders: Any = {"ours": FakeLoader(9), "litdata": FakeLoader(0), "mosaic_io": FakeLoader(1)}
    found = remote.measure(loaders)
    assert found["ours"]["cold_images_per_s"] == (remote.TIMES - 1) / 2
    assert found["ours"]["rounds"] == remote.TIMES
    assert found["litdata"] == {"absent": "lost its store"}
    assert found["mosaic_io"] == ({"absent": "lost its store"} if remote.TIMES > 1 else found["mosaic_io"])
