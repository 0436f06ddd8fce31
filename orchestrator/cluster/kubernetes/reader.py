"""Runs in a pod beside a run's folder, as the text of a command: prints files into its log. The standard library only.

One line each: `file {path, size, from}`, its bytes from there as `part NUMBER BASE64`, then `end {path, sha256}`; parts
are numbered through, so that one that a log lost is missed. `done {files}` is the last.
"""

import base64
import hashlib
import json
import os
import sys
import time

PART = 11_520
"""Bytes; a line of a container's log is cut at 16 KiB."""
SKIPPED = ("lock",)


def files_of(folder, below, without):
    """Paths relative to the folder, in order, that begin with one of `below` and with none of `without`."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [one for one in folders if not one.startswith(".")]  # halves of what is being written
        for name in names:
            path = os.path.join(root, name)
            if not name.startswith(".") and name not in SKIPPED and os.path.isfile(path) and not os.path.islink(path):
                found.append(os.path.relpath(path, folder))
    return sorted(path for path in found if path.startswith(tuple(below)) and not path.startswith(tuple(without)))


def start_of(file, known):
    """From where to send: `known` is [size, sha256] of what the other side has, if that is how this file begins."""
    size, digest = known
    content = file.read(size)
    return size if len(content) == size and hashlib.sha256(content).hexdigest() == digest else 0


def send(folder, path, known, say, number):
    """Returns the number of the next part. A file that grows meanwhile is sent up to its size of now."""
    with open(os.path.join(folder, path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = start_of(file, known)
        say("file", json.dumps({"path": path, "size": size, "from": start}))
        file.seek(0)
        digest, left = hashlib.sha256(file.read(start)), size - start
        while left > 0:
            content = file.read(min(PART, left))
            if not content:
                break  # it became shorter
            left -= len(content)
            digest.update(content)
            say("part", f"{number} {base64.b64encode(content).decode()}")
            number += 1
    say("end", json.dumps({"path": path, "sha256": digest.hexdigest()}))
    return number


def main(folder, asked):
    """`asked`: known {path: [size, sha256]}, below, without (see `files_of`), bytes_per_s."""
    if not os.path.isdir(folder):
        print(f"none {folder}", flush=True)
        return
    began, sent = time.monotonic(), 0

    def say(kind, text):
        nonlocal sent
        sys.stdout.write(f"{kind} {text}\n")
        sent += len(text)
        early = sent / asked["bytes_per_s"] - (time.monotonic() - began)
        if early > 0.05:  # faster, and the node would rotate the log away before it is read
            sys.stdout.flush()
            time.sleep(early)

    number, paths = 0, files_of(folder, asked["below"], asked["without"])
    for path in paths:
        try:
            number = send(folder, path, asked["known"].get(path, [0, hashlib.sha256().hexdigest()]), say, number)
        except FileNotFoundError:
            continue  # pruned meanwhile
    say("done", json.dumps({"files": len(paths)}))
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
