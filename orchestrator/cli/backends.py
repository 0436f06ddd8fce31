"""Which cluster a verb asks, and which run: flags and overrides that all verbs on runs share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.runs import add_config_flags
from orchestrator.errors import ConfigError, UserError, nearest
from orchestrator.options import Where
from orchestrator.secrets import use_for_stores

if TYPE_CHECKING:
    from orchestrator.cluster.backend import Backend
    from orchestrator.cluster_config import ClusterConfig

CLUSTER = ("cluster=", "cluster.")
CHOOSING = (
    "cluster=", "cluster.context=", "cluster.namespace=", "cluster.address=", "cluster.token_file=",
    "cluster.insecure=",
)  # fmt: skip


def add_verb(subparsers: Any, name: str, text: str, epilog: str, run: Callable[[argparse.Namespace], int]) -> Any:
    """A verb on runs of one cluster: `cluster=...` and `cluster.KEY=...` choose which."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = subparsers.add_parser(name, help=text, epilog=epilog, formatter_class=raw)
    text = "folder of runs (default: %(default)s), or their address in an object store"
    parser.add_argument("--runs-dir", type=runs_place, default=Path("runs"), metavar="DIR|URL", help=text)
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    add_config_flags(parser)
    parser.set_defaults(run=run, takes_overrides=True)
    return parser


def runs_place(text: str) -> Path | str:
    """A folder as a path, an address in a store as it was typed."""
    return text if "://" in text else Path(text)


def add_id(parser: Any, nargs: str | None = None) -> None:
    text = "of the run, or its beginning" + ("; the last one where left out" if nargs else "")
    parser.add_argument("run_id", nargs=nargs, metavar="ID", help=text)


def choose_backend(args: argparse.Namespace) -> Backend:
    """The cluster that the overrides name, else the store that --runs-dir names, else this machine.

    A path as ID names a folder of runs.
    """
    config = compose_cluster(args)
    if config is not None and (config.store_secret or "").startswith("/"):
        use_for_stores(config.store_secret)
    if config is None or config.where is Where.local:
        if isinstance(args.runs_dir, str):
            from orchestrator.cluster.stored_backend import StoredBackend

            return StoredBackend(args.runs_dir)
        from orchestrator.cli.runs import go_on
        from orchestrator.cluster.local_backend import LocalBackend

        _take_path(args)
        return LocalBackend(args.runs_dir, lambda folder: go_on(folder, args.json))
    return backend_of(config, folder_here(args.runs_dir))


def backend_of(config: ClusterConfig, runs_dir: Path) -> Backend:
    """Of another machine."""
    assert config.where is not Where.local
    if config.where is Where.ray:
        from orchestrator.cluster.ray.backend import open_backend
    else:
        from orchestrator.cluster.kubernetes.backend import open_backend
    return open_backend(config, runs_dir)


def folder_here(place: Path | str) -> Path:
    """The folder of this machine for runs that are kept elsewhere."""
    return Path("runs") if isinstance(place, str) else place


def open_run(args: argparse.Namespace) -> tuple[Backend, str]:
    """The cluster, and the id of its run that `ID` means."""
    backend = choose_backend(args)
    return backend, find_id(args.run_id, backend.ids(), _place(args), same_cluster(args))


def find_id(text: str | None, ids: list[str], where: str, more: str) -> str:
    """The id that begins like `text`, the last one for None. Raises UserError with what was likely meant.

    `where`: the runs' place in words; `more`: what names the cluster in the next command.
    """
    if text is None:
        if not ids:
            raise UserError(f"{where}: no run there. Way out: orchestrator train experiment=quickstart{more}")
        return ids[-1]
    if text in ids:
        return text
    found = [run_id for run_id in ids if run_id.startswith(text)]
    if len(found) > 1:
        some = ", ".join(found[:5]) + (" ..." if len(found) > 5 else "")
        raise UserError(f"ID {text} is the beginning of {len(found)} runs: {some}. Way out: more of it")
    if not found:
        hint = nearest(text, ids) if ids else "there is none at all"
        raise UserError(f"ID {text} is no run in {where}: {hint} Way out: orchestrator ls{more}")
    return found[0]


def same_cluster(args: argparse.Namespace) -> str:
    """What a command needs at its end to ask the same cluster: no image and no volumes."""
    chosen = [text for text in args.overrides if text.startswith(CHOOSING)]
    folders = [word for folder in args.config_dir for word in ("--config-dir", str(folder))]
    words = [*chosen, *(folders if chosen else [])]
    return f" {shlex.join(words)}" if words else ""


def _place(args: argparse.Namespace) -> str:
    return shlex.join(args.overrides) if args.overrides else f"--runs-dir {args.runs_dir}"


def _take_path(args: argparse.Namespace) -> None:
    run_id = getattr(args, "run_id", None)
    if run_id and (Path(run_id) / "run.json").exists():
        args.runs_dir, args.run_id = Path(run_id).parent, Path(run_id).name


def compose_cluster(args: argparse.Namespace) -> ClusterConfig | None:
    """What the overrides say of the cluster; None where nothing is typed: what happens here needs no config."""
    others = [text for text in args.overrides if not text.startswith(CLUSTER)]
    if others:
        key, _, value = others[0].partition("=")
        raise ConfigError(key, value, f"is no key of the cluster, and {args.verb} needs no other", "leave it out")
    if not args.overrides and not args.config_dir:
        return None
    from orchestrator.compose import compose

    return compose(args.overrides, args.config_dir).config.cluster
