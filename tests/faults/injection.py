"""What strikes a rank from inside: the launcher's entry wrapped by a test, so that the product knows nothing of it.

Orders lie in the folder where the command was typed, as a JSON list in `strikes.json`; each fires once and leaves
`struck_N.json`. Beside that, every rank writes which samples each of its optimizer steps was computed from.
"""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

FOREVER_S = 10_000
ORDERS = "strikes.json"


class Injector:
    """The strikes that wait for this rank."""

    def __init__(self, folder: Path, rank: int, attempt: int):
        self.folder, self.rank, self.attempt = folder, rank, attempt
        path = folder / ORDERS
        self._orders = json.loads(path.read_text()) if path.exists() else []

    def reach(self, phase: str, step: int) -> None:
        """Called where a fault may strike; `step` counts committed steps, or batches in a loader's process."""
        for number, order in enumerate(self._orders):
            here = (order["rank"], order["phase"], order["step"]) == (self.rank, phase, step)
            if here and order.get("attempt", self.attempt) == self.attempt and self._claim(number, phase, step):
                FAULTS[order["fault"]](self)

    def _claim(self, number: int, phase: str, step: int) -> bool:
        """Leave the proof that the fault fired, which also keeps it from firing again."""
        try:
            descriptor = os.open(self.folder / f"struck_{number}.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        facts = {"t": time.time(), "pid": os.getpid(), "attempt": self.attempt, "phase": phase, "step": step}
        os.write(descriptor, json.dumps(facts).encode())
        os.close(descriptor)
        return True


def _raise(_: Injector) -> None:
    raise ArithmeticError("struck by a test")


def _exit(_: Injector) -> None:
    sys.exit(0)  # the worst of them: a rank that leaves early and claims that all is well


def _signal(number: signal.Signals) -> Callable[[Injector], None]:
    return lambda _: os.kill(os.getpid(), number)


def _segmentation_fault(_: Injector) -> None:
    ctypes.string_at(0)


def _hold_gil(_: Injector) -> None:
    ctypes.PyDLL(None).sleep(FOREVER_S)


def _hang_loader(_: Injector) -> None:
    if get_worker_info() is None:
        _strike_loaders(signal.SIGSTOP)
    else:
        time.sleep(FOREVER_S)


def _kill_loader(_: Injector) -> None:
    if get_worker_info() is None:
        _strike_loaders(signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def _strike_loaders(number: signal.Signals) -> None:
    """From the rank itself, whose only children are the loader's processes."""
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, number)


def _fill_disk(_: Injector) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _tear(injector: Injector) -> None:
    """Cut a file of the newest checkpoint in half, then die: the file that this rank writes."""
    name = "model.safetensors" if injector.rank == 0 else f"rank_{injector.rank}.pt"
    newest = max(injector.folder.glob("runs/*/checkpoints/step_*"), key=lambda path: path.name)
    path = newest / name
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Callable[[Injector], None]] = {
    "exception": _raise,
    "sys.exit": _exit,
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGINT": _signal(signal.SIGINT),
    "SIGKILL": _signal(signal.SIGKILL),
    "SIGSEGV": _segmentation_fault,
    "abort": lambda _: os.abort(),
    "SIGSTOP": _signal(signal.SIGSTOP),
    "GIL lock": _hold_gil,
    "loader hang": _hang_loader,
    "loader SIGKILL": _kill_loader,
    "torn checkpoint": _tear,
    "disk full": _fill_disk,
}


def rank(bundle_path: str, attempt: int, began: float) -> None:
    """The entry that the launcher is given in place of `jobs.train.rank`."""
    import bugs

    import jobs.train

    injector = Injector(Path.cwd(), int(os.environ["RANK"]), attempt)
    _hook_phases(injector)
    _hook_saves(injector)
    _hook_loader(injector)
    _record_samples(injector)
    bugs.install(injector)
    jobs.train.rank(bundle_path, attempt, began)  # of this process, which the launcher has not touched


def hide_shared_memory() -> None:
    """In the launcher, where it may: a /dev/shm of its own, so that whatever is left there is known to be the run's."""
    libc, private, recursive, mounts = ctypes.CDLL(None), 1 << 18, 1 << 14, 0x20000
    if libc.unshare(mounts) == 0 and libc.mount(b"none", b"/", None, private | recursive, None) == 0:
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)


def take_over() -> None:
    """In the launcher: put `rank` above in the place of the product's, and let the fork server import it."""
    import jobs.train
    from orchestrator.cluster import local

    local.PRELOADED.append("injection")
    jobs.train.rank = rank


def _hook_phases(injector: Injector) -> None:
    """Start: before the ranks meet. Step: amid it. Validation: with its first batch in hand."""
    from orchestrator.model.module import Classifier
    from orchestrator.train.heartbeat import Heartbeat

    begin, follow, compute = Heartbeat.__init__, Heartbeat.following, Classifier.training_step

    def heartbeat(self: Heartbeat, path: Path | None = None) -> None:
        begin(self, path)
        if path is not None:
            injector.reach("start", 0)

    def following(self: Heartbeat, items: Any) -> Iterator[Any]:
        for item in follow(self, items):
            if self.phase == "validation":
                injector.reach("validation", self.step)
            yield item

    def training_step(self: Classifier, batch: Any, batch_idx: int) -> Any:
        injector.reach("step", self.step)
        return compute(self, batch, batch_idx)

    Heartbeat.__init__, Heartbeat.following = heartbeat, following
    Classifier.training_step = training_step


def _hook_saves(injector: Injector) -> None:
    """The first rank: in its writer, amid a file. The others: before they hand their part over, and in their event."""
    from orchestrator.files import disk_errors
    from orchestrator.train.ledger import Ledger
    from orchestrator.train.saver import Saver
    from orchestrator.train.writing import Sums

    save, write, append = Saver.save, Sums.write, Ledger._append

    def handed_over(self: Saver, state: Any, manifest: dict[str, Any], told: Any) -> None:
        if injector.rank:
            injector.reach("save", manifest["step"])
        save(self, state, manifest, told)

    def torn_write(self: Sums, content: Any) -> int:
        view, place = memoryview(content).cast("B"), Path(self._file.name).parent.name
        half = write(self, view[: len(view) // 2])
        if place.startswith("step_"):
            injector.reach("save", int(place.removeprefix("step_")))
        return half + write(self, view[len(view) // 2 :])

    def torn_append(self: Ledger, content: bytes) -> None:
        with disk_errors(self._path):
            if b'"kind": "save"' in content and injector.rank:
                injector.reach("save event", json.loads(content)["step"])
        append(self, content)

    Saver.save, Sums.write, Ledger._append = handed_over, torn_write, torn_append


def _hook_loader(injector: Injector) -> None:
    """In a loader's process: before its n-th batch of an attempt."""
    from orchestrator.data.stream import EvalFinish, Filler

    fill, filled = Filler.fill, {"train": 0, "eval": 0}

    def hooked(self: Filler, request: Any) -> Any:
        kind = "eval" if isinstance(self._finish, EvalFinish) else "train"
        injector.reach(f"{kind} loader", filled[kind])
        filled[kind] += 1
        return fill(self, request)

    Filler.fill = hooked


def _record_samples(injector: Injector) -> None:
    """Which samples a step was computed from, written after the optimizer has stepped; and where an attempt goes on."""
    from orchestrator.model.module import Classifier
    from orchestrator.train.checkpoint import Checkpoint

    compute, commit, load, ids = Classifier.training_step, Classifier.optimizer_step, Checkpoint.load_state, []
    path = injector.folder / "samples" / f"rank_{injector.rank}.jsonl"
    path.parent.mkdir(exist_ok=True)

    def write(**facts: Any) -> None:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps({"attempt": injector.attempt, **facts}) + "\n").encode())

    def load_state(self: Checkpoint) -> Any:
        write(goes_on_from=self.manifest["step"])
        return load(self)

    def training_step(self: Classifier, batch: Any, batch_idx: int) -> Any:
        loss = compute(self, batch, batch_idx)
        ids.extend(number for number in batch.ids.tolist() if number >= 0)
        return loss

    def optimizer_step(self: Classifier, *arguments: Any, **named: Any) -> None:
        commit(self, *arguments, **named)
        write(step=self.step, ids=ids)
        ids.clear()

    Classifier.training_step, Classifier.optimizer_step = training_step, optimizer_step
    Checkpoint.load_state = load_state
