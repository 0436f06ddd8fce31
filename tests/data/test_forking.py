import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest

from tests.data.test_stream import make_set

PRELUDE = """
import os, sys, time
from multiprocessing import current_process
from orchestrator.data import forking
from orchestrator.data.forking import SureForkContext, _SurePopen

replaced = []
take_back = _SurePopen._take_back
_SurePopen._take_back = lambda self: (replaced.append(self.pid), take_back(self))
held = []  # whether each fork in turn is to hang before it runs, as by a lock that is never freed
os.register_at_fork(before=lambda: held.append(len(held) < HANGING))
os.register_at_fork(after_in_child=lambda: held[-1] and time.sleep(3600))
context = SureForkContext()
"""


def told_by(script: str, hanging: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = PRELUDE.replace("HANGING", str(hanging)) + dedent(script)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=100, check=False
    )


def test_a_fork_that_begins_is_not_replaced() -> None:
    told = told_by(
        """
        process = context.Process(target=print, args=("ran",), kwargs={"flush": True})
        process.start(); process.join()
        print(process.exitcode, len(replaced))
        """,
        hanging=0,
    )
    assert told.stdout.split() == ["ran", "0", "0"], told.stderr


def test_a_fork_that_hangs_before_it_runs_is_killed_and_made_again() -> None:
    told = told_by(
        """
        forking.PATIENCE_S = (0.2, 0.2, 5)
        process = context.Process(target=print, args=("ran",), kwargs={"flush": True})
        process.start(); process.join()
        print(process.exitcode, len(replaced), *(os.path.exists(f"/proc/{pid}") for pid in replaced))
        """,
        hanging=2,
    )
    assert told.stdout.split() == ["ran", "0", "2", "False", "False"], told.stderr


def test_forks_that_all_hang_end_with_a_named_error() -> None:
    told = told_by(
        """
        forking.PATIENCE_S = (0.1, 0.2)
        try:
            context.Process(target=print).start()
        except Exception as error:
            print(type(error).__name__, error)
        """,
        hanging=9,
    )
    assert told.stdout.startswith("TransientError 2 forked processes in turn did not begin within 0.3 s."), told.stderr


def test_a_process_that_dies_at_once_is_left_to_who_waits_for_it() -> None:
    told = told_by(
        """
        os.register_at_fork(after_in_child=lambda: os._exit(7))
        process = context.Process(target=print)
        process.start(); process.join()
        print(process.exitcode, len(replaced))
        """,
        hanging=0,
    )
    assert told.stdout.split() == ["7", "0"], told.stderr


def test_no_descriptor_is_left_open() -> None:
    told = told_by(
        """
        forking.PATIENCE_S = (0.1, 5)
        def run():
            process = context.Process(target=int); process.start(); process.join(); process.close()
        run(); before = len(os.listdir("/proc/self/fd"))
        for _ in range(5): run()
        print(len(os.listdir("/proc/self/fd")) - before, len(replaced))
        """,
        hanging=1,
    )
    assert told.stdout.split() == ["0", "1"], told.stderr


def test_an_epoch_is_read_whole_though_its_loaders_hang_at_their_first_fork(tmp_path: Path) -> None:
    told = told_by(
        """
        import numpy as np
        from dataclasses import replace
        from orchestrator.compose import compose
        from orchestrator.data.index import load_index
        from orchestrator.data.order import EvalPlan
        from orchestrator.data.stream import Split, eval_loader

        index = load_index(sys.argv[1])
        config = compose(["data=synthetic", "data.num_workers=2", "data.image_size=8"]).config.data
        loader = eval_loader(EvalPlan(index.num_samples, 4, 1), Split(index, config, 0, 9, 0, 1))
        ids = np.concatenate([batch.ids.numpy().copy() for batch in loader])
        print(len(replaced), sorted(ids[ids >= 0].tolist()) == list(range(index.num_samples)))
        """,
        1, str(make_set(tmp_path / "set", (7, 4, 6))),
    )  # fmt: skip
    assert told.stdout.split() == ["1", "True"], told.stderr


@pytest.mark.slow
def test_forks_beside_the_threads_of_gloo_all_run(tmp_path: Path) -> None:
    """Before CPython 3.11.10 about one fork in 500 hangs here, and is made again."""
    script = """
        import torch, torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from torch.utils.data import DataLoader
        from orchestrator.train.exchange import TreeExchange, tree_hook
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 4), rank=int(sys.argv[2]), world_size=4)
        model = DistributedDataParallel(torch.nn.Linear(100, 10))
        model.register_comm_hook(TreeExchange(dist.new_group(), lambda *_: None), tree_hook)
        for n in range(500):
            model(torch.ones(1, 100)).sum().backward()
            dist.all_reduce(torch.tensor([n]))
            assert len(list(DataLoader([1, 2], num_workers=1, multiprocessing_context=context))) == 2
        print("all of 500, made again:", len(replaced))
        """
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(told_by, script, 0, str(tmp_path / "store"), str(rank)) for rank in range(4)]
    for rank in ranks:
        assert rank.result().stdout.startswith("all of 500"), rank.result().stderr
        print(rank.result().stdout)
