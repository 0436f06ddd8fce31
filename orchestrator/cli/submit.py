"""`orchestrator train ... cluster=ray|kubernetes`: what is sent, where it went and what comes next."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.backends import backend_of, same_cluster
from orchestrator.cli.console import note, print_json
from orchestrator.cli.lifecycle import print_lines
from orchestrator.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError, DataError, TransientError
from orchestrator.options import CodeSource, Where

if TYPE_CHECKING:
    from orchestrator.bundle import Bundle
    from orchestrator.cluster.code import Archive
    from orchestrator.cluster.job import JobSpec
    from orchestrator.cluster_config import ClusterConfig
    from orchestrator.config import RunConfig
    from orchestrator.train.preflight import Sets

POLL_S = 1.0
END_S = 60.0
"""How long a cluster may take to say how a run ended whose logs have."""
LIVING = ("queued", "starting", "running")
LONG = 2000
"""Characters of a value that a terminal is spared."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is sent, and where."""

    spec: JobSpec
    archive: Archive | None
    cluster: ClusterConfig
    runs_dir: str

    @property
    def run_id(self) -> str:
        return self.spec.run_id

    @property
    def content(self) -> bytes | None:
        return self.archive.content if self.archive else None

    def facts(self) -> dict[str, Any]:
        """What a person should know of the code that goes along."""
        if self.archive is None:
            return {"archive": None}
        archive = self.archive
        return {"archive": {"bytes": len(archive.content), "sha256": archive.digest, "files": archive.files,
                            "source": archive.source, "left_out": list(archive.left_out)}}  # fmt: skip


def send(bundle: Bundle, args: argparse.Namespace) -> int:
    """Show, write or submit a run; with `--follow` its logs come here and its exit code is this command's."""
    _require_flags_that_fit(bundle.config, args)
    return deliver(parcel_of(bundle), args)


def deliver(parcel: Parcel, args: argparse.Namespace) -> int:
    """The same of any job."""
    if parcel.archive:
        note(f"code: {parcel.archive}")
        if parcel.archive.left_out:
            note(f"not sent: {', '.join(parcel.archive.left_out)}")
    if args.dry_run or args.manifest:
        return _show(parcel, args)
    facts = (_to_ray if parcel.cluster.where is Where.ray else _to_kubernetes)(parcel)
    _tell({"run_id": parcel.run_id, **facts, **parcel.facts()}, args)
    return _follow(parcel, args) if args.follow else EXIT_DONE


def _require_flags_that_fit(config: RunConfig, args: argparse.Namespace) -> None:
    where = config.cluster.where
    if args.canary:
        rule = "tries a run on this machine, and this one goes to a cluster"
        raise ConfigError("--canary", f"cluster={where.name}", rule, "cluster=local --canary, if its data is here too")
    if args.manifest and where is not Where.kubernetes:
        rule = "writes objects of Kubernetes"
        raise ConfigError("--manifest", f"cluster={where.name}", rule, "--dry-run prints what is sent to Ray")


def parcel_of(bundle: Bundle) -> Parcel:
    """What sending a run would send. Raises ConfigError for what could not run or would be lost."""
    from orchestrator.cluster.code import archive_of
    from orchestrator.cluster.job import job_of

    cluster = bundle.config.cluster
    job_of(bundle, "" if cluster.code is CodeSource.archive else None)  # refuses before seconds go into data and code
    sets = _look_at_data(bundle.config)
    archive = archive_of(cluster.code_files) if cluster.code is CodeSource.archive else None
    spec = job_of(bundle, archive and archive.digest, sets and sets.facts())
    if cluster.where is Where.kubernetes:
        from orchestrator.cluster.kubernetes.code_store import placed, store_of

        spec = placed(spec, archive, cluster, store_of(bundle.config))
    return Parcel(spec, archive, cluster, bundle.config.runs_dir)


def _look_at_data(config: RunConfig) -> Sets | None:
    """The shard sets, where this machine reaches them; their sizes and the model are then checked before anything is
    sent. Keys are those of this machine: `cluster.store_secret` is a place on the cluster."""
    from orchestrator.cluster.job import num_processes
    from orchestrator.train.preflight import check_for_elsewhere, open_sets

    here = replace(config, cluster=replace(config.cluster, store_secret=None))
    try:
        sets = open_sets(here)
    except (DataError, TransientError) as error:
        note(f"the data is not checked before it is needed: {str(error).partition('. Way out')[0]}, seen from here")
        return None
    check_for_elsewhere(here, sets, num_processes(config))
    return sets


def _show(parcel: Parcel, args: argparse.Namespace) -> int:
    if parcel.cluster.where is Where.ray:
        return _show_ray(parcel, args)
    from orchestrator.cluster.kubernetes.render import render
    from orchestrator.cluster.kubernetes.templates import to_yaml

    kind, why, where = _kind_of(parcel.cluster, parcel.spec)
    objects = render(parcel.spec, kind, parcel.content)
    note(f"{parcel.run_id}: {kind.name} ({why}), to {where}")
    if parcel.spec.archive_url:
        note(f"the code goes to {parcel.spec.archive_url} when this command sends the job; kubectl does not bring it")
    if args.manifest:
        args.manifest.write_text(to_yaml(objects))
        note(f"{len(objects)} objects in {args.manifest}, nothing was sent: kubectl create -f {args.manifest} does")
    elif args.json:
        facts = {"run_id": parcel.run_id, "kind": kind.name, "where": where, "objects": objects}
        print_json({**facts, **parcel.facts()})
    else:
        print(to_yaml(_spared(objects) if sys.stdout.isatty() else objects), end="")
    return EXIT_DONE


def _kind_of(cluster: ClusterConfig, spec: JobSpec) -> tuple[Any, str, str]:
    """The kind, why it is that one, and where it would go; a cluster is asked for `auto` alone, and need not answer."""
    from orchestrator.cluster.kubernetes.api import connect
    from orchestrator.cluster.kubernetes.submit import choose_kind
    from orchestrator.options import JobKind

    named = f"context {cluster.context or '(current)'}, namespace {cluster.namespace or '(of the context)'}"
    if spec.kind is not JobKind.auto:
        return spec.kind, _why(spec, "cluster.kind names it"), named
    try:
        api = connect(cluster.context, cluster.namespace)
        kind, why = choose_kind(api, spec.kind)
    except (ConfigError, TransientError) as error:
        if isinstance(error, ConfigError) and error.value is not None:
            raise  # there is a cluster, or a name for one, and something is wrong with it
        kinds = ", ".join(kind.name for kind in JobKind if kind is not JobKind.auto)
        why = str(error).partition(". Way out")[0]
        note(f"shown as a plain job, which every cluster runs: {why}. cluster.kind=... chooses, of {kinds}")
        return JobKind.job, "no cluster was asked", named
    return kind, why, f"{api.server}, context {api.context}, namespace {api.namespace}"


def _why(spec: JobSpec, of_a_run: str) -> str:
    """This kind was taken."""
    from orchestrator.cluster.job import TRAINS

    return of_a_run if spec.component == TRAINS else "one pod does it"


def _show_ray(parcel: Parcel, args: argparse.Namespace) -> int:
    from orchestrator.cluster.ray.submit import submission_of

    facts = {"where": parcel.cluster.address, "submission": submission_of(parcel.spec),
             "run.json": parcel.spec.bundle}  # fmt: skip
    if args.json:
        print_json({"run_id": parcel.run_id, **facts, **parcel.facts()})
        return EXIT_DONE
    from yaml import safe_dump

    note(f"{parcel.run_id}: to Ray's Jobs API at {parcel.cluster.address}")
    shown = _spared(facts) if sys.stdout.isatty() else facts
    print(safe_dump(shown, sort_keys=False, allow_unicode=True, width=120), end="")
    return EXIT_DONE


def _spared(node: Any) -> Any:
    """The same without long encoded values, of which nobody at a terminal reads anything."""
    if isinstance(node, dict):
        return {key: _spared(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_spared(item) for item in node]
    long = isinstance(node, str) and len(node) > LONG and "\n" not in node
    return f"({len(node):,} characters; they are printed where the output is no terminal)" if long else node


def _to_kubernetes(parcel: Parcel) -> dict[str, Any]:
    from orchestrator.cluster.kubernetes.api import connect
    from orchestrator.cluster.kubernetes.submit import submit

    api = connect(parcel.cluster.context, parcel.cluster.namespace)
    if parcel.content and parcel.spec.archive_url:
        from orchestrator.cluster.kubernetes.code_store import upload

        is_new = upload(parcel.content, parcel.spec.archive_url)
        keys = parcel.cluster.store_secret or "an identity of their own, for cluster.store_secret is not set"
        note(f"code: {'went' if is_new else 'had gone'} to {parcel.spec.archive_url}; pods fetch it with {keys}")
    sent = submit(api, parcel.spec, parcel.content)
    for said in sent.notes:
        note(said)
    where = f"{api.server}, context {api.context}, namespace {api.namespace}"
    why = _why(parcel.spec, sent.why)
    return {"outcome": sent.outcome, "kind": sent.kind, "why": why, "where": where, "state": sent.state.state}


def _to_ray(parcel: Parcel) -> dict[str, Any]:
    from orchestrator.cluster.ray.api import connect
    from orchestrator.cluster.ray.submit import submit

    dashboard = connect(parcel.cluster)
    sent = submit(dashboard, parcel.spec, parcel.content)
    outcome = "submitted" if sent.is_new else "there"
    return {"outcome": outcome, "kind": "job", "job": sent.submission_id, "where": dashboard.address}


SAID = {
    "submitted": "was sent",
    "there": "is there already, nothing was sent",
    "resumed": "goes on where it was stopped",
    "restarted": "was sent again under its name",
}


def _tell(facts: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        if not args.follow:  # else stdout is for the lines
            print_json(facts)
        return
    run_id, end = facts["run_id"], same_cluster(args)
    why = f" ({facts['why']})" if facts.get("why") else ""
    rows = [
        ("run", f"{run_id} {SAID[facts['outcome']]}"),
        ("kind", f"{facts['kind']}{why}"),
        ("where", facts["where"]),
        ("logs", f"orchestrator logs {run_id} -f{end}"),
        ("status", f"orchestrator status {run_id}{end}"),
        ("stop", f"orchestrator cancel {run_id}{end}"),
    ]
    print("\n".join(f"{name:<11} {text}" for name, text in rows), flush=True)


def _follow(parcel: Parcel, args: argparse.Namespace) -> int:
    """The run's lines until it ends; the exit code is the run's."""
    backend, run_id = backend_of(parcel.cluster, Path(parcel.runs_dir)), parcel.run_id
    try:
        print_lines(backend.logs(run_id, True, None), args.json)
        until = time.monotonic() + END_S
        while (facts := backend.status(run_id))["state"] in LIVING and time.monotonic() < until:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        note(f"no longer followed; run {run_id} goes on: orchestrator logs {run_id} -f{same_cluster(args)}")
        return EXIT_INTERRUPTED
    note(f"run {run_id}: {facts['state']}" + _because(facts))
    return exit_code_of(facts)


def _because(facts: dict[str, Any]) -> str:
    reason = facts.get("reason") or facts.get("error")
    return f" ({reason})" if reason else ""


def exit_code_of(facts: dict[str, Any]) -> int:
    """The run's own where it is known, else what its state comes to."""
    code = facts.get("exit_code")
    if code is not None:
        return int(code)
    return EXIT_DONE if facts["state"] == "done" else 1
