"""Runs that are struck: one command after the other on a warm server whose ranks come with an injector."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launching import Answer, WarmServer, environment, group_members, read_events, wait_for

HERE = Path(__file__).parent
GLOBAL_BATCH = 8
HANG_S = 6.0
"""Silence after which a rank of these runs counts as hung; a step takes 30 ms."""
RUN = (
    "data=synthetic", "data.image_size=8", "data.padding=1", "data.num_workers=1", "model=cifar_resnet20",
    "model.dropout=0.2", "recipe.epochs=2", f"recipe.global_batch_size={GLOBAL_BATCH}", "recipe.warmup_epochs=1",
    "recipe.ema_decay=0.9", "optimizer.lr=0.1", "compute=cpu2", "tracking=disabled", "tracking.log_every_steps=5",
    "checkpointing.every_steps=7", "checkpointing.keep_last=3", "cluster.backoff_s=0.1",
    *(f"cluster.hang_{phase}_s={HANG_S}" for phase in ("start", "step", "validation", "save")),
)  # fmt: skip
HISTORY = ("train/loss", "train/acc1", "train/acc5", "lr", "val/loss", "val/acc1", "val/acc5", "epoch")
EQUAL = ("run_id", "state", "step", "epoch", "state_sha256", "weights_sha256", "metrics")
GONE_S = 10.0
"""How long the last process of a run may take to go."""
PRELUDE = """
import os
os.environ["TMPDIR"] = {temporary!r}
import injection
injection.hide_shared_memory()
injection.take_over()
"""


class Bench:
    """Runs commands in fresh folders and looks at what they leave."""

    def __init__(self, root: Path):
        self.root, self.temporary = root, root / "tmp"
        self.temporary.mkdir(parents=True)
        self.server = WarmServer(root, [HERE], PRELUDE.format(temporary=str(self.temporary)))
        self.shards = self._make_shards()
        self.overrides = (*RUN, f"data.train={self.shards}/train", f"data.val={self.shards}/val")
        (self.root / "first").mkdir()
        assert self.train(self.root / "first", ["max_steps=1"]).code == 0  # so that what the server keeps is known
        self.undisturbed = self.run("undisturbed")
        self.num_samples = sum(shard["nsamples"] for shard in self._index()["shardlist"])
        self.steps_per_epoch = -(-self.num_samples // GLOBAL_BATCH)

    def _make_shards(self) -> Path:
        out = self.root / "shards"
        made = self.server.run(
            ["shards", "make", "synthetic", str(out), "--samples", "299", "--classes", "4", "--size", "8",
             "--samples-per-shard", "64", "--val-fraction", "0.2", "--workers", "1"], self.root,
        )  # fmt: skip
        assert made.code == 0, made.err
        return out

    def _index(self) -> dict[str, Any]:
        return json.loads((self.shards / "train" / "shards.json").read_text())

    def run(self, name: str, strikes: Sequence[Strike] = (), bug: str | None = None, more: Sequence[str] = ()) -> Story:
        """Type the command until it ends well, at most twice as often as faults were ordered."""
        folder = self.root / name
        folder.mkdir()
        (folder / "strikes.json").write_text(json.dumps([strike.order() for strike in strikes]))
        if bug:
            (folder / "bug.txt").write_text(bug)
        before, began = self.belongings(), time.time()
        answers = [self.train(folder, more)]
        while answers[-1].code in (130, 143) and len(answers) <= 2 * len(strikes):
            answers.append(self.train(folder, more))
        seconds = time.time() - began
        return Story(folder, tuple(answers), seconds, self.left_behind(before, folder))

    def train(self, folder: Path, more: Sequence[str] = ()) -> Answer:
        return self.server.run(["train", *self.overrides, "--json", *more], folder)

    def belongings(self) -> dict[str, set[str]]:
        """What a run may leave outside of its folder: processes, ports, shared memory, temporary files."""
        members = group_members(self.server.pid)
        return {
            "process": {f"{pid} {line}" for pid, line in members.items() if "forkserver" not in line},
            "port": {port for pid in members for port in listening(pid)},
            "shared memory": set(os.listdir(f"/proc/{self.server.pid}/root/dev/shm")),
            "temporary file": {str(path) for path in self.temporary.rglob("*")},
        }

    def left_behind(self, before: dict[str, set[str]], folder: Path) -> tuple[str, ...]:
        def extra() -> list[str]:
            now = self.belongings()
            found = [f"{kind} {name}" for kind in now for name in sorted(now[kind] - before[kind])]
            halves = [path for path in folder.glob("runs/**/*") if path.name.endswith(".tmp")]
            return [item for item in found if self.is_own(item)] + [str(path) for path in halves]

        until = time.monotonic() + GONE_S
        while (left := extra()) and time.monotonic() < until:
            time.sleep(0.1)
        return tuple(left)

    def is_own(self, item: str) -> bool:
        """Everything but a segment in a /dev/shm that is shared with others, where one of them may have left it."""
        if not item.startswith("shared memory"):
            return True
        mine = Path(f"/proc/{self.server.pid}/root/dev/shm")
        return mine.stat().st_dev != Path("/dev/shm").stat().st_dev or not of_somebody_else(mine / item.split()[-1])

    def close(self) -> None:
        self.server.close()


@dataclass(frozen=True)
class Strike:
    """One fault: what, on which rank, in which phase, at which step (in a loader: its n-th batch), in which attempt."""

    fault: str
    rank: int
    phase: str
    step: int
    attempt: int | None = None

    def order(self) -> dict[str, Any]:
        order = {"fault": self.fault, "rank": self.rank, "phase": self.phase, "step": self.step}
        return order if self.attempt is None else {**order, "attempt": self.attempt}


@dataclass(frozen=True)
class Story:
    """What became of a run: the answers to its command, and what it left behind."""

    folder: Path
    answers: tuple[Answer, ...]
    seconds: float
    leftovers: tuple[str, ...]
    _result: dict[str, Any] = field(default_factory=dict)

    @property
    def codes(self) -> tuple[int, ...]:
        return tuple(answer.code for answer in self.answers)

    @property
    def result(self) -> dict[str, Any]:
        if not self._result:
            assert self.answers[-1].code == 0, self.told()
            self._result.update(self.answers[-1].json())
        return self._result

    @property
    def run_folder(self) -> Path:
        (folder,) = (self.folder / "runs").iterdir()
        return folder

    def told(self) -> str:
        return "\n".join(answer.err[-4000:] for answer in self.answers)

    def struck(self) -> list[dict[str, Any]]:
        """The proofs that the faults fired."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("struck_*.json"))]

    def history(self) -> dict[str, dict[str, Any]]:
        """What was logged and evaluated at each step; a later attempt's word replaces an earlier one's."""
        return {
            f"{event['kind']} {event['step']}": {key: event[key] for key in HISTORY if key in event}
            for event in read_events(self.run_folder)
            if event["kind"] in ("step", "eval")
        }

    def committed(self) -> dict[int, list[int]]:
        """Sample numbers of every step, sorted; what an attempt computed beyond the next one's start is void."""
        steps: dict[int, list[int]] = {}
        for entries in self._recorded().values():
            computed = [entry for entry in entries if "step" in entry]
            start = max((entry["goes_on_from"] for entry in entries if "goes_on_from" in entry), default=0)
            if computed:
                steps = {step: ids for step, ids in steps.items() if step <= start}
            for entry in computed:
                steps.setdefault(entry["step"], []).extend(entry["ids"])
        return {step: sorted(ids) for step, ids in sorted(steps.items())}

    def _recorded(self) -> dict[int, list[dict[str, Any]]]:
        """What all ranks wrote of an attempt, by attempt."""
        attempts: dict[int, list[dict[str, Any]]] = {}
        for path in sorted(self.folder.glob("samples/rank_*.jsonl")):
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                attempts.setdefault(entry["attempt"], []).append(entry)
        return dict(sorted(attempts.items()))

    def times(self) -> dict[str, float]:
        """Seconds from the last strike until the launcher knew of it, and until a step was committed again."""
        struck = max((proof["t"] for proof in self.struck()), default=0.0)
        told = [event["t"] for event in self.faults() if event["t"] >= struck]
        steps = [
            event["t"] for rank in (0, 1) for event in read_events(self.run_folder, rank) if event["kind"] == "step"
        ]
        found = {"found_s": told, "again_s": [t for t in steps if told and t > max(told)]}
        return {name: round(min(t for t in after if t >= struck) - struck, 2) for name, after in found.items() if after}

    def faults(self) -> list[dict[str, Any]]:
        """What the launcher says of each fault."""
        return [event for event in self._launcher() if event["kind"] == "fault"]

    def _launcher(self) -> list[dict[str, Any]]:
        path = self.run_folder / "events" / "launcher.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def attempts(self) -> int:
        return len(list(self.run_folder.glob("logs/attempt_*")))

    def differences(self, other: Story) -> list[str]:
        """Where the end of this run is not the other's: bits, metrics, history, samples."""
        keys = [key for key in EQUAL if self.result[key] != other.result[key]]
        mine, theirs = self.history(), other.history()
        keys += [f"history {key}" for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        mine, theirs = self.committed(), other.committed()
        return keys + [
            f"samples {key}" for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)
        ]


def require_each_sample_once(story: Story, steps_per_epoch: int, num_samples: int) -> None:
    """Over each epoch, the committed steps hold every sample once."""
    committed = story.committed()
    for first in range(0, len(committed), steps_per_epoch):
        ids = sorted(number for step in range(first + 1, first + 1 + steps_per_epoch) for number in committed[step])
        assert ids == list(range(num_samples)), f"epoch that starts after step {first}"


def listening(pid: int) -> list[str]:
    """Local TCP ports that a process listens on."""
    try:
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
        rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return []
    return [str(int(row[1].split(":")[1], 16)) for row in rows if row[3] == "0A" and row[9] in sockets]


def of_somebody_else(segment: Path) -> bool:
    """Whether a living process holds a segment of shared memory, none of which here are ours by now."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"/dev/shm/{segment.name}" in (folder / "maps").read_text():
                return True
            if any(os.readlink(path) == f"/dev/shm/{segment.name}" for path in (folder / "fd").iterdir()):
                return True
        except OSError:
            continue
    return not segment.exists()


def start_cold(bench: Bench, folder: Path, more: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The command as a process of its own, in a group of its own, with the injector in its ranks."""
    program = PRELUDE.format(temporary=str(bench.temporary)) + "import sys\nfrom orchestrator.cli.main import main\n"
    return subprocess.Popen(
        [sys.executable, "-c", program + "sys.exit(main(sys.argv[1:]))", "train", *bench.overrides, "--json", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment([HERE]),
        start_new_session=True,
    )  # fmt: skip


def until(condition: Callable[[], Any], what: str) -> Any:
    return wait_for(condition, what, 60)
