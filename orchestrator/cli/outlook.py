"""What a cluster says to a run that is not sent yet: the other half of `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.cli.console import note
from orchestrator.errors import EXIT_DONE, EXIT_USER
from orchestrator.options import JobKind

if TYPE_CHECKING:
    from orchestrator.bundle import Bundle
    from orchestrator.cluster.forecast.forecast import Forecast
    from orchestrator.cluster.snapshot import Snapshot


def look_ahead(bundle: Bundle, paths: list[Path]) -> Forecast:
    """Ask every layer of the cluster, or of a snapshot of it, about what would be sent."""
    from orchestrator.cli.submit import parcel_of
    from orchestrator.cluster.forecast.demand import Share
    from orchestrator.cluster.forecast.forecast import forecast
    from orchestrator.cluster.kubernetes.render import render

    parcel = parcel_of(bundle)
    if paths:
        from orchestrator.cluster.snapshot import read_snapshot

        around = read_snapshot(paths)
        kind = _kind(parcel.spec.kind, around)
        objects = render(parcel.spec, kind, parcel.content)
    else:
        from orchestrator.cluster.kubernetes.api import connect
        from orchestrator.cluster.kubernetes.submit import choose_kind
        from orchestrator.cluster.kubernetes.survey import survey

        api = connect(parcel.cluster.context, parcel.cluster.namespace)
        kind, _ = choose_kind(api, parcel.spec.kind)
        objects = render(parcel.spec, kind, parcel.content)
        around = survey(api, coming=objects)
    note(f"{parcel.run_id} as a {kind.name}, in namespace {around.namespace} of {around.place} at {around.taken}")
    return forecast(objects, around, Share(parcel.spec.processes_per_node, parcel.spec.resources.shm_bytes))


def _kind(wanted: JobKind, around: Snapshot) -> JobKind:
    """`auto` as a submission takes it: a JobSet where the cluster serves them."""
    if wanted is not JobKind.auto:
        return wanted
    return JobKind.job if around.unread("JobSet") else JobKind.jobset


def rows(found: Forecast) -> list[tuple[str, str]]:
    """(name, text) of each layer, what stands in the way first."""
    from orchestrator.cluster.forecast.answer import Verdict

    blind = sorted({one.layer for one in found.findings if not one.verdict})
    doubt = f", as far as was checked (not: {', '.join(blind)})" if blind and found.verdict < Verdict.never else ""
    listed = [("verdict", found.verdict.word + doubt)]
    for finding in sorted(found.findings, key=lambda one: -one.verdict):
        listed.append((finding.layer, f"{finding.verdict.word}: {finding.said}"))
        if finding.way_out:
            listed.append(("", f"way out: {finding.way_out}"))
    return listed


def exit_code_of(found: Forecast) -> int:
    """A run that can never start is its config's mistake."""
    from orchestrator.cluster.forecast.answer import Verdict

    return EXIT_USER if found.verdict is Verdict.never else EXIT_DONE
