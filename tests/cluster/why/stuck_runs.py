"""One change to a healthy cluster each, and the cause that must come first: what keeps a run from starting."""

from __future__ import annotations

from scenes import (
    GPU,
    RUN,
    SPACE,
    World,
    claim,
    event,
    pending,
    pod,
    waiting,
    without_pods,
)  # fmt: skip
from unplaced_runs import LACKS_GPU, NOT_HELPFUL


def refused(world: World, text: str) -> None:
    without_pods(world)
    world.add("Event", event(world.run, "FailedCreate", f'Error creating: pods "{RUN}-0-" is forbidden: {text}'))


def quota(world: World) -> None:
    asked = f"requested: requests.{GPU}=8, used: requests.{GPU}=8, limited: requests.{GPU}=8"
    refused(world, f"exceeded quota: team, {asked}")
    hard = {f"requests.{GPU}": "8"}
    world.add(
        "ResourceQuota", {"metadata": {"name": "team"}, "spec": {"hard": hard}, "status": {"hard": hard, "used": hard}}
    )


def quota_for_the_second_pod(world: World) -> None:
    """One pod was made in the same second in which the other was refused."""
    quota(world)
    first = pod(0, "node-a", owner=world.run)
    first["metadata"]["creationTimestamp"] = "2026-01-01T10:05:00Z"
    world.add("Pod", first)


def quota_wants_limits(world: World) -> None:
    refused(world, "failed quota: compute: must specify limits.cpu for: node; requests.cpu for: node")


def limit_range(world: World) -> None:
    refused(world, "maximum memory usage per Container is 4Gi, but limit is 8Gi")
    limits = [{"type": "Container", "max": {"memory": "4Gi"}}]
    world.add("LimitRange", {"metadata": {"name": "small"}, "spec": {"limits": limits}})


def pod_security(world: World) -> None:
    refused(
        world,
        'violates PodSecurity "restricted:latest": unrestricted capabilities (container "node" must not include '
        '"IPC_LOCK" in securityContext.capabilities.add)',
    )


def webhook(world: World) -> None:
    without_pods(world)
    text = 'Error creating: admission webhook "policy.example.com" denied the request: label cost-centre is missing'
    world.add("Event", event(world.run, "FailedCreate", text))


def policy(world: World) -> None:
    refused(world, "ValidatingAdmissionPolicy 'cost' with binding 'all' denied request: label cost-centre is missing")


def webhook_down(world: World) -> None:
    without_pods(world)
    text = 'Error creating: Internal error occurred: failed calling webhook "mpod.kb.io": failed to call webhook: Post '
    text += (
        '"https://kueue-webhook-service.kueue-system.svc:443/mutate--v1-pod?timeout=10s": dial tcp: connection refused'
    )
    world.add("Event", event(world.run, "FailedCreate", text))


def account(world: World) -> None:
    refused(world, f'error looking up service account {SPACE}/trainer: serviceaccount "trainer" not found')


def priority(world: World) -> None:
    world.add("PriorityClass", {"metadata": {"name": "high"}, "value": 1000})
    refused(world, "no PriorityClass with name hihg was found")


def no_secret(world: World) -> None:
    world.objects["Secret"] = []
    for one in world.pods:
        waiting(one, "ContainerCreating")
        text = 'MountVolume.SetUp failed for volume "secret-tracking" : secret "wandb" not found'
        world.add("Event", event(one, "FailedMount", text))


def no_key(world: World) -> None:
    for one in world.pods:
        waiting(one, "ContainerCreating")
        text = 'MountVolume.SetUp failed for volume "secret-tracking" : references non-existent secret key: token'
        world.add("Event", event(one, "FailedMount", text))


def no_secret_in_environment(world: World) -> None:
    for one in world.pods:
        waiting(one, "CreateContainerConfigError", 'secret "wandb" not found')


def no_config_map(world: World) -> None:
    world.objects["ConfigMap"] = []
    for one in world.pods:
        waiting(one, "ContainerCreating")
        text = f'MountVolume.SetUp failed for volume "run" : configmap "run-{RUN}" not found'
        world.add("Event", event(one, "FailedMount", text))


def no_claim(world: World) -> None:
    world.objects["PersistentVolumeClaim"] = []
    for one in world.pods:
        pending(one, f'0/2 nodes are available: persistentvolumeclaim "runs" not found. {NOT_HELPFUL}')


def claim_without_class(world: World) -> None:
    world.objects["PersistentVolumeClaim"] = [claim("runs", "Pending", "fats")]
    about = {"kind": "PersistentVolumeClaim", **world.objects["PersistentVolumeClaim"][0]}
    world.add("Event", event(about, "ProvisioningFailed", 'storageclass.storage.k8s.io "fats" not found'))
    for one in world.pods:
        pending(one, f"0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. {NOT_HELPFUL}")


def claim_without_volume(world: World) -> None:
    world.objects["PersistentVolumeClaim"] = [claim("runs", "Pending")]
    about = {"kind": "PersistentVolumeClaim", **world.objects["PersistentVolumeClaim"][0]}
    text = "no persistent volumes available for this claim and no storage class is set"
    world.add("Event", event(about, "FailedBinding", text, kind="Normal"))
    for one in world.pods:
        pending(one, f"0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. {NOT_HELPFUL}")


def claim_lost(world: World) -> None:
    world.objects["PersistentVolumeClaim"] = [claim("runs", "Lost")]
    for one in world.pods:
        pending(one, f"0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims. {NOT_HELPFUL}")


def volume_busy(world: World) -> None:
    for one in world.pods[1:]:
        waiting(one, "ContainerCreating")
        text = 'Multi-Attach error for volume "pvc-1" Volume is already used by pod(s) other-0'
        world.add("Event", event(one, "FailedAttachVolume", text))


def _pull(world: World, reason: str, text: str) -> None:
    for one in world.pods:
        waiting(one, reason, text)
        world.add(
            "Event", event(one, "Failed", f'Failed to pull image "{one["spec"]["containers"][0]["image"]}": {text}')
        )


def image_absent(world: World) -> None:
    text = (
        'Back-off pulling image "registry.example/train:v9": ErrImagePull: rpc error: code = NotFound desc = failed to '
    )
    text += 'pull and unpack image "registry.example/train:v9": registry.example/train:v9: not found'
    _pull(world, "ImagePullBackOff", text)


def image_denied(world: World) -> None:
    text = "failed to authorize: failed to fetch anonymous token: unexpected status from GET request: 401 Unauthorized"
    _pull(world, "ErrImagePull", text)


def registry_away(world: World) -> None:
    text = 'failed to do request: Head "https://127.0.0.1:5/v2/none/manifests/1": dial tcp 127.0.0.1:5: connect: '
    text += "connection refused"
    _pull(world, "ErrImagePull", text)


def image_name(world: World) -> None:
    for one in world.pods:
        waiting(one, "InvalidImageName", 'Failed to apply default image tag "a b": couldn\'t parse image name "a b"')


def no_program(world: World) -> None:
    text = 'failed to create containerd task: failed to create shim task: OCI runtime create failed: exec: "trainer": '
    text += "executable file not found in $PATH"
    for one in world.pods:
        state = {
            "terminated": {
                "exitCode": 128,
                "reason": "StartError",
                "message": text,
                "finishedAt": "2026-01-01T10:01:00Z",
            }
        }
        one["status"]["containerStatuses"] = [{"name": "node", "state": state}]
        one["status"]["phase"] = "Failed"
    world.run["status"] = {"failed": 2}
    world.record = {}


def ray_worker_pending(world: World) -> None:
    """A RayJob whose worker finds no node."""
    job = world.objects["Job"].pop()
    ray = world.add("RayJob", {**job, "kind": "RayJob", "spec": {"suspend": False}, "status": {
        "jobDeploymentStatus": "Initializing", "rayClusterName": f"{RUN}-x"}})  # fmt: skip
    cluster = world.add(
        "RayCluster", {"metadata": {**pod(0, None, owner=ray)["metadata"], "name": f"{RUN}-x", "uid": "uid-x"}}
    )
    for one in world.pods:
        one["metadata"]["ownerReferences"] = [
            {"kind": "RayCluster", "name": f"{RUN}-x", "uid": "uid-x", "controller": True}
        ]
    pending(world.pods[1], LACKS_GPU)
    world.objects["Node"] = world.objects["Node"][:1]
    assert cluster["kind"] == "RayCluster"
    world.record = {}


def ray_cluster_refused_and_not_readable(world: World) -> None:
    """The quota refuses the head; there is no right to read RayClusters, but their events tell."""
    job = world.objects["Job"].pop()
    world.objects["Pod"] = []
    status = {"jobDeploymentStatus": "Initializing"}
    world.add("RayJob", {**job, "kind": "RayJob", "spec": {"suspend": False}, "status": status})
    world.missing["RayCluster"] = "no right to list rayclusters"
    about = {"kind": "RayCluster", "metadata": {"name": f"{RUN}-x", "uid": "uid-x"}}
    text = f'Failed to create head Pod {SPACE}/{RUN}-x-head, pods "{RUN}-x-head" is forbidden: exceeded quota: team, '
    world.add("Event", event(about, "FailedToCreateHeadPod", f"{text}requested: pods=1, used: pods=2, limited: pods=2"))
    world.record = {}


def given_up(world: World) -> None:
    """Whoever looked at it stopped it after its time to start."""
    gone = world.pods[0]
    without_pods(world)
    world.run["spec"]["suspend"] = True
    world.run["metadata"]["annotations"] = {
        "orchestrator/start-deadline-s": "300",
        "orchestrator/stopped": "2026-01-01T10:06:00+00:00",
    }
    world.add("Event", event(gone, "FailedScheduling", LACKS_GPU))


def no_service(world: World) -> None:
    world.objects["Service"] = []
    world.record = {"facts": {"state": "running"}}


def service_selects_nothing(world: World) -> None:
    world.objects["Service"][0]["spec"]["selector"] = {"orchestrator/run": "another-11111111"}
    world.record = {"facts": {"state": "running"}}


CASES = (
    (quota, "quota-exceeded", ("quota team", "8 of requests.nvidia.com/gpu", "8 of 8", "ResourceQuota team")),
    (quota_for_the_second_pod, "quota-exceeded", ("quota team",)),
    (quota_wants_limits, "quota-exceeded", ("limits.cpu",)),
    (limit_range, "limit-range", ("at the maximum 4Gi memory per Container", "limit is 8Gi", "LimitRange small")),
    (pod_security, "pod-security", ("restricted:latest", "unrestricted capabilities", "Namespace training")),
    (webhook, "webhook-refusal", ("policy.example.com", "cost-centre")),
    (policy, "webhook-refusal", ("ValidatingAdmissionPolicy cost", "cost-centre")),
    (webhook_down, "webhook-down", ("mpod.kb.io",)),
    (account, "account-missing", ("trainer",)),
    (priority, "priority-missing", ("hihg", "high")),
    (no_secret, "secret-missing", ("no secret wandb", "tracking.secret")),
    (no_key, "secret-missing", ("secret wandb has no key token",)),
    (no_secret_in_environment, "secret-missing", ("no secret wandb",)),
    (no_config_map, "config-map-missing", (f"run-{RUN}",)),
    (no_claim, "claim-missing", ("no claim runs", "cluster.volumes")),
    (claim_without_class, "claim-unbound", ("no storage class fats", "shared")),
    (claim_without_volume, "claim-unbound", ("no persistent volumes available",)),
    (claim_lost, "claim-lost", ("runs",)),
    (volume_busy, "volume-busy", ("Multi-Attach",)),
    (image_absent, "wrong-image", ("no such image",)),
    (image_denied, "wrong-image", ("does not let the node read it", "cluster.pull_secrets")),
    (registry_away, "wrong-image", ("does not answer",)),
    (image_name, "wrong-image", ("no name of an image",)),
    (no_program, "command-missing", ("trainer", "cluster.python")),
    (ray_worker_pending, "resources-in-use", ("GPU",)),
    (ray_cluster_refused_and_not_readable, "quota-exceeded", ("quota team", "2 of 2")),
    (given_up, "start-deadline", ("within 300 s", "2 Insufficient")),
    (no_service, "service-missing", (RUN,)),
    (service_selects_nothing, "service-missing", ("selects none",)),
)  # fmt: skip
