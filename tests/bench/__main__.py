"""``python -m tests.bench [NAME ...]``: run the measurements, print a table, write ``bench/out/results.json``."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAIRS = 5
SEEDS = (0, 1, 2)


def run(*command: object) -> str:
    """Run a command in the checkout; returns its stdout, raises with its stderr."""
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def timed(*command: object) -> float:
    began = time.perf_counter()
    run(*command)
    return time.perf_counter() - began


def paired(ours: Callable[[], float], theirs: Callable[[], float]) -> dict[str, float]:
    """Medians of alternating runs and the median of the ratios of neighbours (ours / theirs)."""
    pairs = [(ours(), theirs()) for _ in range(PAIRS)]
    return {
        "ours": round(statistics.median(a for a, _ in pairs), 3),
        "theirs": round(statistics.median(b for _, b in pairs), 3),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
        "pairs": PAIRS,
    }


def bench_help() -> dict[str, float]:
    """Seconds of `orchestrator --help` in a fresh process."""
    seconds = [timed(BIN / "orchestrator", "--help") for _ in range(10)]
    return {"median_s": round(statistics.median(seconds), 3), "max_s": round(max(seconds), 3)}


def bench_start() -> dict[str, float]:
    """Seconds from the command to the end of the first step, against a bare Lightning script of the same training."""
    shards = digits()

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            run(BIN / "orchestrator", "train", "experiment=quickstart", "max_steps=1", f"runs_dir={folder}")
            events = next(Path(folder).glob("*/events/rank_0.jsonl")).read_text().splitlines()
            return next(e["t"] for e in map(json.loads, events) if e["kind"] == "step") - began

    def theirs() -> float:
        began = time.time()
        out = run(sys.executable, "tests/bench/bare_lightning.py", shards / "train")
        return float(re.findall(r"first step (\S+)", out)[0]) - began

    return paired(ours, theirs)


def bench_step() -> dict[str, float]:
    """Images/s of our `fit` against a plain PyTorch DDP loop with the same model and batches, in alternating blocks."""
    digits()
    options = ("experiment=quickstart", "recipe.epochs=20", "tracking=disabled", "checkpointing.every_epochs=0")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pairs.json"
        record = record_of(options, folder)
        run(BIN / "torchrun", "--nproc-per-node", 2, "-m", "tests.bench.step_pairs", record, out)
        pairs = json.loads(out.read_text())
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    return {
        "ours_step_s": round(statistics.median(ours for ours, _ in pairs) / 10, 4),
        "theirs_step_s": round(statistics.median(theirs for _, theirs in pairs) / 10, 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-len(ratios) // 4], 3)],
        "pairs": len(pairs),
    }


def bench_virtual() -> dict[str, dict[str, object]]:
    """A step of DDP with the tree of virtual ranks, one per process, against plain DDP; bytes against a ring."""
    sizes = (("cifar_resnet20", 2), ("resnet18", 2), ("resnet18", 4))
    return {f"{model}, {processes} processes": exchange_pairs(model, processes) for model, processes in sizes}


def exchange_pairs(model: str, processes: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pairs.json"
        run(
            BIN / "torchrun",
            "--standalone",
            "--nproc-per-node",
            processes,
            "-m",
            "tests.bench.virtual_pairs",
            model,
            out,
        )
        found = json.loads(out.read_text())
    rounds = found["rounds"]
    ratios = sorted(one["tree"] / one["plain"] for one in rounds)
    steps = {kind: statistics.median(one[kind] for one in rounds) for kind in ("plain", "tree", "alone")}
    # Two processes leave the exchange to an all-reduce of the same bytes.
    ring = found["bytes"] * (1 if processes == 2 else 2 * (processes - 1) / processes)
    seen = statistics.median(one["tree"] - one["alone"] for one in rounds)
    return {
        **{f"{kind}_step_s": round(seconds, 4) for kind, seconds in steps.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-len(ratios) // 4], 3)],
        "bytes_against_a_ring": round(found["sent"] / ring, 3),
        "exchange_s": round(found["busy_s"], 4),
        "exchange_that_a_step_sees_s": round(seen, 4),
    }


def record_of(options: tuple[str, ...], folder: str) -> Path:
    """Freeze a run without starting it."""
    from orchestrator.bundle import freeze, write_bundle
    from orchestrator.compose import compose

    bundle = freeze(compose([*options, f"runs_dir={folder}"]))
    path = bundle.folder / "run.json"
    write_bundle(bundle, path, {})
    return path


def bench_quickstart() -> dict[str, object]:
    """Seconds by phase and top-1 over three seeds, beside two classical baselines on the same split."""
    pack = timed(BIN / "orchestrator", "shards", "make", "digits", Path(tempfile.mkdtemp()) / "digits")
    digits()
    results, walls = [], []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            options = ("experiment=quickstart", f"seed={seed}", f"runs_dir={folder}")
            out = run(BIN / "orchestrator", "train", *options, "--json")
            walls.append(time.perf_counter() - began)
            results.append(json.loads(out))
    accuracies = [100 * result["metrics"]["val/acc1"]["value"] for result in results]
    return {
        "pack_s": round(pack, 1),
        "train_s": [round(wall, 1) for wall in walls],
        "phases_s": results[0]["seconds"],
        "top1_percent": [round(value, 2) for value in accuracies],
        "top1_mean": round(statistics.mean(accuracies), 2),
        "top1_std": round(statistics.stdev(accuracies), 2),
        **baselines(),
    }


def baselines() -> dict[str, float]:
    """Top-1 in per cent of logistic regression and an RBF-SVM on the pixels of the same split."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    from orchestrator.data.images import decode_image
    from orchestrator.data.index import load_index
    from orchestrator.data.reader import ShardReader

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        index = load_index(str(digits() / name))
        samples = [ShardReader(index).read(i) for i in range(index.num_samples)]
        pixels = [decode_image(sample.image, 10**6)[0][..., 0].ravel() for sample in samples]
        return np.stack(pixels) / 255.0, np.array([sample.label for sample in samples])

    train, val = split("train"), split("val")
    models = {"logistic_regression_percent": LogisticRegression(max_iter=2000), "rbf_svm_percent": SVC(C=10)}
    return {
        name: round(100 * make_pipeline(StandardScaler(), model).fit(*train).score(*val), 2)
        for name, model in models.items()
    }


def digits() -> Path:
    folder = ROOT / "data" / "digits"
    run(BIN / "orchestrator", "shards", "make", "digits", folder)
    return folder


def bench_loaders() -> dict[str, object]:
    """Images/s per core of this loader, of every peer and of the practical limit: `bench/out/loaders.json`."""
    from tests.bench.loaders.bench import bench

    return bench()


def bench_goodput() -> dict[str, object]:
    """Goodput under a kill each 30, 60 and 120 s for three save intervals: simulated over measured costs."""
    from tests.bench.goodput import bench

    digits()
    return bench()


def bench_checkpoint() -> dict[str, object]:
    """Seconds that a save blocks a step: beside training against at once, 1 MB and 200 MB, a fast and a slow target."""
    from tests.bench.checkpoint import bench

    return bench()


def bench_recovery() -> dict[str, object]:
    """Seconds from a kill to the next attempt's first step, by part, against torchrun; and what a step pays for it."""
    from tests.bench import recovery

    digits()
    with tempfile.TemporaryDirectory() as folder:
        border = run(BIN / "torchrun", "--standalone", "--nproc-per-node", 2, "-m", "tests.bench.border", folder)
    return {**recovery.bench(), "border": json.loads(border)}


BENCHES = {
    "help": bench_help,
    "start": bench_start,
    "step": bench_step,
    "virtual": bench_virtual,
    "quickstart": bench_quickstart,
    "loaders": bench_loaders,
    "checkpoint": bench_checkpoint,
    "goodput": bench_goodput,
    "recovery": bench_recovery,
}


def main(names: list[str]) -> None:
    out = ROOT / "bench" / "out" / "results.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in names or list(BENCHES):
        print(f"{name}: {BENCHES[name].__doc__}", flush=True)
        results[name] = BENCHES[name]()
        print(f"  {json.dumps(results[name])}", flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
