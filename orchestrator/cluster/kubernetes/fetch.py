"""Runs in a pod before the code is unpacked, as the text of a command: brings its archive from an object store.

The store is read by `data/objects.py`, whose text comes as an argument, in a process of its own as everywhere. Keys
come from a file and go through a pipe. What is fetched is checked by the one that unpacks it.
"""

import json
import subprocess
import sys
import threading
import time

TRIES = 5
PAUSE_S = 2.0
"""Before the second try; it doubles."""
LIMIT_S = 300.0
"""After which a store that sends nothing more is taken for dead."""
PASSING = (None, 429)
"""Statuses besides those from 500 on after which another try may succeed; None: no answer."""
Failure = tuple[str, int | None]


def keys_of(path: str) -> dict[str, str]:
    """Lines NAME=VALUE."""
    with open(path) as file:
        lines = [line.strip() for line in file]
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def fetch(url: str, keys: dict[str, str], reader: str) -> bytes | Failure:
    """The object, or what went wrong and its status."""
    request = {"url": url, "offset": 0, "version": None, "keys": keys}
    command = [sys.executable, "-I", "-c", reader]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        assert child.stderr
        timer = threading.Timer(LIMIT_S, child.kill)
        timer.start()
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()  # and left open: its end would end the child
            head = json.loads(child.stdout.readline() or b'{"error": "no answer", "status": null}')
            content = child.stdout.read()
            if "error" in head:
                return head["error"], head["status"]
            if child.wait() or len(content) != head["total"]:
                return child.stderr.read().decode(errors="replace").strip() or "the connection broke", None
            return content
        finally:
            timer.cancel()
            child.kill()


def without(text: str, keys: dict[str, str]) -> str:
    for value in keys.values():
        text = text.replace(value, "...") if len(value) > 3 else text
    return text


def main(archive: str, url: str, keys_file: str, reader: str) -> int:
    keys = keys_of(keys_file) if keys_file else {}
    pause_s, found = PAUSE_S, ("", None)
    for left in reversed(range(TRIES)):
        found = fetch(url, keys, reader)
        if isinstance(found, bytes):
            with open(archive, "wb") as file:
                file.write(found)
            return 0
        if left == 0 or not (found[1] in PASSING or found[1] >= 500):
            break
        time.sleep(pause_s)
        pause_s *= 2
    said, status = found
    lasting = status not in PASSING and status < 500
    way_out = "cluster.store_secret names keys that may read there; submit again brings the code anew"
    if not keys:
        way_out = "cluster.store_secret=NAME/KEY, or a cluster.service_account with an identity that may read there"
    elif not lasting:
        way_out = "try again"
    told = f"code archive = {url}: the store does not give it ({status or 'no answer'}: {without(said, keys)})"
    print(f"{told}. Way out: {way_out}", file=sys.stderr)
    return 42 if lasting else 75


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
