"""Where every rank is: asked by an annotation of its pod, answered in its log."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from orchestrator.cluster.kubernetes.api import Api, Object
from orchestrator.cluster.kubernetes.logs import PodLog
from orchestrator.cluster.kubernetes.pods import ray_type
from orchestrator.cluster.kubernetes.resources import ASK, POD
from orchestrator.cluster.lines import Said, parse

logger = logging.getLogger(__name__)

ANSWER_S = 120.0
"""A node shows a changed annotation to its pods within a minute or two."""
EARLIER_S = 2.0
"""By which the clocks of nodes may differ from this one."""


def ask_for_stacks(api: Api, pods: Sequence[Object]) -> dict[int, str]:
    """The stack of each rank in these pods; who did not answer is warned of.

    A driver on Ray is asked for all ranks: it reads the annotation of the head, and answers in the log of the pod that
    follows it.
    """
    asked = [pod for pod in pods if ray_type(pod) == "head"] or pods
    pods = [pod for pod in pods if ray_type(pod) is None]
    ask = f"stack-{time.time_ns() // 10**6}"
    since = (datetime.now(UTC) - timedelta(seconds=EARLIER_S)).isoformat(timespec="seconds").replace("+00:00", "Z")
    logs = [PodLog(api, pod, since) for pod in pods]
    answers: queue.Queue[Said | Exception | None] = queue.Queue()
    threads = [threading.Thread(target=_listen, args=(log, ask, answers), daemon=True) for log in logs]
    for thread in threads:
        thread.start()
    try:
        for pod in asked:
            api.patch(POD, pod["metadata"]["name"], {"metadata": {"annotations": {ASK: ask}}})
        return _collect(answers, len(pods))
    finally:
        for log in logs:
            log.close()


def _listen(log: PodLog, ask: str, answers: queue.Queue[Said | Exception | None]) -> None:
    """Put what a pod says to a request, or why it cannot be heard, then None."""
    try:
        for _, text in log.follow():
            said = parse(text)
            if said is None or said.ask != ask:
                continue
            answers.put(said)
            if said.kind == "stack end":
                break
    except Exception as error:  # raised where the answers are read
        answers.put(error)
    finally:
        answers.put(None)


def _collect(answers: queue.Queue[Said | Exception | None], pods: int) -> dict[int, str]:
    frames: dict[int, list[str]] = {}
    until, silent = time.monotonic() + ANSWER_S, pods
    while silent:
        try:
            said = answers.get(timeout=max(until - time.monotonic(), 0.01))
        except queue.Empty:
            logger.warning("%d of %d pods did not answer within %.0f s", silent, pods, ANSWER_S)
            break
        if isinstance(said, Exception):
            raise said
        if said is None:
            silent -= 1
        elif said.kind == "stack" and said.rank is not None:
            frames.setdefault(said.rank, []).append(said.text)
    return {rank: "\n".join(frames[rank]) for rank in sorted(frames)}
