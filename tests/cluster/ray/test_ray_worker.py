"""A worker's part without Ray: the environment of its rank, its end, hangs, pauses, questions."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.bundle import Bundle, write_bundle
from orchestrator.cluster.cause import Ended
from orchestrator.cluster.ray import ask, hang, meeting
from orchestrator.cluster.ray.errand import now_file, run_errand
from orchestrator.errors import ConfigError, UserError
from orchestrator.train.heartbeat import Sign
from orchestrator.train.stacks import stacks_file


@pytest.fixture(scope="module")
def worker() -> Any:
    """The module that imports Ray, which takes seconds."""
    from orchestrator.cluster.ray import worker

    return worker


@pytest.fixture(scope="module")
def scaling(worker: Any) -> Any:
    from orchestrator.cluster.ray import scaling

    return scaling


def place(worker: Any) -> Any:
    here = {"rank": 5, "local_rank": 1, "local_world_size": 4, "node": 1}
    return worker.Place(attempt=3, world_size=8, address="10.0.0.1", port=4711, began=0.0, **here)


def test_a_rank_gets_torchrun_s_variables_and_none_of_ray_s(worker: Any, bundle: Bundle) -> None:
    env = worker.rank_env(bundle, place(worker), {"RAY_AUTH_TOKEN": "canary", "HOME": "/h", "OMP_NUM_THREADS": "4"})
    root = str(Path(__file__).parents[3])
    assert {key: value for key, value in env.items() if not key.endswith("_SOCKET_IFNAME")} == {
        "HOME": "/h",
        "PYTHONPATH": root,
        "OMP_NUM_THREADS": "1",
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4711",
        "TORCHELASTIC_RESTART_COUNT": "3",
    }


def test_an_interface_that_the_user_names_is_kept(worker: Any, bundle: Bundle) -> None:
    env = worker.rank_env(bundle, place(worker), {"GLOO_SOCKET_IFNAME": "ib0"})
    assert env["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize(
    ("code", "own", "ended"),
    [
        (143, [], Ended(143, 1)),
        (-9, [], Ended(137, 1, "killed by SIGKILL", signal=9)),
        (-15, [], Ended(143)),
        (3, [], Ended(3, 1, "ended with code 3", by_itself=True)),
        (
            42,
            [{"rank": 1, "t": 1.0, "exit_code": 42, "error": "data.train = x", "traceback": None, "kind": "DataError"}],
            Ended(42, 1, "data.train = x", by_itself=True),
        ),
    ],
)
def test_the_end_of_a_rank_is_read_from_its_code_and_what_it_left(
    worker: Any, code: int, own: list[dict[str, Any]], ended: Ended
) -> None:
    assert worker.cause_of(1, code, own, out_of_memory=False) == ended


def test_a_kill_for_memory_is_the_run_s_own_failure(worker: Any) -> None:
    assert worker.cause_of(1, -9, [], out_of_memory=True).by_itself


@pytest.mark.parametrize(
    ("processes", "workers"), [("4", 4), ("2:8", (2, 8)), ("3:3", 3)]
)  # fmt: skip
def test_a_range_of_processes_is_ray_s_elastic_range(
    scaling: Any, bundle: Bundle, processes: str, workers: int | tuple[int, int]
) -> None:
    config = replace(bundle.config, compute=replace(bundle.config.compute, num_processes=processes))
    found = scaling.scaling_of(config, {"CPU": 64.0})
    assert (found.num_workers, found.use_gpu, found.placement_strategy) == (workers, False, "PACK")
    assert found.resources_per_worker == {"CPU": 1.0, "memory": float(4 << 30)}


def test_a_gpu_for_each_process_where_the_device_asks_for_it(scaling: Any, bundle: Bundle) -> None:
    from orchestrator.options import Device

    def gpus(device: Device, there: float) -> bool:
        config = replace(bundle.config, compute=replace(bundle.config.compute, device=device))
        return scaling.scaling_of(config, {"GPU": there}).use_gpu

    assert [gpus(Device.cpu, 8), gpus(Device.auto, 8), gpus(Device.auto, 0), gpus(Device.cuda, 0)] == [
        False, True, False, True,
    ]  # fmt: skip


def test_a_node_that_does_not_see_what_the_driver_wrote_is_named(bundle: Bundle) -> None:
    meeting.write_driver(bundle.folder, "run-2", "token")
    meeting.require_one_folder(bundle, "token", timeout_s=0)
    with pytest.raises(ConfigError, match=r"runs_dir = .* is not the same folder on all nodes: .* does not see"):
        meeting.require_one_folder(bundle, "another", timeout_s=0)


def test_a_node_with_other_code_is_named(bundle: Bundle) -> None:
    meeting.require_same_code(bundle)
    with pytest.raises(UserError, match=r"imported other code .* than the run was submitted with \(000000000000\)"):
        meeting.require_same_code(replace(bundle, code_digest="0" * 64))


def test_the_next_attempt_waits_for_the_pause_that_the_judge_ordered(bundle: Bundle) -> None:
    bundle.folder.mkdir(parents=True)
    assert meeting.wait_until_due(bundle.folder) is None
    meeting.put_off(bundle.folder, 0.2)
    began = time.monotonic()
    assert meeting.wait_until_due(bundle.folder) == 0.2
    assert 0.15 < time.monotonic() - began < 1
    assert meeting.wait_until_due(bundle.folder) is None


def watch(bundle: Bundle) -> hang.Watch:
    cluster = replace(bundle.config.cluster, hang_step_s=10.0, hang_start_s=100.0)
    return hang.Watch(replace(bundle, config=replace(bundle.config, cluster=cluster)), 1, 2, began=0.0)


def test_silence_is_measured_by_the_clock_of_the_node_that_watches(bundle: Bundle) -> None:
    watching = watch(bundle)
    strange = {rank: Sign(1, "step", 5, -1e6, 7 + rank) for rank in (0, 1)}
    watching.note(strange, now=50.0)
    watching.note(strange, now=59.0)
    assert {rank: sign.t for rank, sign in watching.seen.items()} == {0: 50.0, 1: 50.0}
    watching.note({0: replace(strange[0], beats=9)}, now=60.0)
    assert watching.seen[0].t == 60.0


def test_a_worker_ends_its_own_rank_where_the_group_hangs_by_its_fault(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, signs = watch(bundle), {0: Sign(1, "step", 5, 0.0, 9), 1: Sign(2, "step", 5, 0.0, 8)}
    monkeypatch.setattr(hang, "read_signs", lambda *_: signs)
    monkeypatch.setattr(hang.time, "monotonic", lambda: 0.0)
    assert watching.find_hung(1, 0) is None
    monkeypatch.setattr(hang.time, "monotonic", lambda: 11.0)
    monkeypatch.setattr(hang, "dump_stacks", lambda *_: {})
    assert watching.find_hung(0, 0) is None
    ended = watching.find_hung(1, 0)
    assert ended is not None
    assert (ended.exit_code, ended.rank, ended.hung, ended.by_itself) == (1, 1, True, True)
    assert ended.error == ("hung: no sign of life for 11.0 s in phase step after step 5 (cluster.hang_step_s = 10)")


RANK = """
import sys, time
from pathlib import Path
from orchestrator.train.stacks import tell_stacks
file = tell_stacks(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_question_is_answered_once_by_the_living_ranks(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = stacks_file(bundle.folder, 1, 0)
    child = subprocess.Popen([sys.executable, "-c", RANK, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    asked, done = ask.StacksAsked(bundle.folder, path), threading.Event()

    def serve() -> None:
        while not done.wait(0.05):
            asked.answer(child.pid)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert run_errand("stacks", bundle.folder) == 0
    finally:
        done.set()
        thread.join()
        child.kill()
        child.communicate()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[a1 r0 stack-1 #1] ")
    assert lines[-1] == "[a1 n0 stack-1 end] 0"


def test_a_rank_that_does_not_listen_yet_is_not_killed_by_a_question(bundle: Bundle) -> None:
    bundle.folder.mkdir(parents=True)
    asked = ask.StacksAsked(bundle.folder, stacks_file(bundle.folder, 1, 0))
    ask.ask_file(bundle.folder).write_text("1")
    child = subprocess.Popen(["sleep", "60"])
    asked.answer(child.pid)
    time.sleep(0.05)
    assert child.poll() is None
    child.kill()
    child.wait()


def test_what_ray_hands_over_is_told_apart(worker: Any) -> None:
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    from orchestrator.cluster.ray.driver import ends_of

    ended = Ended(42, 0, "no", by_itself=True)
    lost = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    number, told, gone = ends_of({0: worker.RankEnded(3, ended), 1: lost, 2: KeyError("step")})
    assert (number, told[0], list(gone)) == (3, ended, [1])
    assert gone[1].startswith("The actor died unexpectedly")
    assert (told[2].exit_code, told[2].error, told[2].by_itself) == (1, "its worker failed: KeyError: 'step'", True)


def test_an_errand_leaves_the_order_to_end_without_a_save(bundle: Bundle) -> None:
    bundle.folder.mkdir(parents=True)
    run_errand("now", bundle.folder)
    assert now_file(bundle.folder).exists()


def test_a_rank_whose_worker_is_gone_before_it_could_follow_it_ends(bundle: Bundle) -> None:
    write_bundle(bundle, bundle.folder / "run.json", {})
    command = [sys.executable, "-m", "jobs.ray_driver", "--rank", str(bundle.folder / "run.json"), "1", "0.0", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_program_needs_a_run() -> None:
    command, here = [sys.executable, "-m", "jobs.ray_driver"], Path(__file__).parents[3]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 42
    assert "give one run.json. Way out" in done.stderr
