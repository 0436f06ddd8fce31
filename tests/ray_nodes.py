"""Real Ray clusters for tests: one node on this machine, or two in network namespaces joined by a bridge.

Every process of a node is started here and ended here by its id; two nodes need root and iproute2.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

BIN = Path(sys.executable).parent
UP_S = 60.0
STORE_BYTES = 80 << 20
NETWORK = "10.213.{}.{}"


@dataclass
class Node:
    """One `ray start --block` and all that it started."""

    process: subprocess.Popen[bytes]
    namespace: str | None

    def pids(self) -> list[int]:
        """Living processes of this node."""
        if self.namespace is not None:
            told = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
            return [int(pid) for pid in told.stdout.split()]
        return descendants(self.process.pid)

    def kill(self) -> None:
        """Every process at once, as when a machine goes."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """In order, then by force."""
        pids = self.pids()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        for pid in {*pids, *self.pids()}:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class RayCluster:
    """A cluster with token authentication."""

    address: str
    token_file: Path
    folder: Path
    nodes: list[Node] = field(default_factory=list)
    add: Callable[[], None] = lambda: None
    """Start another node in the place of the second one."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """What a submitter says to reach it."""
        return (
            "cluster=ray",
            f"cluster.address={self.address}",
            f"cluster.token_file={self.token_file}",
            f"cluster.python={sys.executable}",
            f"cluster.insecure={'false' if '127.0.0.1' in self.address else 'true'}",
            "cluster.memory_gib_per_process=0.5",
        )


@contextmanager
def one_node(cpus: int = 2) -> Iterator[RayCluster]:
    """A head on loopback that computes, too."""
    with _folder() as folder, ExitStack() as stack:
        ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
        cluster = _cluster(folder, f"http://127.0.0.1:{ports['dashboard-port']}")
        options = [f"--{name}={port}" for name, port in ports.items()]
        head = ["--head", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", *options]
        stack.callback(lambda: [node.end() for node in cluster.nodes])
        cluster.nodes.append(_start(cluster, None, "1", head))
        _wait_for(cluster, nodes=1)
        yield cluster


@contextmanager
def two_nodes(cpus: int = 1) -> Iterator[RayCluster]:
    """A head and another node, each with an address of its own; the head's dashboard is reached over the bridge."""
    with _folder() as folder, _namespaces() as (first, second, net), ExitStack() as stack:
        head_ip, other_ip = NETWORK.format(net, 1), NETWORK.format(net, 2)
        cluster = _cluster(folder, f"http://{head_ip}:8265")
        stack.callback(lambda: [node.end() for node in reversed(cluster.nodes)])
        head = ["--head", f"--node-ip-address={head_ip}", "--port=6379", "--dashboard-host=0.0.0.0"]
        cluster.nodes.append(_start(cluster, first, "1", [*head, f"--num-cpus={cpus}"]))
        _wait_for(cluster, nodes=1)
        other = [f"--address={head_ip}:6379", f"--node-ip-address={other_ip}", f"--num-cpus={cpus}"]

        def add() -> None:
            cluster.nodes.append(_start(cluster, second, str(len(cluster.nodes) + 1), other))

        cluster.add = add
        add()
        _wait_for(cluster, nodes=2)
        yield cluster


def _cluster(folder: Path, address: str) -> RayCluster:
    token_file = folder / "token"
    token_file.write_text(secrets.token_hex(32))
    token_file.chmod(0o600)
    return RayCluster(address, token_file, folder)


@contextmanager
def _folder() -> Iterator[Path]:
    """Short: Ray's sockets lie below it, and their paths have 107 characters."""
    folder = Path(f"/tmp/ray{os.getpid()}_{secrets.token_hex(2)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(cluster: RayCluster) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    return {
        **kept,
        "PATH": f"{BIN}{os.pathsep}{kept['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": cluster.token_file.read_text(),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }


def _start(cluster: RayCluster, namespace: str | None, name: str, options: Sequence[str]) -> Node:
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    command = [
        *inside, str(BIN / "ray"), "start", "--block", f"--temp-dir={cluster.folder}/{name}",
        f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats", *options,
    ]  # fmt: skip
    with open(cluster.folder / f"node_{name}.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment(cluster), start_new_session=True, cwd=cluster.folder
        )
    return Node(process, namespace)


def _wait_for(cluster: RayCluster, nodes: int) -> None:
    until = time.monotonic() + UP_S
    while True:
        with suppress(URLError, OSError, ValueError):
            if _living_nodes(cluster) == nodes:
                return
        logs = "".join(path.read_text() for path in sorted(cluster.folder.glob("node_*.log")))
        assert time.monotonic() < until, f"no cluster of {nodes} nodes within {UP_S} s:\n{logs}"
        assert all(node.process.poll() is None for node in cluster.nodes), logs
        time.sleep(0.2)


def _living_nodes(cluster: RayCluster) -> int:
    _get(cluster, "/api/jobs/")  # up later than the rest
    nodes = _get(cluster, "/nodes?view=summary")["data"]["summary"]
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def _get(cluster: RayCluster, path: str) -> Any:
    request = Request(f"{cluster.address}{path}")
    request.add_header("Authorization", f"Bearer {cluster.token_file.read_text()}")
    with urlopen(request, timeout=5) as answer:
        return json.load(answer)


@contextmanager
def _namespaces() -> Iterator[tuple[str, str, int]]:
    """Two network namespaces on a bridge that this machine has an address on as well."""
    tag = secrets.token_hex(2)
    net, bridge, names = int(tag[:2], 16), f"rb{tag}", [f"ray-{tag}-1", f"ray-{tag}-2"]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{NETWORK.format(net, 254)}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, name in enumerate(names, start=1):
            outer = f"rv{tag}{number}"
            _ip("netns", "add", name)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outer, "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{NETWORK.format(net, number)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names[0], names[1], net
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


def can_make_namespaces() -> bool:
    """Whether this machine lets two nodes have networks of their own."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with _namespaces():
            return True
    except subprocess.CalledProcessError:
        return False


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid: int) -> list[int]:
    """A process and everything below it, by /proc."""
    parents = dict[int, int]()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                parents[int(folder.name)] = int(fields[1])
    found = [pid] if pid in parents else []
    for one in found:
        found.extend(child for child, parent in parents.items() if parent == one)
    return found
