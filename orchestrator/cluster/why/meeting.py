"""The name of the first node: the headless service that the ranks find each other by. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cluster.kubernetes.pods import index_of, is_running
from orchestrator.cluster.why.cause import Cause, Stage
from orchestrator.cluster.why.scene import Object, Scene, of_object


def causes(scene: Scene) -> Iterator[Cause]:
    """Only where the nodes have not met: a run that gets on needs the name no more."""
    running = [pod for pod in scene.active if is_running(pod)]
    if len(scene.pods) < 2 or not running or _has_met(scene) or scene.snapshot.unread("Service"):
        return
    first = next((pod for pod in running if pod["spec"].get("subdomain")), None)
    if first is None:
        return
    name = first["spec"]["subdomain"]
    service = scene.named("Service", name)
    if service is None:
        said = f"there is no service {name}, so the name of the first node resolves nowhere"
        proof = of_object(first, "spec.subdomain", name)
        yield Cause("service-missing", said, "submit the run again: orchestrator rm ID, then the same command",
                    Stage.meeting, (proof,))  # fmt: skip
        return
    yield from _selects(scene, {**service, "kind": "Service"}, running)


def _selects(scene: Scene, service: Object, running: list[Object]) -> Iterator[Cause]:
    selector = (service.get("spec") or {}).get("selector") or {}
    zero = next((pod for pod in scene.active if index_of(pod) == 0), running[0])
    labels = zero["metadata"].get("labels") or {}
    wrong = {key: value for key, value in selector.items() if labels.get(key) != value}
    if wrong:
        said = f"service {service['metadata']['name']} selects none of its pods, so the first node has no name"
        proof = (of_object(service, "spec.selector", selector), of_object(zero, "metadata.labels", labels))
        yield Cause("service-missing", said, "orchestrator rm ID, then submit it again", Stage.meeting, proof)


def _has_met(scene: Scene) -> bool:
    """Whether the ranks have taken a step, or have begun an attempt."""
    facts = scene.record.get("facts") or {}
    return bool(facts.get("step") or facts.get("world_size"))
