"""From the frozen bundle to the job as data; what a cluster could not run is refused before anything is sent."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import yaml

from orchestrator.bundle import Bundle, Initial, freeze, with_config
from orchestrator.cluster.job import GIB, LEAST_SHM, JobSpec, SecretFile, Volume, job_of
from orchestrator.compose import compose
from orchestrator.errors import EXIT_USER, ConfigError
from orchestrator.options import JobKind
from orchestrator.plain import from_dict, to_dict

IMAGE = f"r.example/train@sha256:{'1' * 64}"
ARCHIVE = "a" * 64
RUNS = "{claim: runs, path: /runs, read_only: false}"
VOLUMES = f"cluster.volumes=[{RUNS}, {{claim: data, path: /data, read_only: true}}]"
GOOD = (
    "cluster=kubernetes", f"cluster.image={IMAGE}", VOLUMES, "runs_dir=/runs", "data_dir=/data", "compute=cpu2",
    "compute.num_nodes=2",
)  # fmt: skip
ON_RAY = ("cluster=ray", "runs_dir=/shared/runs", "data_dir=/shared/data", "compute=cpu2", "compute.num_nodes=2")


@cache
def frozen(*base: str) -> Bundle:
    return freeze(compose(base))


def bundle_of(base: tuple[str, ...], *values: str) -> Bundle:
    """Other values of single keys, without composing anew for each test; `tracking=online` changes its mode only."""
    bundle = frozen(*base)
    plain = to_dict(bundle.config)
    for override in values:
        key, _, text = override.partition("=")
        *path, last = {"tracking": "tracking.mode"}.get(key, key).split(".")
        node = plain
        for name in path:
            node = node[name]
        node[last] = type(node[last])(text) if key == "compute.num_processes" else yaml.safe_load(text)
    return with_config(bundle, from_dict(plain))


def spec_of(base: tuple[str, ...], *values: str, **more: Any) -> JobSpec:
    bundle = bundle_of(base, *values)
    return job_of(bundle, ARCHIVE if bundle.config.cluster.code.name == "archive" else None, **more)


def test_everything_that_is_sent_comes_from_the_bundle():
    found = spec_of(
        GOOD, "compute.num_processes=4", "cluster.python=/venv/bin/python", "cluster.env=['A=b=c']",
        "cluster.node_selector=['pool=a100']", "cluster.tolerations=['x:NoSchedule']", "cluster.spot=['y=z:NoExecute']",
        "tracking=online", "tracking.secret=wandb/key", "cluster.store_secret=store/keys", "cluster.kind=jobset",
    )  # fmt: skip
    bundle = frozen(*GOOD)
    assert found.run_id.startswith("digits-")
    assert found.bundle["run_id"] == found.run_id
    assert found.code_digest == bundle.code_digest
    assert found.archive_digest == ARCHIVE
    assert found.command == ("/venv/bin/python", "-m", "jobs.node", "/etc/orchestrator/run/run.json")
    assert (found.num_nodes, found.processes_per_node) == (2, 2)
    assert found.env == {"OMP_NUM_THREADS": "1", "A": "b=c"}
    assert found.secrets == (SecretFile("tracking", "wandb", "key"), SecretFile("store", "store", "keys"))
    assert found.secrets[0].path == "/etc/orchestrator/secrets/tracking/key"
    assert found.volumes == (Volume("runs", "/runs", False), Volume("data", "/data", True))
    assert found.node_selector == {"pool": "a100"}
    assert found.tolerations == ("x:NoSchedule", "y=z:NoExecute")
    assert found.kind is JobKind.jobset


def test_the_job_of_a_ray_cluster_starts_one_driver_and_mounts_no_secret():
    found = spec_of(ON_RAY, "tracking=online", "tracking.secret=/etc/wandb")
    assert found.command == ("python", "-m", "jobs.ray_driver", "/etc/orchestrator/run/run.json")
    assert found.secrets == ()


def test_what_identifies_the_data_travels_along():
    assert spec_of(GOOD, data={"train": {"digest": "x"}}).bundle["data"] == {"train": {"digest": "x"}}


def test_memory_is_what_the_processes_ask_for_and_what_lies_in_shared_memory():
    found = spec_of(
        GOOD, "compute.num_processes=4", "data.num_workers=3", "data.prefetch_batches=5", "data.image_size=64",
        "data.eval_resize=64", "recipe.global_batch_size=1001", "eval_batch_size=100",
        "cluster.memory_gib_per_process=1.5", "cluster.cpus_per_process=0.5", "cluster.disk_gib=7",
    ).resources  # fmt: skip
    # 2 processes of the node, 3 loaders, 5 batches and 2 to spare; 251 images of a step and 100 of an evaluation
    shm = 2 * 3 * 7 * (251 + 100) * 3 * 64 * 64
    assert found.shm_bytes == shm > LEAST_SHM
    assert found.memory_bytes == 3 * GIB + shm
    assert (found.cpus, found.disk_bytes, found.gpus) == (1.0, 7 * GIB, 0)


def test_the_larger_side_of_training_and_evaluation_counts():
    at = [spec_of(GOOD, "data.image_size=128", "data.eval_resize=256", f"data.eval_size={side}", "data.num_workers=8")
          for side in (64, 256)]  # fmt: skip
    assert at[1].resources.shm_bytes == 4 * at[0].resources.shm_bytes


def test_loading_in_the_process_itself_takes_the_least():
    assert spec_of(GOOD, "data.num_workers=0").resources.shm_bytes == LEAST_SHM


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 2), ("auto", 2)])
def test_each_process_gets_a_gpu_unless_the_run_is_for_the_cpu(device: str, gpus: int):
    found = spec_of(GOOD, "compute.num_processes=4", f"compute.device={device}").resources
    assert found.gpus == gpus


# overrides after those of GOOD, the key and parts of the message
REFUSED: list[tuple[list[str], str, str, str]] = [
    (["cluster.image=null"], "cluster.image", "there is none", "REGISTRY/NAME@sha256:DIGEST"),
    (["cluster.image='r/n:latest'"], "cluster.image", "must end in the image's digest", "cluster.allow_tag=true"),
    (["cluster.image='r/n@sha256:12'"], "cluster.image", "must end in the image's digest", "cluster.allow_tag=true"),
    (["cluster.image='r/n@sha512:12'", "cluster.allow_tag=true"], "cluster.image", "digest", "@sha256"),
    (["cluster.image='a b'", "cluster.allow_tag=true"], "cluster.image", "name of an image", "@sha256"),
    (["name=3layers"], "name", "must begin with a letter", "name=run-3layers"),
    (["cluster.kind=rayjob", "cluster.python='/opt/my env/python'"], "cluster.python", "shell", "plain path"),
    (["cluster.kind=rayjob", "cluster.python='python;rm'"], "cluster.python", "shell", "plain path"),
    (["compute.num_processes=auto"], "compute.num_processes", "GPUs of this machine", "compute.num_processes=2"),
    (["compute.num_processes=3"], "compute.num_processes", "evenly over compute.num_nodes = 2", "=2"),
    (["compute.num_processes=2:4"], "compute.num_processes", "varies", "cluster.kind=rayjob"),
    (["compute.num_processes=2:4", "cluster.kind=jobset"], "compute.num_processes", "jobset", "=4"),
    (["compute.num_processes=3:4", "cluster.kind=rayjob"], "compute.num_processes", "evenly", "=4"),
    (["runs_dir=runs"], "runs_dir", "relative", "runs_dir=/runs/..."),
    (["runs_dir=/elsewhere"], "runs_dir", "no writable volume", "runs_dir=/runs/..."),
    (["runs_dir=/runs2"], "runs_dir", "no writable volume", "runs_dir=/runs/..."),
    (["runs_dir=/runs/../tmp"], "runs_dir", "no writable volume", "runs_dir=/runs/..."),
    (["runs_dir=/data/runs"], "runs_dir", "no writable volume", "runs_dir=/runs/..."),
    (["runs_dir=ftp://bucket/runs"], "runs_dir", "neither a folder nor a store", "runs_dir=s3://BUCKET/runs"),
    (["runs_dir=s3:///runs"], "runs_dir", "neither a folder nor a store", "runs_dir=s3://BUCKET/runs"),
    (["runs_dir=s3://b/runs", "cluster.kind=rayjob"], "runs_dir", "Ray meet in a folder", "checkpointing.mirror=s3://b"),
    (["runs_dir=s3://b/runs", "checkpointing.mirror=s3://c"], "checkpointing.mirror", "keeps already", "leave it out"),
    (["runs_dir=/runs", "cluster.volumes=[]"], "runs_dir", "no writable volume", "claim: runs-dir, path: /runs-dir"),
    (["data.train=data/train"], "data.train", "relative", "data.train=/runs/..., or an URL"),
    (["data.val=/mnt/val"], "data.val", "lies on no volume", "or an URL"),
    (["model.weights=w.safetensors"], "model.weights", "relative", "or an URL"),
    (["checkpointing.mirror=file:///mnt/m"], "checkpointing.mirror", "no writable volume", "/runs/..."),
    (["tracking=online"], "tracking", "does not say where it is", "tracking.secret=NAME/KEY, or tracking=offline"),
    (["tracking=online", "tracking.secret=/etc/key"], "tracking.secret", "a file of a machine", "NAME/KEY"),
    (["cluster.store_secret=/etc/key"], "cluster.store_secret", "a file of a machine", "NAME/KEY"),
    (["cluster.env=['RANK=1']"], "cluster.env", "set by the launcher", "leave it out"),
    (["cluster.env=['PYTHONPATH=/x']"], "cluster.env", "set by the launcher", "leave it out"),
    (["cluster.env=['MY_API_KEY=abc']"], "cluster.env", "named like a secret", "tracking.secret"),
    (["cluster.env=['PASSWORD=abc']"], "cluster.env", "named like a secret", "tracking.secret"),
    (["data.train=https://user:hunter2hunter2@host/t.tar"], "data.train", "password in an address", "store_secret"),
    (["data.train='https://host/t.tar?X-Amz-Signature=0123456789abcdef'"], "data.train", "signed", "store_secret"),
    *[([f"cluster.volumes=[{RUNS}, {{claim: x, path: {path}, read_only: false}}]", "data.train=s3://b/t",
        "data.val=s3://b/v"], "cluster.volumes", "of their own", "/data")
      for path in ("/tmp", "/home", "/home/user", "/etc", "/etc/orchestrator/run", "/opt", "/opt/orchestrator/code",
                   "/dev/shm/x")],
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "key", "rule", "way_out"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_the_cluster_could_not_run_or_would_lose_is_refused(
    overrides: list[str], key: str, rule: str, way_out: str
):
    with pytest.raises(ConfigError) as caught:
        spec_of(GOOD, *overrides)
    error = caught.value
    assert error.exit_code == EXIT_USER
    assert error.key == key
    assert rule in error.rule
    assert way_out in error.way_out


@pytest.mark.parametrize("secret", ["hunter2hunter2", "abcdef"])
def test_a_secret_is_not_shown_by_its_refusal(secret: str):
    override = {
        "hunter2hunter2": f"data.train=https://u:{secret}@h/t.tar",
        "abcdef": f"cluster.env=['A_TOKEN={secret}']",
    }
    with pytest.raises(ConfigError) as caught:
        spec_of(GOOD, override[secret])
    assert secret not in str(caught.value)


# overrides after those of GOOD or ON_RAY that must pass
GOOD_ONES: list[tuple[tuple[str, ...], list[str]]] = [
    (GOOD, []),
    (GOOD, ["cluster.image='r/n:v1'", "cluster.allow_tag=true"]),
    (GOOD, ["data.train=s3://b/t", "data.val=https://h/v-{0..3}.tar"]),
    (GOOD, ["compute.num_processes=2:4", "cluster.kind=rayjob"]),
    (GOOD, ["checkpointing.mirror=s3://b/m"]),
    (GOOD, ["checkpointing.mirror=file:///runs/mirror"]),
    (GOOD, ["runs_dir=/runs/deep/er"]),
    (GOOD, ["runs_dir=s3://bucket/runs"]),
    (GOOD, ["runs_dir=gs://bucket", "cluster.volumes=[{claim: data, path: /data, read_only: true}]"]),
    (GOOD, ["cluster.env=['TOKENIZERS_PARALLELISM=false','AWS_SHARED_CREDENTIALS_FILE=/etc/x','API_TOKEN=/etc/y']"]),
    (GOOD, ["cluster.kind=trainjob", "cluster.queue=q"]),
    (ON_RAY, []),
    (ON_RAY, ["compute.num_processes=2:4"]),
    (ON_RAY, ["tracking=online", "tracking.secret=/etc/key"]),
]


@pytest.mark.parametrize(("base", "overrides"), GOOD_ONES, ids=str)
def test_good_jobs_are_no_false_alarms(base: tuple[str, ...], overrides: list[str]):
    assert spec_of(base, *overrides).num_nodes == 2


@pytest.mark.parametrize(("overrides", "key"), [
    (["runs_dir=runs"], "runs_dir"),
    (["tracking=online"], "tracking"),
    (["tracking=online", "tracking.secret=a/b"], "tracking.secret"),
    (["compute.num_processes=auto"], "compute.num_processes"),
])  # fmt: skip
def test_a_ray_cluster_needs_shared_paths_and_files_for_secrets(overrides: list[str], key: str):
    with pytest.raises(ConfigError) as caught:
        spec_of(ON_RAY, *overrides)
    assert caught.value.key == key


def test_the_checkpoint_that_init_from_means_must_be_where_the_nodes_see_it():
    bundle = replace(frozen(*GOOD), initial=Initial("/here/step_1", "0" * 64))
    with pytest.raises(ConfigError, match=r"init_from = /here/step_1: lies on no volume"):
        job_of(bundle, ARCHIVE)


@pytest.mark.parametrize(("pace_s", "ok"), [(59.0, True), (60.0, False), (None, True)])
def test_the_grace_period_must_outlast_a_step_and_a_save(pace_s: float | None, ok: bool):
    if ok:
        assert spec_of(GOOD, pace_s=pace_s).grace_s == 60.0
        return
    with pytest.raises(ConfigError, match=r"cluster.grace_s = 60.0: is over before .* Way out: cluster.grace_s=120"):
        spec_of(GOOD, pace_s=pace_s)
