"""Containers that do not begin: wrong images, commands that are not there, loops of crashes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from orchestrator.cluster.kubernetes.pods import statuses
from orchestrator.cluster.kubernetes.render import START_DEADLINE
from orchestrator.cluster.kubernetes.resources import STOPPED
from orchestrator.cluster.why.cause import Cause, Depth, Stage, shown
from orchestrator.cluster.why.scene import Object, Scene, is_true, of_event, of_object, seconds

IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
         "RegistryUnavailable", "ErrImagePullBackOff")  # fmt: skip
STUCK = ("RunContainerError", "StartError", "CrashLoopBackOff", "PostStartHookError")
COMMAND = re.compile(
    r'exec: \\?"(?P<name>[^"\\]+)\\?": (?:stat [^:]+: )?(?P<why>[\w $]*(?:not found|no such file or directory)[^:]*)'
)
PULLS = (
    ("invalid", re.compile(r"InvalidImageName|couldn't parse image|invalid reference"), "it is no name of an image"),
    ("denied", re.compile(r"unauthorized|denied|forbidden|\b40[13]\b|authentication required", re.I),
     "the registry does not let the node read it"),
    ("absent", re.compile(r"not found|manifest unknown|does not exist|name unknown|\b404\b", re.I),
     "the registry has no such image"),
    ("rate", re.compile(r"toomanyrequests|rate limit|\b429\b", re.I), "the registry limits how often it is asked"),
    ("platform", re.compile(r"no match for platform|exec format", re.I), "it is not built for the node's processor"),
    ("disk", re.compile(r"no space left", re.I), "the node's disk is full"),
    ("away", re.compile(r"dial tcp|no such host|i/o timeout|connection refused|TLS|x509|EOF|deadline exceeded", re.I),
     "the registry does not answer the node"),
)  # fmt: skip
"""In this order: what a registry says of a missing image often names a refused token as well."""
WAYS = {
    "invalid": "cluster.image=REGISTRY/NAME@sha256:DIGEST",
    "denied": "cluster.pull_secrets=[NAME], or an image that the nodes may read",
    "absent": "cluster.image with a tag or digest that the registry has",
    "rate": "wait, or a registry of your own, or cluster.pull_secrets=[NAME]",
    "platform": "an image for the processor of these nodes",
    "disk": "let the operator of the cluster look at the node's disk",
    "away": "cluster.image at a registry that the nodes reach (localhost is the node itself), or wait for it",
}
PASSES = ("rate", "away", "disk")


def causes(scene: Scene) -> Iterator[Cause]:
    for pod in scene.active:
        if not is_true(pod, "PodScheduled") and not pod["spec"].get("nodeName"):
            continue
        for which in ("initContainerStatuses", "containerStatuses"):
            for one in statuses(pod, which):
                waits = (one.get("state") or {}).get("waiting") or {}
                reason = waits.get("reason")
                if reason in IMAGE:
                    yield _image(scene, pod, one, which)
                elif reason in STUCK or reason == "CreateContainerError":
                    yield from _stuck(pod, one, which)
    yield from _never_ran(scene)
    yield from _given_up(scene)


def _given_up(scene: Scene) -> Iterator[Cause]:
    """A run that was stopped because it had not started in its time: pods are gone, what was said of them is left."""
    notes = scene.run["metadata"].get("annotations") or {}
    if scene.state.state != "stopped" or STOPPED not in notes or not notes.get(START_DEADLINE):
        return
    waited = seconds(notes[STOPPED]) - seconds(scene.run["metadata"].get("creationTimestamp") or "")
    if waited < float(notes[START_DEADLINE]) or any(event.get("reason") == "Started" for event in scene.events):
        return
    last = scene.warnings[-1:]
    said = f"it did not start within {float(notes[START_DEADLINE]):g} s and was stopped"
    said += f"; the last warning: {shown(last[0].get('message') or '')}" if last else ", and nobody said why"
    proof = (of_object(scene.run, f"metadata.annotations[{STOPPED}]", notes[STOPPED]), *map(of_event, last))
    way_out = f"mend that, then orchestrator resume {scene.name}; cluster.start_deadline_s is how long it may take"
    yield Cause("start-deadline", said, way_out, Stage.start, proof)


def _image(scene: Scene, pod: Object, one: Object, which: str) -> Cause:
    waits = one["state"]["waiting"]
    reason, message = waits["reason"], str(waits.get("message") or "")
    pulls = [event for event in scene.events_of(pod, "Failed", "InspectFailed") if "pull" in str(event.get("message"))]
    text = " ".join((reason, message, str(pulls[-1].get("message")) if pulls else ""))
    kind, why = next(((kind, why) for kind, form, why in PULLS if form.search(text)), ("", ""))
    image = _image_of(pod, str(one["name"])) or one.get("image")
    if reason == "ErrImageNeverPull":
        why = "the node does not have it and is told not to fetch it"
    proof = [of_object(pod, f"status.{which}[{one['name']}].state.waiting", f"{reason}: {message}")]
    proof += [of_event(pulls[-1])] if pulls else []
    return Cause(
        "wrong-image",
        f"image {image} cannot be fetched" + (f": {why}" if why else f": {shown(message)}"),
        WAYS.get(kind, "another cluster.image, or cluster.pull_secrets=[NAME]"),
        Stage.image,
        tuple(proof),
        passes=kind in PASSES,
        whom=(pod["metadata"]["name"],),
    )


def _image_of(pod: Object, container: str) -> str | None:
    every = [*(pod["spec"].get("initContainers") or []), *pod["spec"]["containers"]]
    return next((one.get("image") for one in every if one["name"] == container), None)


def _stuck(pod: Object, one: Object, which: str) -> Iterator[Cause]:
    """A container that the node cannot begin, or that ended each time it did."""
    waits = one["state"]["waiting"]
    text = f"{waits['reason']}: {waits.get('message') or ''}"
    proof = of_object(pod, f"status.{which}[{one['name']}].state.waiting", text)
    whom = (pod["metadata"]["name"],)
    if waits["reason"] == "CrashLoopBackOff":
        said = f"container {one['name']} ends as soon as it has begun ({one.get('restartCount', 0)} times)"
        yield Cause("crash-loop", said, "orchestrator logs ID", Stage.start, (proof,), Depth.own, whom=whom)
    elif waits["reason"] != "CreateContainerError":
        yield _command(text, (proof,), whom)


def _never_ran(scene: Scene) -> Iterator[Cause]:
    """Containers that ended because the node could not begin them."""
    for pod in scene.pods:
        for one in (*statuses(pod, "initContainerStatuses"), *statuses(pod)):
            ended = (one.get("state") or {}).get("terminated") or {}
            if ended.get("reason") in ("StartError", "ContainerCannotRun"):
                text = f"{ended['reason']}: {ended.get('message') or ''}"
                proof = of_object(pod, f"status.containerStatuses[{one['name']}].state.terminated", text)
                yield _command(text, (proof,), (pod["metadata"]["name"],))


def _command(text: str, proof: tuple, whom: tuple[str, ...]) -> Cause:
    found = COMMAND.search(text)
    if found:
        said = f"the image has no program {found['name']}"
        way_out = "cluster.python=PATH of the Python in the image, or another cluster.image"
    else:
        said, way_out = f"the node cannot begin a container: {shown(text)}", "another cluster.image"
    return Cause("command-missing", said, way_out, Stage.start, proof, whom=whom)
