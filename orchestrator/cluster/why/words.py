"""What an error's own words mean: a table of patterns, the first of which counts. Pure.

The product's own errors name their rule and way out, so they are passed on; what libraries say is put into words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.cluster.cause import signal_name
from orchestrator.cluster.why.cause import Cause, Depth, Evidence, Stage, shown
from orchestrator.errors import (
    EXIT_NO_PROGRESS,
    EXIT_NODE,
    EXIT_STOPPED,
    EXIT_TERMINATED,
    EXIT_TRANSIENT,
    EXIT_USER,
)  # fmt: skip

WAY_OUT = re.compile(r"[.;:]? Way out: (?P<way_out>.*)", re.DOTALL)
NO_PROGRESS = re.compile(
    r"no progress: .*?, at last so: (?P<inner>.*?)(?:\. Way out: mend the cause; the same command then goes on)?$",
    re.DOTALL,
)
HUNG = re.compile(
    r"hung: no sign of life for (?P<silent>[\d.]+) s in phase (?P<phase>\w+) after step (?P<step>\d+) "
    r"\(cluster\.(?P<key>\w+) = (?P<budget>[\d.]+)\)"
)
WATCHDOG = re.compile(
    r"\[Rank (?P<rank>\d+)\].*?Watchdog caught collective operation timeout: \w+\(SeqNum=(?P<number>\d+), "
    r"OpType=(?P<op>\w+).*?ran for (?P<ms>\d+) milliseconds"
)


@dataclass(frozen=True, slots=True)
class Said:
    """An error as it was met."""

    text: str
    code: int | None
    """The exit code that came with it."""
    who: str
    """`rank 1`, `pod NAME`."""
    proof: Evidence
    kind: str = ""
    """The class of the error, where that is known."""
    past: bool = False
    at: str = ""


@dataclass(frozen=True, slots=True)
class Saying:
    """How an error of one kind is known, and what it means."""

    name: str
    form: re.Pattern[str]
    said: str
    """`{who}` and the pattern's groups are filled in; empty: the error's own words."""
    way_out: str
    stage: Stage = Stage.training
    depth: Depth = Depth.root
    passes: bool = False


def _form(text: str) -> re.Pattern[str]:
    return re.compile(text, re.DOTALL)


SAYINGS = (
    Saying(
        "hang",
        HUNG,
        "{who} was late and held the others up: no sign of life for {silent} s in phase {phase} after step {step}, "
        "cluster.{key} = {budget}",
        "look at its stack before the error (orchestrator logs ID), or raise cluster.{key}",
    ),
    Saying(
        "rank-0-unreachable",
        _form(r"node 0 did not come to MASTER_ADDR = (?P<address>\S+), port (?P<port>\d+) \((?P<why>[^)]*)\)"),
        "{who} did not reach the first node at {address}, port {port}: {why}",
        "look at the first node's pod; its name may have no headless service, or a network policy closes the port",
        Stage.meeting,
    ),
    Saying(
        "node-missing",
        _form(r"nodes (?P<nodes>[\d, ]+) did not come within cluster\.hang_start_s = (?P<limit>[\d.]+)"),
        "nodes {nodes} did not come within {limit} s",
        "look at their pods, or raise cluster.hang_start_s",
        Stage.meeting,
        Depth.follows,
        passes=True,
    ),
    Saying(
        "gpu-memory",
        _form(r"CUDA out of memory|torch\.OutOfMemoryError|HIP out of memory"),
        "the GPU of {who} has too little memory",
        "a smaller recipe.global_batch_size, recipe.accumulate=2, or another compute.precision; "
        "orchestrator plan train ... says what fits",
    ),
    Saying(
        "out-of-memory",
        _form(
            r"because memory ran out|OOMKilled|\bMemoryError\b|Cannot allocate memory|killed due to memory pressure|"
            r"node running low on memory"
        ),
        "memory ran out at {who}: {text}",
        "more memory (cluster.memory_gib_per_process), fewer data.num_workers, or fewer processes",
    ),
    Saying(
        "shared-memory-full",
        _form(r"Bus error|unable to open shared memory object|unable to allocate shared memory"),
        "/dev/shm of {who} is full: {text}",
        "a larger cluster.memory_gib_per_process, of which /dev/shm is a part, or fewer data.num_workers",
    ),
    Saying(
        "disk-full",
        _form(r"[Nn]o space left on device|disk full|Disk quota exceeded|ENOSPC"),
        "a disk of {who} is full: {text}",
        "free space, a larger cluster.disk_gib or claim, or runs_dir elsewhere; then orchestrator resume ID",
    ),
    Saying("not-finite", _form(r"training diverged|not finite|\bNaN\b|loss is nan"), "", "a lower optimizer.lr"),
    Saying(
        "data",
        _form(
            r"\bDataError\b|label \d+ is outside|\bdata\.(?:on_bad|bad_budget|on_damage|train|val) |shards verify|"
            r"\.tar\b.{0,80}?(?:damaged|truncated|sha256|not a readable|lost|missing)"
        ),
        "",
        "orchestrator shards verify on that set",
    ),
    Saying("code-differs", _form(r"imported (?:other )?code|code_digest = "), "", "submit it again"),
    Saying(
        "import",
        _form(r"ModuleNotFoundError: No module named|ImportError: "),
        "the image or the code lacks what {who} imports: {text}",
        "another cluster.image, or cluster.code=archive with cluster.code_files",
        Stage.start,
    ),
    Saying(
        "ray-workers-pending",
        _form(r"cluster\.start_deadline_s = .*?it asked for (?P<wants>.*?)(?:\. Way out|$)"),
        "Ray never had room for its workers: {wants}",
        "a cluster with so much, or less of it",
        Stage.placing,
    ),
    Saying("start-deadline", _form(r"cluster\.start_deadline_s"), "", "", Stage.end, Depth.follows),
    Saying(
        "device-lost",
        _form(
            r"\bDeviceError\b|CUDA error: (?:unspecified launch failure|an illegal|device|uncorrectable)|\bXid\b|"
            r"ECC error|GPU is lost|no CUDA-capable device|sees no GPU"
        ),
        "the device of {who} is unfit: {text}",
        "wait: it starts again away from it where the cluster can; let its operator look at the node",
        passes=True,
    ),
    Saying(
        "collective-timeout",
        _form(
            r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for (?:recv|send) operation|"
            r"NCCL.{0,60}timed? ?out|wait timeout after \d+ms|DistBackendError.*?timeout"
        ),
        "{who} waited in vain for other ranks: {text}",
        "look at the rank that did not come: orchestrator logs ID; orchestrator stack ID while it hangs",
        depth=Depth.follows,
    ),
    Saying(
        "network",
        _form(r"NCCL error|unhandled system error|ncclSystemError|ncclRemoteError|connectFullMesh|No route to host"),
        "the network between the ranks failed at {who}: {text}",
        "look at cluster.rdma and the network of these nodes",
        Stage.meeting,
        Depth.own,
        passes=True,
    ),
    Saying(
        "data-unreachable",
        _form(
            r"(?:s3|gs|az|https?)://\S+.{0,200}?"
            r"(?:\b40[134]\b|AccessDenied|timed? ?out|[Cc]onnection|refused|not found|\b50[0-9]\b)"
        ),
        "{who} cannot read {text}",
        "look at the address and its secret (cluster.store_secret), then orchestrator resume ID",
    ),
    Saying(
        "peer-lost",
        _form(
            r"Connection (?:closed|reset|refused)|Broken pipe|node \d+ is gone|remote process exited|"
            r"its worker is gone|\bpeer\b"
        ),
        "{who} lost a peer: {text}",
        "look at the peer that went first",
        depth=Depth.follows,
        passes=True,
    ),
    Saying(
        "crashed",
        _form(r"killed by (?P<signal>SIG(?:SEGV|ABRT|BUS|ILL|FPE))"),
        "{who} crashed with {signal}",
        "the stack is in its log: orchestrator logs ID",
        depth=Depth.own,
    ),
    Saying(
        "killed",
        _form(r"killed by (?P<signal>SIG\w+)"),
        "something outside ended {who} with {signal}",
        "look at what the machine says of it (dmesg tells of kills for memory), then orchestrator resume ID",
        passes=True,
    ),
)
BY_KIND = {
    "DataError": "data",
    "DamagedShard": "data",
    "DeviceError": "device-lost",
    "NodeError": "node-unfit",
    "CheckpointError": "checkpoint",
}
"""By the class of an error whose words say nothing more special."""
BY_CODE: Mapping[int, tuple[str, Depth, bool]] = {
    EXIT_USER: ("user-error", Depth.root, False),
    EXIT_NO_PROGRESS: ("no-progress", Depth.own, False),
    EXIT_NODE: ("node-unfit", Depth.root, True),
    EXIT_STOPPED: ("stopped", Depth.own, False),
    EXIT_TERMINATED: ("stopped", Depth.own, True),
    EXIT_TRANSIENT: ("transient", Depth.own, True),
}


def by_words(met: Said) -> Cause:
    """The cause that an error's words name, or its class, or its exit code."""
    inner = NO_PROGRESS.search(met.text)
    text = inner["inner"] if inner else met.text or _signal(met.code)
    own, way_out = _split(text)
    saying = next((one for one in SAYINGS if one.form.search(text)), None)
    if saying is not None:
        return _known(saying, replace(met, text=text), own, way_out)
    name, depth, passes = BY_CODE.get(met.code or 0, ("crashed", Depth.own, False))
    name = BY_KIND.get(met.kind, name)
    if met.code == EXIT_TRANSIENT and not own:
        depth = Depth.follows  # what a node says that left because of another one
    said = f"{met.who}: {shown(own)}" if own else f"{met.who} ended with {met.code} and said nothing"
    way_out = way_out or "orchestrator logs ID"
    return Cause(name, said, way_out, Stage.training, (met.proof,), depth, passes, met.past, at=met.at)


def _known(saying: Saying, met: Said, own: str, way_out: str) -> Cause:
    found = saying.form.search(met.text)
    groups: dict[str, Any] = {key: shown(value) for key, value in (found.groupdict() if found else {}).items()}
    filled = {**groups, "who": met.who, "text": shown(own)}
    said = saying.said.format(**filled) if saying.said else f"{met.who}: {shown(own)}"
    end = way_out or saying.way_out.format(**filled) or "orchestrator logs ID"
    return Cause(saying.name, said, end, saying.stage, (met.proof,), saying.depth, saying.passes, met.past, at=met.at)


def _signal(code: int | None) -> str:
    """A process that says nothing may have been ended by a signal."""
    return f"killed by {signal_name(code - 128)}" if code and code > 128 else ""


def _split(text: str) -> tuple[str, str]:
    """What an error says, and the way out that it names itself."""
    found = WAY_OUT.search(text)
    if not found:
        return text.strip(), ""
    return text[: found.start()].strip(), shown(found["way_out"])


def late_ranks(texts: Sequence[str], world_size: int | None) -> list[int]:
    """Ranks that the others waited for, by what NCCL's watchdogs said: those that did not complain, else those whose
    complaint is about the earliest collective."""
    said = {int(found["rank"]): int(found["number"]) for text in texts for found in WATCHDOG.finditer(text)}
    if not said:
        return []
    silent = [rank for rank in range(world_size or 0) if rank not in said]
    if silent:
        return silent
    first = min(said.values())
    return sorted(rank for rank, number in said.items() if number == first) if len(set(said.values())) > 1 else []
