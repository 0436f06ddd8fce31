"""An evaluation as a job of its own: one rank's share, summed over all of them."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from orchestrator.bundle import Bundle
from orchestrator.data.index import load_index
from orchestrator.data.order import EvalPlan
from orchestrator.data.stream import Split, eval_loader
from orchestrator.errors import DataError
from orchestrator.files import read_json, write_json
from orchestrator.model.module import Normalise
from orchestrator.secrets import use_for_stores
from orchestrator.train.evaluate import evaluate
from orchestrator.train.heartbeat import Heartbeat
from orchestrator.train.loading import Loaded, Source, load
from orchestrator.train.outcome import write_evaluation
from orchestrator.train.process import choose_device, join_group, prepare_arithmetic
from orchestrator.world import World

SOURCE_FILE = "source.json"


def write_source(source: Source, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "folder": str(source.folder) if source.folder else None,
        "classes": source.classes,
        "identity": source.identity,
    }
    write_json(folder / SOURCE_FILE, {"schema": 1, **facts})


def read_source(bundle: Bundle) -> Source:
    facts = read_json(bundle.folder / SOURCE_FILE)
    folder = Path(facts["folder"]) if facts["folder"] else None
    return Source(folder, bundle.config, tuple(facts["classes"]) if facts["classes"] else None, facts["identity"])


def run_evaluation(bundle: Bundle, world: World, began: float, heartbeat: Heartbeat) -> None:
    """Evaluate on ``data.val``; the first rank writes `result.json` and `evaluation.json`."""
    config, source = bundle.config, read_source(bundle)
    device = choose_device(config.compute, world)
    prepare_arithmetic(config.compute, device)
    join_group(world, device)
    use_for_stores(config.cluster.store_secret)
    index = load_index(config.data.val)
    loaded = load(source, index.classes)
    require_same_classes(loaded, index.classes, config.data.val)
    loaded.net.to(device)
    normalise = Normalise(config.data.mean, config.data.std, config.compute.channels_last).to(device)
    num_classes = len(loaded.classes)
    split = Split(index, config.data, config.seed, num_classes, world.rank, world.world_size)
    plan = EvalPlan(index.num_samples, config.eval_batch_size, world.world_size)
    heartbeat.enter("validation", 0)
    result = evaluate(loaded.net, normalise, heartbeat.following(eval_loader(plan, split, device)), num_classes)
    heartbeat.enter("end", 0)
    if world.is_first:
        write_evaluation(bundle.folder, result, None, index, loaded.classes, config.data.max_pixels)
        _write_result(bundle, source, world, result.metrics(), time.time() - began)
    if dist.is_initialized():
        dist.destroy_process_group()


def require_same_classes(loaded: Loaded, classes: tuple[str, ...], location: str) -> None:
    """Refuse shards whose labels mean something else than the network's outputs."""
    known = loaded.classes[: len(classes)]
    if known != classes:
        pairs = zip(known, classes, strict=False)
        number = next((n for n, (a, b) in enumerate(pairs) if a != b), len(known))
        raise DataError(
            f"data.val = {location}: its {len(classes)} classes are not the {len(loaded.classes)} of the checkpoint, "
            f"from class {number} on. Way out: shards packed with the same class folders"
        )


def _write_result(bundle: Bundle, source: Source, world: World, metrics: dict[str, object], seconds: float) -> None:
    write_json(
        bundle.folder / "result.json",
        {
            "schema": 1,
            "run_id": bundle.run_id,
            "state": "done",
            "exit_code": 0,
            "checkpoint": str(source.folder or source.config.model.weights),
            "data": bundle.config.data.val,
            "world_size": world.world_size,
            "metrics": metrics,
            "seconds": {"all": round(seconds, 3)},
        },
    )
