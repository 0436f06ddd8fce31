"""``python -m tests.bench.loaders.remote SET``: images/s from S3 on the loopback, cold and cached.

The store is SeaweedFS, started here and ended here. Each loader gets a fresh cache folder and two workers; the seconds
are those from the call of iter() to the last batch of the epoch, so that what a loader fetches first is in them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from tests.bench.loaders import BATCH, lit, mosaic, ours
from tests.bench.loaders.catalogue import LOADERS
from tests.bench.loaders.sets import IMAGES

WEED = Path(sys.executable).parent / "weed"
BUCKET = "bench"
WORKERS = 2
BATCHES = IMAGES // BATCH - 1
START_S = 60
LONGEST_S = 150
"""For a loader's upload and both epochs."""


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


@contextmanager
def store(folder: Path) -> Iterator[Any]:
    """A client of a fresh S3 store; the environment tells every loader where it is."""
    import boto3

    master, volume, filer, s3 = _free_ports(4)
    url = f"http://127.0.0.1:{s3}"
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT": url, "AWS_ALLOW_HTTP": "true", "S3_ENDPOINT_URL": url,
    }  # fmt: skip
    ports = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-s3.port={s3}"]
    command = [
        "setpriv",
        "--pdeathsig",
        "TERM",
        WEED,
        "server",
        "-s3",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-volume.max=100",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        *ports,
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = boto3.client("s3")
        deadline = time.monotonic() + START_S
        while True:
            try:
                client.create_bucket(Bucket=BUCKET)
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield client
    finally:
        server.terminate()
        server.wait()


def upload(client: Any, folder: Path, prefix: str) -> None:
    from boto3.s3.transfer import TransferConfig

    plain = TransferConfig(use_threads=False, multipart_threshold=1 << 30)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}", Config=plain)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took longer than {LONGEST_S} s")


def allow_http() -> None:
    """litdata has no setting for an S3 store without TLS on its asynchronous path."""
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS = {**(downloader._OBSTORE_CLIENT_OPTIONS or {}), "allow_http": True}


def epoch(loader: Any) -> float:
    """Images/s."""
    began = time.perf_counter()
    taken = sum(1 for _ in islice(iter(loader), BATCHES))
    assert taken == BATCHES, f"{taken} batches"
    return round(BATCHES * BATCH / (time.perf_counter() - began), 1)


def main(data: Path) -> None:
    allow_http()
    signal.signal(signal.SIGALRM, _too_long)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, store(Path(folder)) as client:
        place, cache = f"s3://{BUCKET}", Path(folder) / "caches"
        os.environ["ORCHESTRATOR_CACHE"] = str(cache / "ours")
        loaders: dict[str, tuple[str, Callable[[], Any]]] = {
            "ours": (
                "crop_ready",
                lambda: ours.loader_of(f"{place}/crop_ready/train", WORKERS, "fast", range(BATCHES)),
            ),
            "litdata": ("litdata", lambda: lit.loader_of(f"{place}/litdata", WORKERS, str(cache / "litdata"))),
            "mosaic": ("mds", lambda: mosaic.loader_of(f"{place}/mds", WORKERS, "pil", str(cache / "mosaic"))),
        }
        for name, (kind, make) in loaders.items():
            print(name, file=sys.stderr, flush=True)
            signal.alarm(LONGEST_S)
            try:
                (cache / name).mkdir(parents=True, exist_ok=True)
                upload(client, data / kind, kind)
                cold, warm = epoch(make()), epoch(make())
                title = LOADERS[name].title
                found[name] = {"title": title, "cold_images_per_s": cold, "warm_images_per_s": warm}
            except Exception as error:
                lines = [line for line in str(error).splitlines() if line.strip()] or [""]
                found[name] = {"absent": f"{type(error).__name__}: {lines[-1]}"[:300]}
    signal.alarm(0)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
