"""A run's record in a store: what changed goes there, what a new machine needs comes from there, one writer a time."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import wait_for

from orchestrator.bundle import freeze
from orchestrator.cluster import stored
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.claim import POINTER, Claim, RecordTaken
from orchestrator.cluster.environment import Node
from orchestrator.cluster.life import Life, kept
from orchestrator.cluster.record_place import Record, SharedRecord
from orchestrator.cluster.speaker import Speaker
from orchestrator.cluster.stops import StopSignals
from orchestrator.cluster.stored import StoredRecord, place_of
from orchestrator.compose import compose
from orchestrator.errors import ConfigError, TransientError, UserError
from orchestrator.train.bucket import Bucket

Opened = Callable[[str], StoredRecord]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store" / "run"


@pytest.fixture
def opened(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """The record as a machine of this name keeps it."""
    monkeypatch.setattr(stored, "PAUSE_S", 0.05)
    every = list[StoredRecord]()

    def open_one(machine: str) -> StoredRecord:
        (tmp_path / machine).mkdir(exist_ok=True)
        every.append(StoredRecord(f"file://{store}", tmp_path / machine))
        return every[-1]

    yield open_one
    for record in every:
        record.close()


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != POINTER
    }


KEPT = {"run.json": "{}", "logs/attempt_1/rank_0.log": "a\n", "events/rank_0.jsonl": "{}\n", "samples/a.png": "p"}
UNKEPT = {
    "lock": "1", "logs/attempt_1/rank_0.heartbeat": "h", "logs/attempt_1/orders": "o", ".x.12.tmp": "half",
    "checkpoints/step_00000001/model.safetensors": "m", "logs/attempt_1/rank_0.stacks": "",
}  # fmt: skip


def test_what_changes_goes_to_the_store_and_what_only_lives_here_does_not(
    opened: Opened, tmp_path: Path, store: Path
) -> None:
    record, here = opened("a"), tmp_path / "a"
    record.claim()
    record.begin(1, range(1))
    write(here, {**KEPT, **UNKEPT})
    wait_for(lambda: files_of(store) == KEPT, "all files", 10)
    write(here, {"events/rank_0.jsonl": "{}\n{}\n"})
    wait_for(lambda: files_of(store)["events/rank_0.jsonl"] == "{}\n{}\n", "what was added", 10)
    (here / "report.html").write_text("page")
    assert record.flush(10) is None
    assert files_of(store) == {**KEPT, "events/rank_0.jsonl": "{}\n{}\n", "report.html": "page"}


def test_another_machine_goes_on_from_the_store_and_counts_the_attempts(
    opened: Opened, tmp_path: Path, store: Path
) -> None:
    write(
        store, {**KEPT, "events/rank_1.jsonl": "{}\n", "logs/attempt_2/rank_0.log": "b\n", "virtual_ranks.json": "{}"}
    )
    write(tmp_path / "a", {"events/rank_0.jsonl": "from an earlier life", "checkpoints/step_1/x": "kept", "lock": "1"})
    write(tmp_path / "a", {"logs/attempt_9/rank_0.log": "of a life that the store knows nothing of", "stop": ""})
    record = opened("a")
    record.claim()
    assert files_of(tmp_path / "a") == {
        "run.json": "{}", "events/rank_0.jsonl": "{}\n", "events/rank_1.jsonl": "{}\n", "virtual_ranks.json": "{}",
        "checkpoints/step_1/x": "kept", "lock": "1",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "a" / "logs").iterdir()] == ["attempt_2"]
    record.begin(3, range(1))
    again = opened("b")
    again.claim()
    assert [path.name for path in (tmp_path / "b" / "logs").iterdir()] == ["attempt_3"]


def test_another_node_goes_on_with_the_events_of_its_own_ranks(opened: Opened, tmp_path: Path, store: Path) -> None:
    first, other = opened("a"), opened("b")
    write(store, {f"events/rank_{rank}.jsonl": f"{rank}\n" for rank in range(4)})
    first.claim()
    first.begin(1, range(2))
    other.join(1, range(2, 4))
    assert files_of(tmp_path / "b") == {"events/rank_2.jsonl": "2\n", "events/rank_3.jsonl": "3\n"}
    write(tmp_path / "b", {"events/rank_2.jsonl": "2\n2\n", "logs/attempt_1/rank_2.log": "said\n"})
    assert other.flush(10) is None
    assert first.flush(10) is None
    assert (tmp_path / "a" / "events" / "rank_2.jsonl").read_text() == "2\n2\n", "the first node reports on all"
    assert files_of(store)["logs/attempt_1/rank_2.log"] == "said\n"
    assert not (tmp_path / "a" / "logs" / "attempt_1" / "rank_2.log").exists()


def test_the_result_comes_last_and_tells_the_others_that_the_run_is_over(
    opened: Opened, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = list[str]()
    put = Bucket.put_file
    monkeypatch.setattr(Bucket, "put_file", lambda self, key, path: (sent.append(key), put(self, key, path)))
    record, waiting = opened("a"), opened("b")
    record.claim()
    assert not waiting.is_finished()
    write(tmp_path / "a", {"result.json": '{"state": "done"}', "report.html": "page", "zzz": "z"})
    assert record.flush(10) is None
    assert sent[-1] == "result.json"
    wait_for(waiting.is_finished, "the news", 10)


def test_an_older_start_writes_nothing_once_a_newer_one_has_claimed_the_record(
    opened: Opened, tmp_path: Path, store: Path
) -> None:
    old, old_other = opened("a"), opened("b")
    old.claim()
    old.begin(1, range(1))
    old_other.join(1, range(1, 2))
    new = opened("c")
    new.claim()
    write(tmp_path / "a", {"result.json": "old"})
    wait_for(lambda: raised(old.check), "the end of the old one", 10)
    with pytest.raises(RecordTaken, match=r"so attempt 1 ends\. Way out: nothing"):
        old.flush(10)
    write(tmp_path / "b", {"events/rank_1.jsonl": "still the last attempt\n"})
    assert old_other.flush(10) is None
    new.begin(2, range(1))
    write(tmp_path / "b", {"events/rank_1.jsonl": "too late\n"})
    with pytest.raises(RecordTaken):
        old_other.flush(10)
    assert files_of(store) == {"events/rank_1.jsonl": "still the last attempt\n"}


def raised(check: Callable[[], None]) -> bool:
    try:
        check()
    except RecordTaken:
        return True
    return False


def test_what_a_stopped_writer_put_over_a_file_meanwhile_is_mended_at_the_end(
    opened: Opened, tmp_path: Path, store: Path
) -> None:
    record = opened("a")
    record.claim()
    write(tmp_path / "a", KEPT)
    assert record.flush(10) is None
    write(store, {"events/rank_0.jsonl": "an older one"})
    assert record.flush(10) is None
    assert files_of(store) == KEPT


def test_a_store_that_is_away_costs_a_warning_and_gets_all_when_it_is_back(
    opened: Opened, tmp_path: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = opened("a")
    record.claim()
    record.begin(1, range(1))
    shutil.move(store, tmp_path / "away")
    store.write_text("in its place")  # writing fails now
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "a", KEPT)
        wait_for(lambda: "its record is sent again" in caplog.text, "the warning", 10)
        assert str(record.flush(0.3)).startswith(f"file://{store}: ")
        os.unlink(store)
        shutil.move(tmp_path / "away", store)
        assert record.flush(20) is None
    assert files_of(store) == KEPT
    assert caplog.text.count("its record is sent again") == 1
    assert caplog.text.count("answers again") == 1


def test_a_store_that_does_not_answer_at_the_start_ends_with_75_and_one_that_refuses_with_42(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "START_TRIES", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    record = StoredRecord("s3://bucket/runs/a", tmp_path)
    with pytest.raises(TransientError, match=r"runs_dir = s3://bucket/runs: .*: the next start goes on"):
        record.claim()
    record.close()
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    nameless = StoredRecord("az://container/runs/a", tmp_path)
    with pytest.raises(ConfigError, match=r"runs_dir = az://container/runs: .*Account must be specified"):
        nameless.claim()
    nameless.close()


def test_the_record_s_own_pointer_survives_an_answer_that_was_lost(store: Path) -> None:
    bucket = Bucket(f"file://{store}")
    claim = Claim(bucket)
    claim.raise_generation()
    claim.raise_generation()
    claim.note_attempt(4)
    assert json.loads((store / POINTER).read_text()) == {"schema": 1, "generation": 2, "attempt": 4}
    claim.require_mine()
    bucket.close()


class Unreliable(SharedRecord):
    """A record whose store is away at these flushes."""

    def __init__(self, *away: bool):
        super().__init__(Path())
        self.away, self.limits = list(away), list[float]()

    def flush(self, limit_s: float) -> str | None:
        self.limits.append(limit_s)
        return "no answer" if self.away.pop(0) else None


def life_of(record: Record, node: int, out: io.BytesIO) -> Life:
    bundle = freeze(compose(["runs_dir=s3://bucket/runs", "cluster.grace_s=30"]))
    place = Node(node, 2, "127.0.0.1", 1, Path(), Path())
    return Life(place, bundle, record, bundle, Path(), print, Speaker(out, node), StopSignals(), 0.0)


@pytest.mark.parametrize(
    ("node", "away", "codes", "says"),
    [
        (0, [False, False], [0, 0], False),
        (0, [True, True], [75, 75], False),  # nobody hears that the run is done
        (0, [False, True], [0, 0], True),  # the result is there, its report is not
        (1, [True, True], [0, 0], True),
    ],
)
def test_a_run_whose_end_did_not_reach_the_store_has_not_ended(
    node: int, away: list[bool], codes: list[int], says: bool
) -> None:
    out, record = io.BytesIO(), Unreliable(*away)
    life = life_of(record, node, out)
    assert [kept(life, Ended(0)).exit_code for _ in codes] == codes
    assert (
        b"warning: runs_dir = s3://bucket/runs: the end of the record is on this node only" in out.getvalue()
    ) is says
    if away[0]:
        assert record.limits == [60, 0], "a store that was away is not waited for again"


def test_after_a_request_to_stop_the_store_is_waited_for_no_longer_than_the_node_has() -> None:
    record = Unreliable(True)
    life = life_of(record, 0, io.BytesIO())
    life.stop.ask(signal.SIGTERM)
    life.stop.t -= 20
    assert kept(life, Ended(143)).exit_code == 143
    assert 7 < record.limits[0] <= 8


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", ""])
def test_nothing_of_a_store_is_written_outside_of_the_folder(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match="lies outside"):
        place_of(tmp_path, key)
