"""What the run itself told: its faults, the errors of its ranks, its last lines; for runs here, on Ray, on Kubernetes.

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.cluster.snapshot import Snapshot
from orchestrator.cluster.why.cause import Cause, Depth, Evidence, Stage, shown
from orchestrator.cluster.why.scene import Scene
from orchestrator.cluster.why.words import WATCHDOG, Said, by_words, late_ranks

Record = Mapping[str, Any]
ENDED = ("failed", "dead")
WAITS = re.compile(r"waits for its workers: (?P<wants>.*?); the cluster has (?P<has>.*?) free")
SETUP = re.compile(r"(?:Runtime ?[Ee]nv|runtime_env).*(?:failed|Failed).*", re.DOTALL)
ROOM = re.compile(r"waiting for resources")
"""In what Ray says of a job that has not begun; an environment that is being set up is no trouble."""


def progress(facts: Record) -> str:
    """`step 412 of 1,000`, as far as the run has told."""
    step, total, state = facts.get("step"), facts.get("total_steps"), facts.get("state")
    where = f"step {step:,}" + (f" of {total:,}" if total else "") if isinstance(step, int) else ""
    if state in ("running", None):
        return where or "running"
    return f"{state}, {where}" if where else str(state)


def of_record(snapshot: Snapshot) -> Iterator[Cause]:
    """Of a run whose folder or whose job is all that there is."""
    record = snapshot.record
    facts = record.get("facts") or {}
    state, last = facts.get("state"), _last_attempt(record)
    told = set[str]()
    for fault in record.get("faults") or []:
        past = state not in ENDED or fault.get("attempt") != last
        told |= set() if past else {str(fault.get("error") or "")}
        yield _fault(fault, past)
    if state in ENDED:
        yield from _end(record, facts)
        yield from _errors(record, last, told)
    if state == "dead":
        yield _dead(snapshot, facts)
    if state not in ("done", "stopped"):
        yield from _late(record)
        yield from _waits(record, facts)
    yield from _jobs(snapshot, state)


def of_pods(scene: Scene) -> Iterator[Cause]:
    """What the pods' lines add to what the cluster says."""
    record, facts = scene.record, scene.record.get("facts") or {}
    if scene.settled and facts.get("step"):
        return
    if not scene.settled:
        yield from _late(record)
    if scene.state.living:
        yield from _waits(record, facts)


def _last_attempt(record: Record) -> Any:
    told = [one.get("attempt") or 0 for key in ("faults", "errors") for one in record.get(key) or []]
    return max([*told, (record.get("facts") or {}).get("attempt") or 0])


def _fault(fault: Record, past: bool) -> Cause:
    rank, number = fault.get("rank"), fault.get("attempt")
    proof = Evidence("events/launcher.jsonl", f"fault of attempt {number}", shown(fault.get("error") or ""))
    who = "a node" if rank is None else f"rank {rank}"
    return by_words(Said(str(fault.get("error") or ""), fault.get("exit_code"), who, proof, past=past))


def _errors(record: Record, last: Any, told: set[str]) -> Iterator[Cause]:
    """What the ranks of the last attempt left, the earliest first; what the launcher has told of them is known."""
    mine = [one for one in record.get("errors") or [] if one.get("attempt", last) == last]
    for place, one in enumerate(sorted(mine, key=lambda error: error.get("t") or 0.0)):
        text = str(one.get("error") or "")
        if text in told:
            continue
        where = f"logs/attempt_{one.get('attempt')}/rank_{one.get('rank')}.error.json"
        proof = Evidence(where, str(one.get("kind") or "error"), shown(text))
        said = Said(
            text, one.get("exit_code"), f"rank {one.get('rank')}", proof, str(one.get("kind") or ""), at=f"{place:09}"
        )
        yield by_words(said)


def _end(record: Record, facts: Record) -> Iterator[Cause]:
    end = record.get("end") or {}
    text, code = str(end.get("error") or ""), end.get("exit_code") or facts.get("exit_code")
    if not text and not code:
        return
    who = "the run" if end.get("rank") is None else f"rank {end['rank']}"
    proof = Evidence("result.json", "error", shown(text or f"exit code {code}"))
    yield by_words(Said(text, code, who, proof, str(end.get("kind") or "")))


def _dead(snapshot: Snapshot, facts: Record) -> Cause:
    """No end was recorded, and nobody runs it: whoever ran it was killed with all of its ranks."""
    said = "its launcher is gone without a word: killed (SIGKILL, memory), or the machine went down"
    proof = Evidence("lock", "held by", "nobody, and result.json names no end")
    way_out = "orchestrator resume ID goes on from the last checkpoint; dmesg tells of kills for memory"
    return Cause("launcher-killed", said, way_out, Stage.training, (proof,), Depth.own)


def _late(record: Record) -> Iterator[Cause]:
    """Who was waited for, by what the watchdogs of NCCL said in the last lines."""
    groups = record.get("lines") or []
    lines = [line for group in groups for line in group["lines"]]
    lines += [str(one.get("error") or "") for one in record.get("errors") or []]
    complaints = [found for found in map(WATCHDOG.search, lines) if found]
    if not complaints:
        return
    world = (record.get("facts") or {}).get("world_size")
    late, first = late_ranks(lines, world), complaints[0]
    waited = f"{first['op']} number {first['number']} for {int(first['ms']) / 1000:.0f} s"
    ranks = sorted({int(found["rank"]) for found in complaints})
    who = f"rank{'s' if len(late) != 1 else ''} {', '.join(map(str, late))}" if late else "a rank"
    said = f"{who} did not come: ranks {', '.join(map(str, ranks[:8]))} waited in {waited}"
    proof = Evidence(f"log of rank {first['rank']}", "NCCL's watchdog", shown(first[0]))
    way_out = "look at that rank's log and machine: orchestrator logs ID --rank N; orchestrator stack ID while it hangs"
    yield Cause("collective-timeout", said, way_out, Stage.training, (proof,), Depth.own)


def _waits(record: Record, facts: Record) -> Iterator[Cause]:
    """A driver on Ray that has no room for its workers; once ranks have begun, that is over."""
    if facts.get("step") or facts.get("world_size"):
        return
    found = _last(WAITS, [line for group in record.get("lines") or [] for line in group["lines"]])
    if found:
        said = f"Ray has no room for its workers: {found['wants']}; the cluster has {found['has']} free"
        proof = Evidence("log of the driver", "waits for its workers", shown(found[0]))
        way_out = "wait for other jobs to end, a larger cluster, or fewer compute.num_processes"
        yield Cause("ray-workers-pending", said, way_out, Stage.placing, (proof,), passes=True)


def _last(form: re.Pattern[str], lines: Sequence[str]) -> re.Match[str] | None:
    return next((found for line in reversed(lines) if (found := form.search(line))), None)


def _jobs(snapshot: Snapshot, state: Any) -> Iterator[Cause]:
    """What Ray's Jobs API says of the run's newest job, where its driver never came so far as to speak."""
    jobs = snapshot.of("RayJobSubmission")
    if not jobs:
        return
    job = jobs[-1]
    message = str(job.get("message") or "")
    proof = Evidence(f"Job {job.get('submission_id')}", "message", shown(message))
    if job.get("status") == "PENDING" and ROOM.search(message):
        said = f"Ray has not started its driver: {shown(message)}"
        way_out = "wait, or let other jobs end: the driver itself needs a free CPU"
        yield Cause("ray-driver-pending", said, way_out, Stage.placing, (proof,), passes=True)
    elif job.get("status") == "FAILED" and SETUP.search(message):
        said = f"Ray cannot set up what the job runs in: {shown(message)}"
        yield Cause("ray-environment", said, "cluster.code and cluster.python", Stage.start, (proof,))
    elif job.get("status") == "FAILED" and "unexpectedly" in message and state == "failed":
        said = "Ray's driver is gone without a word; its node may be lost"
        yield Cause("node-lost", said, "orchestrator resume ID", Stage.training, (proof,), Depth.own, passes=True)
