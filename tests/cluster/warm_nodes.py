"""Launchers of nodes as processes of their own that start in no time, since a warm process forks them.

Each is what `python -m jobs.node` is, and so are its fork server and its ranks; only their imports happened before.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any

from launching import REPO, environment, wait_for

HERE = Path(__file__).parent
WARM = (
    "stand_in", "jobs.train", "orchestrator.cluster.node", "orchestrator.track.report", "orchestrator.train.earlier",
    "orchestrator.train.evaluation_job", "orchestrator.train.fit", "orchestrator.train.preflight",
)  # fmt: skip


@dataclass(frozen=True)
class Launcher:
    """One started launcher of a node."""

    nodes: WarmNodes
    pid: int
    folder: Path
    rank: int
    life: int

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it lives."""
        if self.pid not in self.nodes.codes:
            code = self.nodes.ask(poll=self.pid)
            if code is None:
                return None
            self.nodes.codes[self.pid] = code
        return self.nodes.codes[self.pid]

    def wait(self, timeout_s: float = 60) -> int:
        wait_for(lambda: self.poll() is not None, f"the end of node {self.rank}:\n{self.out}", timeout_s)
        return self.nodes.codes[self.pid]

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def out(self) -> str:
        path = self.folder / f"out_{self.life}_{self.rank}"
        return path.read_bytes().decode() if path.exists() else ""

    def last_words(self) -> dict[str, Any]:
        return json.loads((self.folder / f"last_words_{self.life}_{self.rank}").read_text())


class WarmNodes:
    """The warm process; `start` gives all nodes of a run their launchers."""

    def __init__(self, folder: Path):
        with open(folder / "warm_nodes.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                cwd=REPO, env=environment([HERE, HERE.parent]),
            )  # fmt: skip
        assert self._process.stdout is not None
        self.code_digest: str = json.loads(self._process.stdout.readline())
        self.started: list[Launcher] = []
        self.codes: dict[int, int] = {}
        """Exit codes by process id."""

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, bundle: Path, count: int = 2, entry: str = "stand_in:node_rank", only: int | None = None, **env: str
    ) -> list[Launcher]:
        """`only`: this node alone."""
        folder, port = bundle.parent, free_pair()
        life = len(self.started)
        launchers = []
        for rank in range(count) if only is None else [only]:
            variables = {
                "NODE_RANK": str(rank),
                "NUM_NODES": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TERMINATION_LOG": str(folder / f"last_words_{life}_{rank}"),
                "ASK_FILE": str(folder / f"ask_{rank}"),
                **env,
            }
            out = str(folder / f"out_{life}_{rank}")
            pid = self.ask(start=str(bundle), entry=entry, env=variables, out=out)
            launchers.append(Launcher(self, pid, folder, rank, life))
        self.started += launchers
        return launchers

    def end_all(self) -> None:
        """Kill what a test has left."""
        for launcher in self.started:
            if launcher.poll() is None:
                launcher.send(signal.SIGKILL)
                launcher.wait()
        self.started.clear()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def free_pair() -> int:
    """A free port whose next one is free, too."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", port + 1))
                return port


def _fork_instead(path: str, args: list[str], passed: tuple[int, ...]) -> int:
    """Start a Python process of multiprocessing's own as a fork, which has the imports already."""
    pid = os.fork()
    if pid:
        return pid
    try:
        kept = {0, 1, 2, *passed}
        for number in [int(name) for name in os.listdir("/proc/self/fd")]:
            if number not in kept:
                with suppress(OSError):
                    os.close(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        forkserver._forkserver._lock = threading.RLock()  # pyright: ignore[reportAttributeAccessIssue]
        import orchestrator.cluster.deaf  # noqa: F401

        exec(args[-1], {"__name__": "__main__"})
    finally:
        os._exit(0)


def _launch(request: Mapping[str, Any]) -> int:
    """What `python -m jobs.node` does, with another entry where a test names one."""
    from orchestrator.cluster import lifeline, stops
    from orchestrator.cluster.environment import read_node
    from orchestrator.cluster.node import run_node

    stop = stops.StopSignals()
    stop.listen()
    lifeline.SILENCE_S = 3.0
    os.environ.update(request["env"])
    module, _, name = request["entry"].partition(":")
    entry: Callable[..., None] = getattr(__import__(module, fromlist=[name]), name)
    code = run_node(read_node(), Path(request["start"]), entry, sys.stdout.buffer, stop, time.time())
    stops.end_deaf()
    return code


def _start(request: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, null), (1, out), (2, out)):
            os.dup2(source, target)
        code = _launch(request)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _serve() -> None:
    from orchestrator.bundle import imported_code
    from orchestrator.cluster import node

    for module in WARM:
        importlib.import_module(module)
    digest = imported_code()
    node.imported_code = lambda: digest  # what was imported, whatever somebody edits while the tests run
    print(json.dumps(digest), flush=True)
    util.spawnv_passfds = _fork_instead
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = _start(request)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
