"""What `shards bench` measures and concludes."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

from orchestrator.compose import compose
from orchestrator.data.bench import (
    Reading,
    Report,
    Speed,
    bench_shards,
    default_workers,
    draw,
    fewest_worth,
    parse_workers,
    require_consume,
    wait_fraction,
)
from orchestrator.data.index import load_index
from orchestrator.data.plan import MakeOptions
from orchestrator.data.sources import SourceOptions
from orchestrator.data.writer import make_shards
from orchestrator.errors import ConfigError


@contextmanager
def quiet(*_):
    yield lambda n: None


@pytest.mark.parametrize(
    ("speed", "consume", "waits"), [(500, 1000, 0.5), (1000, 1000, 0), (3000, 1000, 0), (100, 1000, 0.9)]
)
def test_a_consumer_waits_for_the_share_that_the_loader_falls_short(speed, consume, waits):
    assert wait_fraction(speed, consume) == pytest.approx(waits)


@pytest.mark.parametrize(
    ("speeds", "worth"),
    [
        ({0: 100.0}, 0),
        ({0: 100.0, 1: 90.0, 2: 190.0, 4: 195.0}, 2),
        ({1: 100.0, 2: 94.9}, 1),
        ({1: 94.9, 2: 100.0}, 2),
        ({1: 95.0, 2: 100.0}, 1),
        ({4: 300.0, 1: 100.0, 2: 200.0}, 4),
    ],
)
def test_the_fewest_processes_within_a_twentieth_of_the_best_are_worth_it(speeds, worth):
    assert fewest_worth(speeds) == worth


@pytest.mark.parametrize(("cores", "tried"), [(1, [0, 1]), (2, [0, 1, 2]), (6, [0, 1, 2, 4, 6]), (8, [0, 1, 2, 4, 8])])
def test_processes_are_doubled_up_to_the_cores(cores, tried):
    assert default_workers(cores) == tried


def test_numbers_of_processes_are_read_in_any_order_and_each_once():
    assert parse_workers("4,0, 2,2") == [0, 2, 4]


@pytest.mark.parametrize("text", ["x", "1,,2", "-1", "1.5", "257", ""])
def test_what_is_no_number_of_processes_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=r"--workers = .*0 to 256.*Way out: e\.g\. --workers"):
        parse_workers(text)


@pytest.mark.parametrize("consume", [0, -1, float("nan"), float("inf")])
def test_a_consumer_without_speed_is_refused(consume):
    with pytest.raises(ConfigError, match="--consume"):
        require_consume(consume)


def test_a_chart_is_a_png():
    speeds = (Speed(0, 100, 0.5), Speed(2, 190, 0.05))
    report = Report("here", 10, 2, Reading(10**6, None, 900), 110, speeds, 2, 200)
    assert draw(report).startswith(b"\x89PNG")


def test_a_small_set_is_timed_on_real_files_with_and_without_processes(tmp_path):
    make_shards("synthetic", tmp_path, SourceOptions(samples=64, size=48), MakeOptions(workers=1), quiet)
    index = load_index(str(tmp_path / "train"))
    parts = []
    config = compose(["data=synthetic"]).config
    report = bench_shards(index, config, [0, 2], 1e9, parts.append, seconds=0.1)
    assert len(parts) == 4
    assert [speed.workers for speed in report.speeds] == [0, 2]
    assert all(speed.images_per_s > 0 and speed.wait_fraction > 0.9 for speed in report.speeds)
    assert report.reading.bytes == sum(shard.filesize for shard in index.shards)
    assert report.images_per_cpu_s > 0
    assert report.worth in (0, 2)
    assert json.loads(json.dumps(report.to_dict()))["global_batch_size"] <= index.num_samples
