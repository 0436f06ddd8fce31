"""An archive that no object of the cluster takes goes to a store, once, and from there into the pods."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_api import FakeApi
from launching import wait_for
from profiles import ARCHIVE, PROFILES, STORED, bundle_of, pods_of, profile, spec_of

from orchestrator.cli.main import main
from orchestrator.cluster import code
from orchestrator.cluster.code import Archive, pack
from orchestrator.cluster.kubernetes.code_store import address_of, placed, store_of, upload
from orchestrator.cluster.kubernetes.render import LARGEST_ARCHIVE, render
from orchestrator.cluster.kubernetes.templates import to_yaml
from orchestrator.errors import ConfigError, TransientError
from orchestrator.options import JobKind
from orchestrator.train.bucket import Bucket

sys.path.append(str(Path(__file__).parents[2] / "data"))
from test_s3 import KEY, SECRET, Server, weed

BUCKET = "s3://code/of-ours"
needs_weed = [
    pytest.mark.skipif(weed is None, reason="no SeaweedFS (`weed`) in this environment"),
    pytest.mark.slow,
    pytest.mark.timeout(120),
]


def archive_of(*files: tuple[str, bytes]) -> Archive:
    content = pack(files)
    largest = tuple(sorted(((path, len(text)) for path, text in files), key=lambda one: -one[1]))
    return Archive(content, hashlib.sha256(content).hexdigest(), len(files), "made up", (), largest)


LARGE = archive_of(("orchestrator/a.py", b"x = 1\n"), ("weights.bin", os.urandom(LARGEST_ARCHIVE + 1000)))
SMALL = archive_of(("orchestrator/a.py", b"x = 1\n"))


def test_an_archive_that_an_object_takes_needs_no_store() -> None:
    assert address_of(SMALL, None) is None
    assert address_of(SMALL, BUCKET) is None
    spec = spec_of(*PROFILES["archive_secrets_volumes"])
    assert placed(spec, None, bundle_of(*PROFILES["cpu2"]).config.cluster, BUCKET) is spec


def test_a_larger_one_has_the_hash_as_its_name_there() -> None:
    assert address_of(LARGE, f"{BUCKET}/") == f"{BUCKET}/code-{LARGE.digest}.tar.gz"


def test_without_a_store_it_is_refused_with_its_largest_files_and_the_way_out() -> None:
    said = r"cluster\.code = archive: makes 90\d KiB, an object of Kubernetes takes 900; the largest of its 2 files: "
    with pytest.raises(ConfigError, match=rf"{said}weights\.bin \(901 KiB\), .* Way out: cluster\.code_store=s3://"):
        address_of(LARGE, None)


@pytest.mark.parametrize(
    ("keys", "store"),
    [
        ((), None),
        (("checkpointing.mirror=s3://a/m",), "s3://a/m"),
        (("checkpointing.mirror=file:///runs/m",), None),
        (("checkpointing.mirror=s3://a/m", "cluster.code_store=gs://b/c"), "gs://b/c"),
        (("runs_dir=az://d/e", "cluster.code_store=null"), "az://d/e"),
    ],
)
def test_the_store_is_the_one_that_is_named_else_the_run_s_own(keys: tuple[str, ...], store: str | None) -> None:
    assert store_of(bundle_of(*PROFILES["cpu2"], *keys).config) == store


def test_a_store_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.code_store = /runs/code: must be a store of s3, gs or az"):
        bundle_of(*PROFILES["cpu2"], "cluster.code_store=/runs/code")


def containers(spec: Any, kind: JobKind = JobKind.job) -> list[list[dict[str, Any]]]:
    """Those before the first process of each pod that has the code."""
    pods = [pod for obj in render(spec, kind, b"") for pod in pods_of(obj)]
    return [pod["spec"]["initContainers"] for pod in pods if "initContainers" in pod["spec"]]


@pytest.mark.parametrize("kind", [kind for kind in JobKind if kind is not JobKind.auto], ids=lambda kind: kind.name)
def test_pods_bring_it_then_check_it_and_no_object_holds_it(kind: JobKind) -> None:
    objects = render(profile(STORED), kind, LARGE.content)
    assert not any("binaryData" in obj for obj in objects)
    for first, second in containers(profile(STORED), kind):
        assert (first["name"], second["name"]) == ("fetch-code", "unpack-code")
        assert {mount["mountPath"] for mount in first["volumeMounts"]} == {
            "/etc/orchestrator/archive", "/etc/orchestrator/secrets/store",
        }  # fmt: skip
        assert second["command"][-2] == ARCHIVE


def test_a_pod_that_packs_shards_gets_the_keys_for_its_code_alone() -> None:
    spec = profile("shards")
    cluster = replace(bundle_of(*PROFILES["archive_secrets_volumes"]).config.cluster, code_store=BUCKET)
    assert spec.secrets == ()
    (fetch, _), *_ = containers(placed(spec, LARGE, cluster, cluster.code_store))
    assert "/etc/orchestrator/secrets/store/keys" in fetch["command"]
    assert "secretKeyRef" not in to_yaml(render(placed(spec, LARGE, cluster, BUCKET), JobKind.job, LARGE.content))


@dataclass
class There:
    """A store that runs, and a pod's view of it."""

    folder: Path
    endpoint: str
    url: str

    def fetch(self, url: str, keys: str | None, **env: str) -> subprocess.CompletedProcess[str]:
        """As the manifest says, with the places of this machine and shorter pauses."""
        spec = replace(profile(STORED), archive_url=url)
        command = containers(spec)[0][0]["command"]
        _, *flags, text, archive, place, secret, reader = command
        assert (archive, place, secret) == (
            "/etc/orchestrator/archive/code.tar.gz", url, "/etc/orchestrator/secrets/store/keys",
        )  # fmt: skip
        (self.folder / "keys").write_text(keys or "")
        bare = reader.replace("import fcntl\n", "import fcntl, sys\nsys.modules['orchestrator'] = None\n", 1)
        assert bare != reader, "an image need not have this package"
        words = [str(self.folder / "code.tar.gz"), url, str(self.folder / "keys") if keys else "", bare]
        quick = f"import sys\nsys.modules['orchestrator'] = None\n{text}".replace("PAUSE_S = 2.0", "PAUSE_S = 0.05")
        return subprocess.run(
            [sys.executable, *flags, quick, *words], capture_output=True, text=True, check=False, env=env, timeout=60
        )

    def unpack(self, digest: str) -> int:
        _, *flags, text, _, _, _ = containers(profile(STORED))[0][1]["command"]
        words = [str(self.folder / "code.tar.gz"), digest, str(self.folder / "code")]
        return subprocess.run([sys.executable, *flags, text, *words], check=False, env={}).returncode


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = Server(tmp_path_factory.mktemp("weed"))
    store.start()
    yield store
    store.stop()


@pytest.fixture
def there(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> There:
    import requests

    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)

    def answers() -> bool:
        with closing(Bucket("s3://code/probe")) as bucket, suppress(OSError):
            requests.post(f"http://127.0.0.1:{server.filer}/buckets/code/", timeout=5)  # the first time makes it
            bucket.put("x", b"1")
            return True
        return False

    wait_for(answers, "the store's bucket", 60)
    return There(tmp_path, server.url, f"s3://code/{tmp_path.name}")


def pairs(secret: str = SECRET) -> str:
    return f"# of the store\nAWS_ACCESS_KEY_ID={KEY}\nAWS_SECRET_ACCESS_KEY={secret}\n"


class TestWithAStore:
    pytestmark = needs_weed

    def test_it_is_brought_once_and_a_pod_gets_the_very_bytes_with_keys_from_a_file(self, there: There) -> None:
        url = str(address_of(LARGE, there.url))
        assert [upload(LARGE.content, url), upload(LARGE.content, url)] == [True, False]
        assert (done := there.fetch(url, pairs(), AWS_ENDPOINT_URL=there.endpoint)).returncode == 0, done.stderr
        assert (there.folder / "code.tar.gz").read_bytes() == LARGE.content
        assert there.unpack(LARGE.digest) == 0
        assert (there.folder / "code" / "orchestrator" / "a.py").read_text() == "x = 1\n"

    def test_what_somebody_put_in_its_place_is_never_unpacked(self, there: There) -> None:
        url = str(address_of(LARGE, there.url))
        with closing(Bucket(there.url)) as bucket:
            bucket.put(url.rpartition("/")[2], SMALL.content)
        assert upload(LARGE.content, url) is False
        assert there.fetch(url, pairs(), AWS_ENDPOINT_URL=there.endpoint).returncode == 0
        assert there.unpack(LARGE.digest) == 42
        assert not (there.folder / "code").exists()

    def test_wrong_keys_and_missing_code_are_the_user_s_and_no_key_is_shown(self, there: There) -> None:
        url = str(address_of(LARGE, there.url))
        gone = there.fetch(url, pairs(), AWS_ENDPOINT_URL=there.endpoint)
        assert (gone.returncode, f"code archive = {url}: the store does not give it (404" in gone.stderr) == (42, True)
        upload(LARGE.content, url)
        wrong = there.fetch(url, pairs("another-secret-word"), AWS_ENDPOINT_URL=there.endpoint)
        assert (wrong.returncode, "Way out: cluster.store_secret" in wrong.stderr) == (42, True), wrong.stderr
        for said in (gone, wrong):
            assert not any(key in said.stderr + said.stdout for key in (KEY, SECRET, "another-secret-word"))
            assert "Traceback" not in said.stderr

    def test_a_store_that_does_not_answer_is_tried_again_and_then_transient(self, there: There) -> None:
        done = there.fetch(f"{there.url}/code-x.tar.gz", pairs(), AWS_ENDPOINT_URL="http://127.0.0.1:9")
        assert (done.returncode, "Way out: try again" in done.stderr) == (75, True), done.stderr

    def test_a_pod_without_keys_is_told_how_it_gets_some(self, there: There) -> None:
        """Whatever answers in the place of a cloud that would give it an identity."""
        done = there.fetch(f"{there.url}/code-x.tar.gz", None, AWS_ENDPOINT_URL=there.endpoint)
        assert done.returncode in (42, 75)
        assert "Way out: cluster.store_secret=NAME/KEY" in done.stderr

    def test_a_submitter_without_keys_is_refused_and_one_without_a_store_may_try_again(
        self, there: There, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = str(address_of(LARGE, there.url))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-word")
        with pytest.raises(
            ConfigError, match=r"cluster\.code_store = s3://code/.*: does not take the code: "
        ) as refused:
            upload(LARGE.content, url)
        assert "another-secret-word" not in str(refused.value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(TransientError, match="Way out: try again"):
            upload(LARGE.content, url)

    def test_the_command_brings_it_and_what_it_sends_holds_neither_code_nor_keys(
        self, there: There, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(code, "archive_of", lambda files: LARGE)
        kubernetes, words = FakeApi(), sent_words(tmp_path, there)
        try:
            serve(kubernetes, tmp_path, monkeypatch)
            shown = run(capsys, *words, "--dry-run")
            assert f"the code goes to {there.url}/code-{LARGE.digest}.tar.gz when" in shown.err
            assert names(there.url) == []
            told = run(capsys, *words, "--json")
            assert (json.loads(told.out)["outcome"], f"code: went to {there.url}" in told.err) == ("submitted", True)
            assert "; pods fetch it with store/keys" in told.err
            assert names(there.url) == [f"code-{LARGE.digest}.tar.gz"]
            assert "had gone" in run(capsys, *words).err
            every = json.dumps(list(kubernetes.objects.values()))
            assert not any(key in every + shown.out + shown.err + told.err for key in (KEY, SECRET))
            assert [name for name in kubernetes.names("configmaps") if name.startswith("code-")] == []
            (job,) = [obj for obj in yaml.safe_load_all(shown.out) if obj["kind"] == "Job"]
            assert [one["name"] for one in job["spec"]["template"]["spec"]["initContainers"]] == [
                "fetch-code", "unpack-code",
            ]  # fmt: skip
        finally:
            kubernetes.close()


def names(url: str) -> list[str]:
    with closing(Bucket(url)) as bucket:
        return bucket.names()


@dataclass
class Told:
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *words: str) -> Told:
    capsys.readouterr()
    code = main(list(words))
    out, err = capsys.readouterr()
    assert code == 0, err
    return Told(out, err)


def sent_words(tmp_path: Path, there: There) -> Sequence[str]:
    image = f"registry.example/train@sha256:{'1' * 64}"
    return ("shards", "make", "digits", "/data/digits", "cluster=kubernetes", f"cluster.image={image}",
            "cluster.volumes=[{claim: data, path: /data, read_only: false}]", f"cluster.code_store={there.url}",
            "cluster.store_secret=store/keys")  # fmt: skip


def serve(kubernetes: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_api import write_kubeconfig

    write_kubeconfig(tmp_path / "kubeconfig", kubernetes.url)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    claim = {"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}
    kubernetes.put("/api/v1", "persistentvolumeclaims", claim)
    kubernetes.put("/api/v1", "secrets", {"metadata": {"name": "store"}})
