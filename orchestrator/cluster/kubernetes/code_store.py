"""The archive of the code in an object store, where it is too large for an object of the cluster.

Its name is the hash of its content, so that whoever brings it first, brings it for all; the pods check the hash.
"""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace

from orchestrator.cluster.code import Archive
from orchestrator.cluster.job import JobSpec, SecretFile
from orchestrator.cluster.kubernetes.render import LARGEST_ARCHIVE
from orchestrator.cluster_config import ClusterConfig
from orchestrator.config import RunConfig
from orchestrator.errors import ConfigError, TransientError
from orchestrator.secrets import parse_reference

KEY = "cluster.code_store"
STORE = re.compile(r"(s3|gs|az)://[^/]+(/.*)?")
SHOWN = 3


def store_of(config: RunConfig) -> str | None:
    """`cluster.code_store`, else the store that the run has anyway."""
    known = (config.cluster.code_store, config.runs_dir, config.checkpointing.mirror)
    return next((place for place in known if place and STORE.fullmatch(place)), None)


def address_of(archive: Archive, store: str | None) -> str | None:
    """Where the archive goes; None: into a ConfigMap. Raises ConfigError where it is too large and has no place."""
    if len(archive.content) <= LARGEST_ARCHIVE:
        return None
    if store is not None:
        return f"{store.rstrip('/')}/code-{archive.digest}.tar.gz"
    size, most = f"{len(archive.content) / 1024:.0f} KiB", LARGEST_ARCHIVE // 1024
    largest = ", ".join(f"{path} ({size / 1024:.0f} KiB)" for path, size in archive.largest[:SHOWN])
    rule = f"makes {size}, an object of Kubernetes takes {most}; the largest of its {archive.files} files: {largest}"
    way_out = f"{KEY}=s3://BUCKET/PREFIX, fewer files (cluster.code_files, .gitignore), or cluster.code=image"
    raise ConfigError("cluster.code", "archive", rule, way_out)


def placed(spec: JobSpec, archive: Archive | None, cluster: ClusterConfig, store: str | None) -> JobSpec:
    """The job with the place of its code: pods fetch what is in a store, with the store's keys as a file."""
    url = address_of(archive, store) if archive else None
    if url is None:
        return spec
    named = parse_reference("store", cluster.store_secret) if cluster.store_secret else None
    others = tuple(secret for secret in spec.secrets if secret.purpose != "store")
    return replace(spec, archive_url=url, secrets=(*others, *([SecretFile("store", *named)] if named else ())))


def upload(archive: bytes, url: str) -> bool:
    """Whether this brought it: it may be there already. The keys are those of this machine's environment.

    Raises ConfigError where the store refuses, TransientError where it does not answer.
    """
    from orchestrator.train.bucket import ABSENT, Bucket, Conflict, StoreError

    folder, _, name = url.rpartition("/")
    try:
        with closing(Bucket(folder)) as bucket:
            bucket.put(name, archive, ABSENT)
    except Conflict:
        return False
    except StoreError as error:
        if error.passing:
            raise TransientError(
                f"{KEY} = {folder}: {error}. Way out: try again; is AWS_ENDPOINT_URL right?"
            ) from error
        way_out = "keys that may write there, in the environment (AWS_ACCESS_KEY_ID ...), or another store"
        raise ConfigError(KEY, folder, f"does not take the code: {error}", way_out) from error
    return True
