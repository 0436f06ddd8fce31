"""An S3 store on the loopback: SeaweedFS, started here and ended here."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

WEED = Path(sys.executable).parent / "weed"
BUCKET = "bench"
START_S = 120
FIXED = ("-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=100", "-s3.port.iceberg=0", "-s3.port.lance=0")
IDENTITIES = (
    {"name": "any", "credentials": [{"accessKey": "any", "secretKey": "any"}], "actions": ["Read", "Write", "List"]},
    {"name": "anonymous", "actions": ["Admin"]},
)
"""Who reads, and who makes the bucket: a request that needs no signature."""
_SENT = re.compile(rf'^SeaweedFS_s3_bucket_traffic_sent_bytes_total{{bucket="{BUCKET}"}} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Store:
    """A running server with one bucket."""

    bucket: Any
    """obstore's client of it."""
    metrics: str
    """Address of the server's counters."""

    def sent_bytes(self) -> int:
        """What left the bucket so far, in answers to whoever asked."""
        with urlopen(self.metrics) as reply:
            found = _SENT.search(reply.read().decode())
        return int(float(found[1])) if found else 0

    def upload(self, folder: Path, prefix: str) -> int:
        """Put the files of a folder below `prefix`; returns their bytes."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in paths:
            self.bucket.put(f"{prefix}/{path.relative_to(folder)}", path, use_multipart=False)
        return sum(path.stat().st_size for path in paths)


@contextmanager
def store(folder: Path) -> Iterator[Store]:
    """A fresh store that keeps its files in `folder`; the environment tells every loader where it is."""
    master, volume, filer, s3, metrics = _free_ports(5)
    url, config = f"http://127.0.0.1:{s3}", folder / "s3.json"
    _tell_where(url)
    folder.mkdir()
    config.write_text(json.dumps({"identities": IDENTITIES}))
    ports = {"master.port": master, "volume.port": volume, "filer.port": filer, "s3.port": s3, "metricsPort": metrics}
    options = [f"-dir={folder}", f"-s3.config={config}", *FIXED, *(f"-{name}={port}" for name, port in ports.items())]
    command = ["setpriv", "--pdeathsig", "KILL", str(WEED), "server", *options]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Store(_bucket(url, server, folder / "log"), f"http://127.0.0.1:{metrics}/metrics")
    finally:
        server.kill()  # it takes half a minute to end politely, and its files go away
        server.wait()


def _tell_where(url: str) -> None:
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT": url, "AWS_ALLOW_HTTP": "true", "S3_ENDPOINT_URL": url,
    }  # fmt: skip


def _bucket(url: str, server: subprocess.Popen[bytes], log: Path) -> Any:
    """A client once the server takes a bucket, which is some seconds after its start. Raises RuntimeError."""
    from obstore.store import S3Store

    deadline = time.monotonic() + START_S
    while True:
        try:
            with urlopen(Request(f"{url}/{BUCKET}", method="PUT")):
                return S3Store(BUCKET, client_options={"allow_http": True})
        except OSError as error:
            if server.poll() is not None or time.monotonic() > deadline:
                said = log.read_text().strip().splitlines()[-1:]
                raise RuntimeError(f"no store: {error}; SeaweedFS's last word: {said}") from error
            time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    """SeaweedFS listens with gRPC on a port 10,000 above each."""
    sockets, ports = [], []
    while len(ports) < count:
        sockets.append(socket.create_server(("127.0.0.1", 0)))
        port = sockets[-1].getsockname()[1]
        ports += [port] if port < 55_000 else []
    for one in sockets:
        one.close()
    return ports
