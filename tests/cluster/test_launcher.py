"""The launcher with real processes that run a stand-in job: deaths, hangs, restarts, stops, places, leftovers."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import stand_in
from launching import REPO, environment, group_members, read_events, wait_for

from orchestrator.bundle import Bundle, freeze
from orchestrator.cluster import local
from orchestrator.cluster.cause import Ended
from orchestrator.compose import compose
from orchestrator.files import write_json

BASE = (
    "data=synthetic",
    "compute.device=cpu",
    "cluster.max_restarts=9",
    "cluster.backoff_s=0",
    "cluster.grace_s=10",
    "compute.virtual_ranks=off",
)
SPARE_S = 5.0
"""A hang must be found within its budget and this."""
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    local.PRELOADED.append("stand_in")
    local.warm_up()
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()  # the server has imported all by now, and no test measures that


@dataclass
class Site:
    """A run's folder and what a launcher made of it."""

    runs: Path
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert self.folder, "asked for here, since threads of a test ask too, and Hydra composes one config at a time"

    @cached_property
    def folder(self) -> Path:
        return self.bundle().folder

    def bundle(self, *overrides: str) -> Bundle:
        return freeze(compose([*BASE, "compute.num_processes=2", f"runs_dir={self.runs}", *overrides]))

    def script(self, **script: Any) -> Path:
        path = self.folder / "script.json"
        write_json(path, {"steps": 10, **script})
        return path

    def launch(self, *overrides: str, entry: Callable[..., None] = stand_in.rank, **script: Any) -> Ended:
        began = time.monotonic()
        ended = local.run_attempts(self.bundle(*overrides), entry, (str(self.script(**script)),))
        self.seconds = time.monotonic() - began
        return ended

    def told(self, what: str) -> list[dict[str, Any]]:
        path = self.folder / "told.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["what"] == what]

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "events" / "launcher.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["kind"] == kind]

    def saved(self) -> int:
        return json.loads((self.folder / "saved.json").read_text())["step"]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path)
    yield found
    for line in found.told("began") + found.told("struck"):
        assert not alive(line["pid"]), f"rank {line['rank']} of attempt {line['attempt']} is still there"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def slow(*values: Any, **more: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow, **more)


def blow(do: str, where: str = "step", step: int = 5, rank: int = 1, **more: Any) -> dict[str, Any]:
    return {"do": do, "where": where, "step": step, "rank": rank, **more}


class TestDeaths:
    @pytest.mark.parametrize(
        ("do", "code", "error"),
        [
            ("raise", 1, "ArithmeticError: a made-up fault"),
            ("exit 0", 1, "SystemExit: 0"),
            slow("exit 7", 7, "ended with code 7"),
            ("user", 42, "made.up = 1: cannot be. Way out: 2"),
            slow("node", 44, "/made/up: disk full"),
            slow("network", 75, "the store is away"),
            ("SIGKILL", 137, "killed by SIGKILL"),
            slow("SIGSEGV", 139, "killed by SIGSEGV"),
            ("abort", 134, "killed by SIGABRT"),
            ("SIGTERM", 143, None),
            slow("SIGINT", 130, None),
        ],
    )
    def test_each_cause_ends_in_its_code_and_is_told_with_its_rank(
        self, site: Site, do: str, code: int, error: str | None
    ) -> None:
        ended = site.launch("cluster.max_restarts=0", blows=[blow(do)])
        assert (ended.exit_code, ended.error) == (code, error)
        assert len(site.told("struck")) == 1
        if error:
            assert ended.rank == 1
            (fault,) = site.events("fault")
            assert (fault["rank"], fault["exit_code"], fault["error"]) == (1, code, error)
        assert [event["exit_code"] for event in site.events("end")] == [code]

    @pytest.mark.slow
    def test_what_only_a_retry_can_mend_is_retried_and_what_none_can_is_not(self, site: Site) -> None:
        ended = site.launch(
            blows=[
                blow("SIGKILL", attempts=[1]),
                blow("raise", attempts=[2]),
                blow("network", attempts=[3]),
                blow("user", attempts=[4]),
            ]
        )
        assert ended.exit_code == 42
        assert [event["attempt"] for event in site.events("fault")] == [1, 2, 3, 4]

    def test_a_run_that_was_killed_goes_on_from_its_last_save(self, site: Site) -> None:
        assert site.launch(blows=[blow("SIGKILL", attempts=[1])]) == Ended(0)
        assert [(line["attempt"], line["step"]) for line in site.told("began") if line["rank"] == 0] == [(1, 0), (2, 4)]
        assert [event["pause_s"] for event in site.events("restart")] == [0]

    def test_peers_of_a_dead_rank_are_killed_at_once(self, site: Site) -> None:
        site.launch("cluster.max_restarts=0", blows=[blow("sleep", rank=0), blow("SIGKILL", rank=1)])
        (struck,) = [line for line in site.told("struck") if line["rank"] == 1]
        (end,) = site.events("end")
        assert end["t"] - struck["t"] < 2  # the sleeping peer would be waited for much longer

    @pytest.mark.slow
    def test_a_broken_connection_never_hides_the_rank_that_broke_it(self, site: Site) -> None:
        for do, code in (("SIGKILL", 137), ("raise", 1)):
            ended = site.launch("cluster.max_restarts=0", blows=[blow(do)], step_s=0)
            assert (ended.exit_code, ended.rank) == (code, 1)


class TestProgress:
    def test_a_fault_that_always_comes_at_step_7_ends_the_run_with_43_after_three_attempts(self, site: Site) -> None:
        ended = site.launch(blows=[blow("raise", step=7)])
        assert (ended.exit_code, ended.rank) == (43, 1)
        assert "3 attempts without getting beyond step 6" in str(ended.error)
        assert "ArithmeticError: a made-up fault" in str(ended.error)
        assert "ArithmeticError" in str(ended.traceback)
        assert [line["attempt"] for line in site.told("struck")] == [1, 2, 3]

    @pytest.mark.slow
    def test_so_does_one_before_the_first_step(self, site: Site) -> None:
        ended = site.launch(blows=[blow("raise", where="start", step=0)])
        assert ended.exit_code == 43
        assert len(site.told("struck")) == 3

    def test_faults_at_steps_7_9_and_11_do_not(self, site: Site) -> None:
        blows = [blow("raise", step=step, attempts=[number]) for number, step in enumerate((7, 9, 11, 13, 15), 1)]
        assert site.launch(blows=blows, steps=20, save_every=100) == Ended(0)
        assert len(site.told("struck")) == 5

    @pytest.mark.slow
    def test_kills_from_outside_never_end_it(self, site: Site) -> None:
        assert site.launch(blows=[blow("SIGKILL", step=7, attempts=[1, 2, 3, 4, 5])]) == Ended(0)

    @pytest.mark.slow
    def test_restarts_run_out_with_the_last_cause(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        ended = site.launch("cluster.max_restarts=2", blows=[blow("SIGKILL")])
        assert (ended.exit_code, ended.error) == (137, "killed by SIGKILL")
        assert [event["kind"] for event in site.events("restart")] == ["restart"] * 2
        assert "attempt 1: rank 1: killed by SIGKILL; starts again at once (1 of 2)" in caplog.text


HANGS = [
    pytest.param("SIGSTOP", "step", ", stopped by a signal (SIGSTOP)", "stand_in.py", id="stopped"),
    slow("sleep", "batch", "", "stand_in.py", id="loader"),
    slow("unmatched collective", "step", "", "in _meet_alone", id="collective"),
    pytest.param("hold the interpreter", "step", "", "in _hold_interpreter", id="interpreter"),
]


class TestHangs:
    @pytest.mark.parametrize(("do", "where", "words", "frame"), HANGS)
    def test_a_hang_is_found_in_time_and_named_with_rank_phase_step_and_stack(
        self, site: Site, do: str, where: str, words: str, frame: str
    ) -> None:
        ended = site.launch("cluster.hang_step_s=1", "cluster.max_restarts=0", blows=[blow(do, where=where)])
        assert (ended.exit_code, ended.rank, ended.hung) == (1, 1, True)
        (fault,), (struck,) = site.events("fault"), site.told("struck")
        assert fault["t"] - struck["t"] < 1 + SPARE_S
        assert (fault["rank"], fault["phase"], fault["step"], fault["detected_by"]) == (1, "step", 4, "heartbeat")
        assert re.match(r"hung: no sign of life for \d\.\d s in phase step after step 4 \(", fault["error"])
        assert fault["error"].endswith(f"(cluster.hang_step_s = 1){words}")
        peers, _, own = str(ended.traceback).partition("Stack of rank 1")
        assert "Stack of rank 0 (waits for other ranks)" in peers
        assert frame in own

    @pytest.mark.slow
    def test_a_hung_run_goes_on_by_itself(self, site: Site) -> None:
        assert site.launch("cluster.hang_step_s=1", blows=[blow("sleep", attempts=[1])]) == Ended(0)
        assert [line["step"] for line in site.told("began") if line["rank"] == 0] == [0, 4]

    @pytest.mark.slow
    @pytest.mark.parametrize(("where", "step", "phase", "key"), [("save", 4, "save", "hang_save_s")])
    def test_each_phase_has_its_own_budget(self, site: Site, where: str, step: int, phase: str, key: str) -> None:
        ended = site.launch(f"cluster.{key}=1", "cluster.max_restarts=0", blows=[blow("sleep", where=where, step=step)])
        (fault,) = site.events("fault")
        assert (fault["rank"], fault["phase"], fault["step"]) == (1, phase, step)
        assert f"(cluster.{key} = 1)" in str(ended.error)

    @pytest.mark.slow
    def test_a_rank_that_never_gave_a_sign_is_hung_in_its_start(self, site: Site) -> None:
        ended = site.launch("cluster.hang_start_s=1", "cluster.max_restarts=0", entry=stand_in.mute)
        assert ended.hung
        assert "in phase start" in str(ended.error)
        assert site.seconds < 1 + SPARE_S

    def test_a_long_save_of_one_rank_is_no_hang_of_those_that_wait(self, site: Site) -> None:
        assert site.launch("cluster.hang_step_s=1", steps=2, save_s=2.0) == Ended(0)


def later(seconds: float, do: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, do)
    timer.start()
    return timer


def once(condition: Callable[[], Any], do: Callable[[], Any]) -> threading.Thread:
    """Do something as soon as a condition holds."""

    def wait() -> None:
        wait_for(condition, "what the test waits for", 30)
        do()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


class TestStops:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), slow(signal.SIGINT, 130)])
    @pytest.mark.parametrize("times", [slow(1), 3])
    def test_a_signal_to_the_launcher_ends_all_after_saving(
        self, site: Site, number: signal.Signals, code: int, times: int
    ) -> None:
        def strike() -> None:
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.05)

        thread = once(lambda: site.told("began"), strike)
        ended = site.launch(steps=1000, step_s=0.05, save_s=0.2)
        thread.join()
        assert ended == Ended(code)
        assert 0 < site.saved() < 1000
        assert signal.getsignal(number) is not signal.SIG_IGN

    @pytest.mark.slow
    def test_one_rank_hears_it_and_all_stop_at_the_same_step(self, site: Site) -> None:
        thread = once(lambda: site.told("began"), lambda: os.kill(site.told("began")[-1]["pid"], signal.SIGTERM))
        assert site.launch(steps=1000, step_s=0.05) == Ended(143)
        thread.join()

    def test_a_rank_that_does_not_save_in_time_is_killed_and_it_is_said(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        thread = once(lambda: site.told("struck"), lambda: os.kill(os.getpid(), signal.SIGTERM))
        ended = site.launch("cluster.grace_s=1", blows=[blow("sleep")])
        thread.join()
        assert ended == Ended(143)
        assert "cluster.grace_s = 1: ranks 0, 1 had not saved" in caplog.text
        assert "rank 1 was at" in caplog.text
        assert site.seconds < 10

    @pytest.mark.slow
    def test_a_signal_in_the_pause_before_a_restart_ends_the_run(self, site: Site) -> None:
        thread = once(lambda: len(site.events("fault")) == 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        ended = site.launch("cluster.backoff_s=60", blows=[blow("SIGKILL")])
        thread.join()
        assert ended == Ended(143)
        assert site.seconds < 20

    @pytest.mark.slow
    def test_an_empty_stop_file_stops_at_the_next_step_and_is_gone(self, site: Site) -> None:
        thread = once(lambda: site.told("began"), lambda: (site.folder / "stop").touch())
        assert site.launch(steps=1000, step_s=0.05) == Ended(45)
        thread.join()
        assert site.saved() < 1000

    def test_a_number_in_the_stop_file_is_the_last_step(self, site: Site) -> None:
        site.folder.mkdir(parents=True)
        (site.folder / "stop").write_text("7\n")
        assert site.launch(steps=1000, step_s=0.05) == Ended(45)
        assert site.saved() == 7

    @pytest.mark.slow
    def test_the_deadline_leaves_time_for_the_save(self, site: Site) -> None:
        began = time.time()
        bundle = site.bundle("compute.max_time_s=8")
        script = site.script(steps=1000, step_s=0.05, save_s=0.5)
        ended = local.run_attempts(bundle, stand_in.rank, (str(script),), began)
        assert ended == Ended(45)
        assert 4 < time.time() - began < 8
        assert site.saved() > 2


class TestPlaces:
    @pytest.mark.slow
    def test_the_run_goes_on_with_what_is_left_and_grows_back(self, site: Site) -> None:
        """4 places, then 2, a kill amid them, then 4 again."""
        places = site.folder / "places"

        def operate() -> None:
            wait_for(lambda: site.told("began"), "the first group")
            time.sleep(0.5)
            places.write_text("2")
            wait_for(lambda: [line for line in site.told("began") if line["world_size"] == 2], "the smaller group")
            time.sleep(0.5)
            pid = [line for line in site.told("began") if line["world_size"] == 2][-1]["pid"]
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: len({line["attempt"] for line in site.told("began")}) == 3, "its next attempt")
            time.sleep(0.5)
            places.unlink()

        thread = threading.Thread(target=operate)
        thread.start()
        ended = site.launch("compute.num_processes=1:4", steps=120, step_s=0.03, save_every=5)
        thread.join()
        assert ended == Ended(0)
        groups = [(event["kind"], event["world_size"]) for event in site.events("launch") + site.events("restart")]
        assert groups == [("launch", 4), ("restart", 2), ("restart", 2), ("restart", 4)]
        assert len(site.events("fault")) == 1
        starts = [line["step"] for line in site.told("began") if line["rank"] == 0]
        assert starts == sorted(starts)

    def test_a_lost_device_costs_its_place(self, site: Site) -> None:
        ended = site.launch("compute.num_processes=1:3", blows=[blow("device", attempts=[1])])
        assert ended == Ended(0)
        assert [event["world_size"] for event in site.events("restart")] == [2]

    def test_a_fixed_number_is_never_changed(self, site: Site) -> None:
        site.folder.mkdir(parents=True)
        (site.folder / "places").write_text("1")
        assert site.launch(blows=[blow("node", attempts=[1])]) == Ended(0)
        assert [event["world_size"] for event in site.events("restart")] == [2]


LAUNCHER = """
import sys
sys.path.insert(0, {here!r})
import stand_in
from orchestrator.bundle import freeze
from orchestrator.cluster import local
from orchestrator.compose import compose
local.PRELOADED.append("stand_in")
local.warm_up()
sys.exit(local.run_attempts(freeze(compose({overrides!r})), stand_in.rank, ({script!r},)).exit_code)
"""


class TestLeftovers:
    @pytest.fixture
    def launcher(self, site: Site) -> Iterator[Callable[..., subprocess.Popen[str]]]:
        """A launcher of its own, which the test may kill."""
        started = []

        def start(*overrides: str, **script: Any) -> subprocess.Popen[str]:
            every = [*BASE, "compute.num_processes=2", f"runs_dir={site.runs}", *overrides]
            code = LAUNCHER.format(here=str(Path(__file__).parent), overrides=every, script=str(site.script(**script)))
            env = environment([Path(__file__).parent])
            process = subprocess.Popen(
                [sys.executable, "-c", code], cwd=REPO, env=env, text=True, start_new_session=True
            )
            started.append(process)
            return process

        yield start
        for process in started:
            for pid in group_members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()

    @pytest.mark.parametrize("do", [slow("sleep"), slow("SIGSTOP"), "hold the interpreter"])
    def test_nothing_outlives_a_launcher_that_was_killed(
        self, site: Site, launcher: Callable[..., subprocess.Popen[str]], do: str
    ) -> None:
        process = launcher(blows=[blow(do)])
        wait_for(lambda: site.told("struck"), "the fifth step", 60)
        assert len(group_members(process.pid)) >= 4
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not group_members(process.pid), "the end of every process", 20)

    @pytest.mark.slow
    def test_a_signal_to_the_whole_process_group_still_lets_the_ranks_save(
        self, site: Site, launcher: Callable[..., subprocess.Popen[str]]
    ) -> None:
        process = launcher(steps=1000, step_s=0.05, save_s=0.3)
        wait_for(lambda: len(site.told("began")) == 2, "the first step", 60)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=20) == 143
        assert site.saved() >= 1
        wait_for(lambda: not group_members(process.pid), "the fork server's end", 20)

    @pytest.mark.slow
    def test_the_port_is_free_after_the_end_and_taken_meanwhile(self, site: Site) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for _ in range(2):
            assert site.launch(f"compute.master_port={port}", blows=[blow("SIGKILL", attempts=[1])]) == Ended(0)
            (site.folder / "saved.json").unlink()


def test_events_of_ranks_are_left_alone(site: Site) -> None:
    site.launch()
    assert read_events(site.folder) == []


def test_a_torn_line_of_a_killed_launcher_is_closed(site: Site) -> None:
    path = site.folder / "events" / "launcher.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"kind": "lau')
    site.launch()
    first, *others = path.read_text().splitlines()
    assert first == '{"kind": "lau'
    assert [json.loads(line)["kind"] for line in others] == ["launch", "end"]


def test_nothing_is_printed_below_the_command_line(site: Site, capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("orchestrator").setLevel(logging.CRITICAL)
    try:
        site.launch("cluster.max_restarts=0", blows=[blow("raise")])
    finally:
        logging.getLogger("orchestrator").setLevel(logging.NOTSET)
    assert capfd.readouterr().out == ""
