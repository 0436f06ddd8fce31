"""The shell over the client: what reaches the server, and how each failure is named."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from fake_api import FakeApi, write_kubeconfig

from orchestrator.cluster.kubernetes import api as shell
from orchestrator.cluster.kubernetes import context
from orchestrator.cluster.kubernetes.api import Api, connect
from orchestrator.cluster.kubernetes.failures import Conflict, Forbidden, Gone, NotFound, NotServed, Refused
from orchestrator.cluster.kubernetes.resources import CONFIG_MAP, JOB, JOBSET, POD, SECRET
from orchestrator.errors import ConfigError, TransientError

CORE = "/api/v1"


def config_map(name: str, **labels: str) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": labels},
        "data": {"a": "b: c\n---"},
    }


def test_what_is_created_can_be_read_changed_listed_and_deleted(server: FakeApi, api: Api) -> None:
    made, warnings = api.create(config_map("one", team="a"))
    assert made["metadata"]["uid"]
    assert warnings == []
    assert api.get(CONFIG_MAP, "one")["data"] == {"a": "b: c\n---"}
    api.patch(CONFIG_MAP, "one", {"metadata": {"labels": {"team": None, "stage": "x"}}})
    assert [one["metadata"]["name"] for one in api.list(CONFIG_MAP, "stage=x")[0]] == ["one"]
    assert api.list(CONFIG_MAP, "team=a")[0] == []
    assert api.delete(CONFIG_MAP, "one")
    assert not api.delete(CONFIG_MAP, "one")
    assert api.find(CONFIG_MAP, "one") is None


def test_a_list_is_read_page_by_page(server: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "PAGE", 10)
    for number in range(25):
        server.put(CORE, "configmaps", config_map(f"map-{number:02}"))
    server.calls.clear()
    assert len(api.list(CONFIG_MAP)[0]) == 25
    assert len(server.calls) == 3


def test_warnings_of_the_server_come_with_the_object(server: FakeApi, api: Api) -> None:
    server.warnings = ['would violate PodSecurity "restricted:latest": runAsNonRoot']
    assert api.create(config_map("one"))[1] == server.warnings


@pytest.mark.parametrize("fault", [429, 500, 503, "reset"])
def test_a_call_is_repeated_while_the_server_cannot_answer(server: FakeApi, api: Api, fault: int | str) -> None:
    server.put(CORE, "configmaps", config_map("one"))
    server.faults = [("GET", fault), ("GET", fault)]
    assert api.get(CONFIG_MAP, "one")["metadata"]["name"] == "one"
    assert server.calls.count(("GET", "/api/v1/namespaces/default/configmaps/one")) == 3


def test_a_server_that_stays_overloaded_is_named_as_transient(server: FakeApi, api: Api) -> None:
    server.faults = [("GET", 503)] * 3
    with pytest.raises(TransientError, match=r"cannot get configmaps one now \(503\).*Way out: try again"):
        api.get(CONFIG_MAP, "one")


def test_a_refusal_is_not_repeated(server: FakeApi, api: Api) -> None:
    with pytest.raises(NotFound, match="configmaps"):
        api.get(CONFIG_MAP, "none")
    assert len(server.calls) == 1


def test_a_dead_server_is_transient_and_named(tmp_path: Path, server: FakeApi) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{port}")
    with pytest.raises(TransientError, match=rf"127.0.0.1:{port} \(cluster.context = test\) does not answer.*refused"):
        connect().get(POD, "x")


def test_a_server_that_speaks_no_tls_is_the_users_mistake(tmp_path: Path, server: FakeApi) -> None:
    write_kubeconfig(tmp_path / "kubeconfig", server.url.replace("http:", "https:"))
    with pytest.raises(ConfigError, match=r"cluster.context = test: .*do not trust each other"):
        connect().get(POD, "x")


def test_a_server_that_never_answers_is_given_up(
    tmp_path: Path, server: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "SILENCE_S", 0.2)
    monkeypatch.setattr(shell, "PAUSES_S", (0.01,))
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with pytest.raises(TransientError, match=r"does not answer.*timed out"):
            connect().get(POD, "x")


def test_expired_credentials_are_the_users_to_renew(tmp_path: Path, server: FakeApi) -> None:
    write_kubeconfig(tmp_path / "kubeconfig", server.url, token="expired")
    with pytest.raises(ConfigError, match=r"cluster.context = test: .*credentials.*Way out: log in again") as caught:
        connect().get(POD, "x")
    assert caught.value.exit_code == 42


def test_a_missing_right_names_verb_resource_and_namespace(server: FakeApi, api: Api) -> None:
    server.denied = {("create", "configmaps"), ("list", "pods")}
    with pytest.raises(Forbidden, match=r"cluster.namespace = default: no right to create configmaps in it. Way out: "):
        api.create(config_map("one"))
    with pytest.raises(Forbidden, match="no right to list pods"):
        api.list(POD)


def test_an_admission_refuses_in_its_own_words(server: FakeApi, api: Api) -> None:
    server.admission = [lambda verb, obj: 'violates PodSecurity "restricted:latest": runAsNonRoot != true']
    with pytest.raises(Refused, match=r"configmaps.*violates PodSecurity .restricted:latest.*Way out: a namespace"):
        api.create(config_map("one"))


def test_a_missing_namespace_is_named(server: FakeApi) -> None:
    with pytest.raises(ConfigError, match=r"cluster.namespace = visoin: the cluster has no such namespace"):
        connect(namespace="visoin").create(config_map("one"))


def test_what_exists_already_is_a_conflict(server: FakeApi, api: Api) -> None:
    api.create(config_map("one"))
    with pytest.raises(Conflict, match="already exists"):
        api.create(config_map("one"))
    with pytest.raises(Conflict, match="UID"):
        api.delete(CONFIG_MAP, "one", uid="another")


def test_a_kind_that_is_not_served_is_told_from_an_object_that_is_absent(server: FakeApi, api: Api) -> None:
    del server.served["/apis/jobset.x-k8s.io/v1alpha2"]
    assert api.serves(JOB)
    assert not api.serves(JOBSET)
    with pytest.raises(NotServed, match="does not serve"):
        api.list(JOBSET)


def test_only_the_metadata_of_a_secret_is_asked_for(server: FakeApi, api: Api) -> None:
    server.put(CORE, "secrets", {"metadata": {"name": "key"}, "data": {"k": "djo="}})
    assert api.get(SECRET, "key", metadata_only=True)["metadata"]["name"] == "key"
    assert "as=PartialObjectMetadata" in server.accepted[-1]


def test_the_context_may_be_named_and_brings_its_namespace(server: FakeApi) -> None:
    assert connect("staging").namespace == "vision"
    assert connect("staging", "other").namespace == "other"
    assert (connect().namespace, connect().context) == ("default", "test")


def test_an_unknown_context_gets_the_nearest_name(server: FakeApi) -> None:
    with pytest.raises(ConfigError, match=r"cluster.context = stagin: .*did you mean 'staging'\?"):
        connect("stagin")


@pytest.mark.parametrize("content", ["", "{", "clusters: 3", '{"contexts": []}'])
def test_a_broken_kubeconfig_is_named(tmp_path: Path, server: FakeApi, content: str) -> None:
    (tmp_path / "kubeconfig").write_text(content)
    with pytest.raises(ConfigError, match=r"cluster.context = None: .*kubeconfig"):
        connect()


def test_no_kubeconfig_at_all_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"there is no kubeconfig at .*none. Way out: set KUBECONFIG"):
        connect()


def test_in_a_pod_the_service_account_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    (tmp_path / "token").write_text("abc")
    (tmp_path / "namespace").write_text("vision\n")
    monkeypatch.setattr(context, "ACCOUNT", tmp_path)
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    (tmp_path / "ca.crt").write_text("-----")
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    client, namespace, name = context.client_of(None, None)
    assert (client.configuration.host, namespace) == ("https://127.0.0.1:6443", "vision")
    assert name == "the pod's service account"


def test_a_watch_tells_of_changes_and_of_a_version_that_is_too_old(server: FakeApi, api: Api) -> None:
    _, version = api.list(POD)
    stream = api.watch(POD, "team=a", version)
    threading.Timer(0.05, server.put, (CORE, "pods", {"metadata": {"name": "p", "labels": {"team": "a"}}})).start()
    lines = iter(stream)
    kind, pod = api.read_event(next(lines))
    assert (kind, pod["metadata"]["name"]) == ("ADDED", "p")
    stream.close()
    assert list(lines) == []
    server.oldest = 1000
    with pytest.raises(Gone):
        [api.read_event(line) for line in api.watch(POD, "", "1")]


def test_a_stream_that_breaks_is_transient(server: FakeApi, api: Api) -> None:
    lines = iter(api.watch(POD, "", "0"))
    threading.Timer(0.05, server.break_off).start()
    with pytest.raises(TransientError, match="does not answer"):
        next(lines)
