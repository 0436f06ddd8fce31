"""Launchers of two nodes on loopback: deaths, silences, stops, and the bits of a run that both train."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from launching import Cli, Run, wait_for
from warm_nodes import Launcher, WarmNodes, free_pair

from orchestrator.bundle import freeze, load_bundle, write_bundle
from orchestrator.cluster import lifeline
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.environment import leave_last_words, read_node
from orchestrator.cluster.first_node import alone
from orchestrator.cluster.group import Place, Start, rank_env
from orchestrator.cluster.lines import Said, read_lines
from orchestrator.cluster.meeting import Hello, Patience, gather, reach, refuse
from orchestrator.cluster.node import processes_here
from orchestrator.cluster.peers import Report, exit_code_of, judge
from orchestrator.cluster.stops import StopSignals
from orchestrator.compose import compose
from orchestrator.config import ComputeConfig
from orchestrator.errors import ConfigError, TransientError, UserError
from orchestrator.files import write_json

pytestmark = pytest.mark.timeout(120)
SECONDS = 8.0
"""In which both nodes must be gone after whatever happened to one: silence is judged after 3 s here."""


@pytest.fixture(scope="session")
def warm_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmNodes]:
    nodes = WarmNodes(tmp_path_factory.mktemp("warm_nodes"))
    yield nodes
    nodes.close()


@dataclass
class Site:
    """A run that two nodes share."""

    nodes: WarmNodes
    path: Path
    """Of run.json as the pods have it."""
    folder: Path
    """Of the run."""

    def script(self, **script: Any) -> None:
        write_json(self.folder / "script.json", {"steps": 10, **script})

    def start(self, **more: Any) -> list[Launcher]:
        return self.nodes.start(self.path, **more)

    def codes(self, launchers: list[Launcher], timeout_s: float = 60) -> list[int]:
        return [launcher.wait(timeout_s) for launcher in launchers]

    def told(self, what: str) -> list[dict[str, Any]]:
        path = self.folder / "told.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["what"] == what]

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "events" / "launcher.jsonl"
        return [event for event in map(json.loads, path.read_text().splitlines()) if event["kind"] == kind]

    def words(self, node: int) -> dict[str, Any]:
        """The last ones of a node that started alone."""
        return json.loads(max(self.path.parent.glob(f"last_words_*_{node}")).read_text())

    def running(self) -> list[Launcher]:
        """Both nodes, once their ranks compute."""
        launchers = self.start()
        wait_for(lambda: len(self.told("began")) == 2, f"the ranks:\n{launchers[0].out}", 60)
        return launchers


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def site(warm_nodes: WarmNodes, tmp_path: Path, small: tuple[str, ...]) -> Iterator[Site]:
    found = make_site(warm_nodes, tmp_path, *small)
    yield found
    warm_nodes.end_all()
    pids = [line["pid"] for line in found.told("began") + found.told("struck")]
    wait_for(lambda: not any(map(alive, pids)), "the end of every rank", 10)


def make_site(nodes: WarmNodes, path: Path, *overrides: str) -> Site:
    every = ["compute.num_nodes=2", "cluster.hang_start_s=60", "cluster.canary=false", *overrides]
    every.append(f"runs_dir={path}/runs")
    bundle = replace(freeze(compose([*every, "cluster.grace_s=10"])), code_digest=nodes.code_digest)
    bundle.folder.mkdir(parents=True)
    write_bundle(bundle, path / "run.json", {})
    return Site(nodes, path / "run.json", bundle.folder)


def blow(do: str, where: str = "step", step: int = 5, rank: int = 1, **more: Any) -> dict[str, Any]:
    return {"do": do, "where": where, "step": step, "rank": rank, **more}


def with_config(site: Site, *overrides: str) -> Site:
    """The same run with keys that may change between attempts."""
    bundle = load_bundle(site.path)
    changed = replace(freeze(compose([*bundle.overrides, *overrides])), code_digest=bundle.code_digest)
    write_bundle(changed, site.path, {})
    return site


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def said(launcher: Launcher) -> list[Said]:
    return list(read_lines(launcher.out.split("\n")))


def report(rank: int, code: int, *errors: dict[str, Any], starved: bool = False) -> Report:
    return Report({rank: code}, errors, starved)


def lost(why: str) -> Report:
    return Report({}, lost=why)


def failure(rank: int, code: int, t: float) -> dict[str, Any]:
    return {"t": t, "rank": rank, "kind": "X", "exit_code": code, "error": f"error of rank {rank}", "traceback": None}


class TestDeaths:
    @pytest.mark.parametrize(
        ("do", "rank", "codes", "error"),
        [
            ("SIGKILL", 1, [75, 137], "killed by SIGKILL"),
            ("SIGKILL", 0, [137, 75], "killed by SIGKILL"),
            slow("raise", 0, [1, 75], "ArithmeticError: a made-up fault"),
            # what a broken connection looks like, too: its rank takes its time to end, as its victims do
            ("broken peer", 1, [75, 1], "RuntimeError: Connection closed by peer"),
            ("user", 1, [75, 42], "made.up = 1: cannot be. Way out: 2"),
            slow("node", 1, [75, 44], "/made/up: disk full"),
            slow("network", 0, [75, 75], "the store is away"),
            slow("abort", 1, [75, 134], "killed by SIGABRT"),
        ],
    )
    def test_the_failing_node_ends_with_its_own_code_and_the_others_with_75(
        self, site: Site, do: str, rank: int, codes: list[int], error: str
    ) -> None:
        site.script(blows=[blow(do, rank=rank)])
        launchers = site.start()
        assert site.codes(launchers) == codes
        (struck,), (fault,) = site.told("struck"), site.events("fault")
        assert (fault["rank"], fault["error"], fault["step"], fault["attempt"]) == (rank, error, 4, 1)
        assert site.events("end")[0]["t"] - struck["t"] < SECONDS
        for launcher, code in zip(launchers, codes, strict=True):
            words = {"rank": rank, "error": error, "exit_code": code, "attempt": 1, "node": launcher.rank}
            assert words.items() <= launcher.last_words().items()
            assert said(launcher)[-1].text.endswith(f"error: rank {rank}: {error}")
        result = json.loads((site.folder / "result.json").read_text())
        assert (result["state"], result["rank"], result["error"]) == ("failed", rank, error)
        assert (site.folder / "report.html").exists()

    def test_the_next_life_of_both_goes_on_from_the_last_save(self, site: Site) -> None:
        site.script(blows=[blow("SIGKILL", attempts=[1])])
        assert site.codes(site.start()) == [75, 137]
        second = site.start()
        assert site.codes(second) == [0, 0]
        assert [(line["attempt"], line["step"]) for line in site.told("began") if line["rank"] == 0] == [(1, 0), (2, 4)]
        assert {(line["rank"], line["world_size"]) for line in site.told("began")} == {(0, 2), (1, 2)}
        assert [launcher.last_words()["attempt"] for launcher in second] == [2, 2]
        assert [launcher.last_words()["step"] for launcher in second] == [10, 10]

    @pytest.mark.slow
    def test_of_several_ranks_a_node_the_first_one_to_die_is_named(self, site: Site) -> None:
        site = with_config(site, "compute.num_processes=4")
        site.script(blows=[blow("SIGKILL", rank=2)])
        assert site.codes(site.start()) == [75, 137]
        assert {(line["rank"], line["world_size"]) for line in site.told("began")} == {(rank, 4) for rank in range(4)}
        assert site.events("fault")[0]["rank"] == 2

    @pytest.mark.parametrize("node", [0, 1])
    def test_a_launcher_that_is_killed_takes_the_other_node_with_it(self, site: Site, node: int) -> None:
        site.script(steps=10_000)
        launchers, began = site.running(), time.monotonic()
        launchers[node].send(signal.SIGKILL)
        other = launchers[1 - node]
        assert site.codes(launchers) == [-9 if number == node else 75 for number in (0, 1)]
        assert time.monotonic() - began < SECONDS
        assert str(other.last_words()["error"]).startswith(f"node {node} is gone: ")  # closed or reset

    @pytest.mark.slow
    def test_so_does_one_that_is_stopped_and_it_ends_once_it_runs_again(self, site: Site) -> None:
        site.script(steps=10_000)
        launchers, began = site.running(), time.monotonic()
        launchers[1].send(signal.SIGSTOP)
        assert launchers[0].wait() == 75
        assert time.monotonic() - began < SECONDS
        assert str(launchers[0].last_words()["error"]).startswith("node 1 is gone: silent for ")
        launchers[1].send(signal.SIGCONT)
        assert launchers[1].wait() == 75

    @pytest.mark.slow
    def test_a_hang_is_found_on_whichever_node_it_is_with_the_stacks_of_both(self, site: Site) -> None:
        site = with_config(site, "cluster.hang_step_s=2")
        site.script(blows=[blow("sleep", where="batch")])
        launchers = site.start()
        assert site.codes(launchers) == [75, 1]
        (fault,) = site.events("fault")
        assert (fault["rank"], fault["step"], fault["detected_by"]) == (1, 4, "heartbeat")
        text = launchers[0].out
        assert "Stack of rank 0 (waits for other ranks)" in text
        assert "stand_in.py" in text.partition("Stack of rank 1")[2]

    @pytest.mark.slow
    def test_three_failures_at_one_step_end_the_run_with_43_over_three_lives(self, site: Site) -> None:
        site.script(blows=[blow("raise", step=7)])
        assert [site.codes(site.start()) for _ in range(2)] == [[75, 1]] * 2
        launchers = site.start()
        assert site.codes(launchers) == [43, 43]
        assert "3 attempts without getting beyond step 6" in launchers[0].last_words()["error"]
        site.script()  # the cause is mended, and somebody starts it again
        assert site.codes(site.start()) == [0, 0]


class TestStops:
    @pytest.mark.parametrize("node", [slow(0), 1])
    def test_a_signal_to_one_launcher_lets_all_ranks_save_at_one_step(self, site: Site, node: int) -> None:
        site.script(steps=10_000, step_s=0.02, save_every=10_000)
        launchers = site.running()
        launchers[node].send(signal.SIGTERM)
        assert site.codes(launchers) == [143, 143]
        stopped = {launcher.last_words()["step"] for launcher in launchers}
        assert stopped == {json.loads((site.folder / "saved.json").read_text())["step"]}
        assert [event["exit_code"] for event in site.events("end")] == [143]
        site.script(steps=max(stopped) + 3)
        assert site.codes(site.start()) == [0, 0]

    @pytest.mark.parametrize("node", [slow(0), 1])
    def test_a_rank_that_does_not_save_in_time_is_killed_on_its_node(self, site: Site, node: int) -> None:
        site = with_config(site, "cluster.grace_s=1")
        site.script(blows=[blow("sleep")])
        launchers = site.start()
        wait_for(lambda: site.told("struck"), "the fifth step", 60)
        launchers[node].send(signal.SIGTERM)
        assert site.codes(launchers) == [143, 143]
        assert "cluster.grace_s = 1: ranks 1 had not saved" in launchers[1].out

    def test_who_waits_for_the_others_stops_at_once(self, site: Site) -> None:
        site.script()
        (launcher,) = site.start(only=1)
        time.sleep(1.0)
        launcher.send(signal.SIGTERM)
        assert launcher.wait(10) == 143
        assert launcher.last_words()["attempt"] == 0


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([report(0, 0), report(1, 0)], (0, None, None)),
        ([report(0, 143), report(1, 143)], (143, None, None)),
        ([report(0, 0), report(1, 143)], (143, None, None)),
        ([report(0, 45, failure(0, 44, 5.0)), report(1, 45)], (44, 0, "error of rank 0")),
        # the first error counts, whichever node tells it first, and a death without a word before any error
        ([report(0, 1, failure(0, 1, 5.1)), report(1, 1, failure(1, 1, 5.0))], (1, 1, "error of rank 1")),
        ([report(0, 1, failure(0, 1, 5.0)), report(1, -9)], (137, 1, "killed by SIGKILL")),
        ([report(0, 1, failure(0, 1, 5.0)), lost("silent")], (75, None, "node 1 is gone: silent")),
        ([report(0, -9), lost("closed")], (137, 0, "killed by SIGKILL")),
        ([report(0, -9, starved=True)], (137, 0, "killed by SIGKILL because memory ran out")),
        ([report(0, -15)], (143, None, None)),  # before it could listen
        ([report(0, 0), lost("x"), lost("y")], (75, None, "node 1 is gone: x")),
    ],
)
def test_the_verdict_names_what_the_other_failures_followed_from(
    reports: list[Report], expected: tuple[int, int | None, str | None]
) -> None:
    ended = judge(dict(enumerate(reports)))
    assert (ended.exit_code, ended.rank, ended.error) == expected


@pytest.mark.parametrize(
    ("ended", "codes"),
    [
        (Ended(0), [0, 0]),
        (Ended(143), [143, 143]),
        (Ended(42, 1, "x"), [75, 42]),
        (Ended(137, 0, "x"), [137, 75]),
        (Ended(43, 1, "x"), [43, 43]),
        (Ended(75, None, "node 1 is gone"), [75, 75]),
    ],
)
def test_each_node_has_its_exit_code(ended: Ended, codes: list[int]) -> None:
    assert [exit_code_of(ended, range(node, node + 1)) for node in (0, 1)] == codes


class TestMeeting:
    @pytest.mark.slow
    def test_a_node_that_comes_late_is_waited_for(self, site: Site) -> None:
        site.script()
        port = str(free_pair())
        (other,) = site.start(only=1, MASTER_PORT=port)
        time.sleep(1.5)
        (first,) = site.start(only=0, MASTER_PORT=port)
        assert site.codes([first, other]) == [0, 0]

    def test_a_node_that_dies_before_all_are_there_may_come_again(self) -> None:
        port, own, found = free_pair(), Hello("run", "code", 3, "cpu", 0), dict[int, int]()
        line = lifeline.listen(port)
        thread = threading.Thread(target=lambda: found.update(gather(line, own, Patience(StopSignals(), 30))))
        thread.start()

        def come(node: int) -> lifeline.Lifeline:
            other = lifeline.connect("127.0.0.1", port)
            other.send(0, "hello", **asdict(replace(own, node=node)))
            return other

        others = [come(1)]
        time.sleep(0.5)
        others[0].close()
        time.sleep(0.5)
        others.append(come(2))
        time.sleep(0.5)
        assert thread.is_alive()
        others.append(come(1))
        thread.join(10)
        assert found == {1: 2, 2: 1}
        for end in (*others, line):
            end.close()

    @pytest.mark.slow
    def test_nodes_that_never_come_end_the_wait_with_75(self, site: Site) -> None:
        site = with_config(site, "cluster.hang_start_s=2")
        site.script()
        assert [site.start(only=node)[0].wait() for node in (0, 1)] == [75, 75]
        assert "nodes 1 did not come within cluster.hang_start_s = 2" in site.words(0)["error"]
        assert "node 0 did not come to MASTER_ADDR = 127.0.0.1" in site.words(1)["error"]

    @pytest.mark.slow
    def test_a_name_that_resolves_late_is_waited_for(self) -> None:
        port, own = free_pair(), Hello("run", "code", 2, "cpu", 1)
        line, asked = lifeline.listen(port), list[float]()

        def resolve(name: str) -> str:
            asked.append(time.monotonic())
            if len(asked) < 4:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return "127.0.0.1"

        def go() -> None:
            for peer in gather(line, replace(own, node=0), Patience(StopSignals(), 30)).values():
                line.send(peer, "go", attempt=7)

        thread = threading.Thread(target=go)
        thread.start()
        met = reach(own, lambda: False, "run-0.run", port, Patience(StopSignals(), 30), resolve)
        thread.join()
        assert met is not None
        assert (met.attempt, met.address, len(asked)) == (7, "127.0.0.1", 4)
        assert met.line.own_address(0) == "127.0.0.1"
        met.line.close()
        line.close()

    def test_a_name_that_never_resolves_ends_the_wait_with_75_and_the_reason(self) -> None:
        def resolve(name: str) -> str:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        own = Hello("run", "code", 2, "cpu", 1)
        with pytest.raises(
            TransientError, match=r"MASTER_ADDR = run-0.run, port 7 \(Name or service not known\) within"
        ):
            reach(own, lambda: False, "run-0.run", 7, Patience(StopSignals(), 1), resolve)

    @pytest.mark.parametrize(
        ("changed", "code", "words"),
        [
            ({"code_digest": "other"}, 42, "node 1 has code_digest = other and node 0 has code"),
            ({"run_id": "other"}, 42, "run_id"),
            ({"num_nodes": 3}, 42, "num_nodes = 3"),
            ({"device": "cpu"}, 44, "node 1 sees no GPU"),
        ],
    )
    def test_a_node_that_is_of_another_kind_is_refused(self, changed: dict[str, Any], code: int, words: str) -> None:
        own = Hello("run", "code", 2, "cuda", 0)
        refusal = refuse(asdict(own), {**asdict(own), "node": 1, **changed})
        assert refusal is not None
        assert refusal[0] == code
        assert words in refusal[1]
        assert refuse(asdict(own), {**asdict(own), "node": 1}) is None

    def test_code_that_is_not_the_bundle_s_is_refused_on_every_node(self, site: Site) -> None:
        content = json.loads(site.path.read_text())
        write_json(site.path, {**content, "code_digest": "0123456789abcdef"})
        launchers = site.start()
        assert site.codes(launchers) == [42, 42]
        for launcher in launchers:
            error = launcher.last_words()["error"]
            assert content["code_digest"][:12] in error
            assert "0123456789ab" in error

    def test_another_number_of_nodes_than_was_submitted_is_refused(self, site: Site) -> None:
        (launcher,) = site.start(count=3, only=2)
        assert launcher.wait() == 42
        assert "compute.num_nodes = 2: but NUM_NODES says 3" in launcher.last_words()["error"]


def test_a_rank_knows_its_place_among_all_and_on_its_node() -> None:
    start = Start(
        print, (), Place(3, 29500, node=1, num_nodes=2, address="10.0.0.1"), 0, {"GLOO_SOCKET_IFNAME": "eth0"}
    )
    assert list(start.place.ranks) == [3, 4, 5]
    assert rank_env(start, 4) == {
        "RANK": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0",
        "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


@pytest.mark.parametrize(("processes", "nodes", "here"), [("4", 2, 2), ("2", 1, 2), ("1:4", 2, 2), ("auto", 3, 1)])
def test_the_processes_are_spread_evenly_over_the_nodes(processes: str, nodes: int, here: int) -> None:
    assert processes_here(compute(f"compute.num_processes={processes}"), nodes) == here


def test_processes_that_cannot_be_spread_evenly_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"compute.num_processes = 3: cannot be spread evenly over compute.num_nodes = 2"
    ):
        processes_here(compute("compute.num_processes=3"), 2)


def compute(*overrides: str) -> ComputeConfig:
    return compose(["data=synthetic", "compute.device=cpu", *overrides]).config.compute


class TestEnvironment:
    GOOD: ClassVar = {"NODE_RANK": "1", "NUM_NODES": "2", "MASTER_ADDR": "run-0.run", "MASTER_PORT": "29500"}

    def test_it_says_which_node_this_is(self) -> None:
        node = read_node(self.GOOD)
        assert (node.rank, node.count, node.address, node.port) == (1, 2, "run-0.run", 29500)
        assert (str(node.termination_log), str(node.ask_file)) == ("/dev/termination-log", "/etc/orchestrator/ask/ask")

    @pytest.mark.parametrize("name", GOOD)
    def test_each_variable_is_needed(self, name: str) -> None:
        with pytest.raises(UserError, match=rf"{name}=\(missing\)"):
            read_node({key: value for key, value in self.GOOD.items() if key != name})

    @pytest.mark.parametrize(("name", "value"), [("NODE_RANK", "2"), ("NODE_RANK", "-1"), ("MASTER_PORT", "tcp://x")])
    def test_wrong_ones_are_named(self, name: str, value: str) -> None:
        with pytest.raises(UserError, match=f"{name}={value}"):
            read_node({**self.GOOD, name: value})

    def test_without_them_the_program_says_so_in_one_line(self, cli: Cli) -> None:
        answer = cli.cold("run.json", module=("-m", "jobs.node"))
        assert answer.code == 42
        assert answer.err.startswith("error: the environment of this node says NODE_RANK=(missing)")
        assert answer.err.count("\n") == 1

    def test_last_words_fit_into_what_kubernetes_keeps(self, tmp_path: Path) -> None:
        leave_last_words(tmp_path / "words", {"run_id": "r", "error": "ż" * 10_000})
        content = (tmp_path / "words").read_bytes()
        assert len(content) < 4096
        assert json.loads(content)["schema"] == 1
        leave_last_words(tmp_path / "no" / "folder", {"error": None})


class TestRequests:
    @pytest.mark.slow
    def test_the_stacks_of_living_ranks_are_told_once_and_they_go_on(self, site: Site) -> None:
        site.script(steps=10_000, blows=[blow("SIGSTOP", rank=1)])
        launchers = site.start()
        wait_for(lambda: site.told("struck"), "the fifth step", 60)
        for launcher in launchers:
            (site.path.parent / f"ask_{launcher.rank}").write_text("stack-1")
            wait_for(lambda launcher=launcher: "stack-1 end" in launcher.out, "the answer", 20)
            (site.path.parent / f"ask_{launcher.rank}").write_text("stack-1\nstack-2\n")
            wait_for(lambda launcher=launcher: "stack-2 end" in launcher.out, "the next answer", 20)
            answer = [line for line in said(launcher) if line.ask == "stack-1"]
            assert [(line.kind, line.ranks) for line in answer if line.kind == "stack end"] == [
                ("stack end", [launcher.rank])
            ]
            assert {line.rank for line in answer[:-1]} == {launcher.rank}
            assert any("stand_in.py" in line.text for line in answer)
        assert launchers[1].out.count("stopped by a signal (SIGSTOP)") == 2  # and stopped again after the first answer
        assert all(map(alive, [line["pid"] for line in site.told("began")]))
        os.kill(site.told("struck")[0]["pid"], signal.SIGCONT)
        launchers[1].send(signal.SIGTERM)
        assert site.codes(launchers) == [143, 143]


def test_two_nodes_end_with_the_bits_of_two_local_processes_whatever_was_killed(
    site: Site, trained: Run, small: tuple[str, ...], tmp_path: Path
) -> None:
    site = make_site(site.nodes, tmp_path / "real", *small, "recipe.ema_decay=0.9", "checkpointing.every_steps=3")
    launchers = site.start(entry="jobs.train:rank")
    saved = site.folder / "events" / "rank_0.jsonl"
    wait_for(lambda: saved.exists() and '"save"' in saved.read_text(), f"a save:\n{launchers[0].out}", 60)
    launchers[1].send(signal.SIGKILL)
    assert site.codes(launchers) == [75, -9]
    second = site.start(entry="jobs.train:rank")
    assert site.codes(second) == [0, 0]
    result = json.loads((site.folder / "result.json").read_text())
    for key in ("run_id", "state", "step", "weights_sha256", "state_sha256", "metrics", "world_size"):
        assert result[key] == trained.result[key], key
    assert result["attempts"] == 2
    facts = [line.facts for line in said(second[0]) if line.kind == "progress"]
    assert {"step": 14, "total_steps": 14, "attempt": 2, "run_id": result["run_id"]}.items() <= facts[-1].items()
    for launcher in second:
        log = site.folder / "logs" / "attempt_2" / f"rank_{launcher.rank}.log"
        lines = [line for line in said(launcher) if line.rank == launcher.rank]
        assert [line.text for line in lines] == log.read_text().splitlines()
        assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    (late,) = site.start(only=1)  # a pod that the cluster replaced after the end
    assert late.wait() == 0
    assert "is already finished" in late.out


class TestFirstNodeAlone:
    @pytest.mark.slow
    def test_its_canary_comes_before_the_first_attempt_and_never_again(
        self, site: Site, trained: Run, small: tuple[str, ...], tmp_path: Path
    ) -> None:
        more = ("recipe.ema_decay=0.9", "cluster.canary=true")
        site = make_site(site.nodes, tmp_path / "real", *small, *more)
        launchers = site.start(entry="jobs.train:rank")
        assert site.codes(launchers, 120) == [0, 0]
        checks = [line.text for line in said(launchers[0]) if line.text.startswith("canary: ")]
        assert {text.split()[1] for text in checks} <= {"ok", "warn"}
        assert any(text.startswith("canary: ok resume (") for text in checks)
        result = json.loads((site.folder / "result.json").read_text())
        assert result["weights_sha256"] == trained.result["weights_sha256"]
        assert [path.name for path in site.folder.parent.iterdir()] == [result["run_id"]]
        second = site.start(entry="jobs.train:rank")
        assert site.codes(second) == [0, 0]
        assert "canary" not in second[0].out

    def test_what_it_finds_ends_the_run_before_an_attempt(
        self, site: Site, shards: Path, small: tuple[str, ...], tmp_path: Path
    ) -> None:
        torn = tmp_path / "torn"
        shutil.copytree(shards, torn)
        first = min((torn / "train").glob("*.tar"))
        content = bytearray(first.read_bytes())
        content[700] ^= 1
        first.write_bytes(content)
        more = ("cluster.canary=true", f"data.train={torn}/train", f"data.val={torn}/val")
        site = make_site(site.nodes, tmp_path / "real", *small, *more)
        (launcher,) = site.start(entry="jobs.train:rank", only=0)
        assert launcher.wait(120) == 42
        error = str(launcher.last_words()["error"])
        assert error.startswith("canary: shards: ")
        assert first.name in error
        result = json.loads((site.folder / "result.json").read_text())
        assert (result["state"], result["exit_code"], result["error"]) == ("failed", 42, error)
        assert not (site.folder / "logs").exists()


@pytest.mark.parametrize(("processes", "world", "batch", "own"), [(8, 64, 2048, 256), (1, 2, 7, 3), (4, 4, 12, 12)])
def test_the_first_node_alone_computes_as_many_images_in_each_process(
    processes: int, world: int, batch: int, own: int
) -> None:
    keys = (f"compute.num_processes={world}", "compute.num_nodes=2", f"recipe.global_batch_size={batch}")
    config = alone(compose(keys).config, processes, world)
    assert config.recipe.global_batch_size == own
    assert (config.compute.num_processes, config.compute.num_nodes) == (str(processes), 1)
