"""Every sample counts once: whatever the batch size, the padding and the number of processes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import Cli, Run
from torch import nn
from torch.multiprocessing.spawn import start_processes

from orchestrator.data.order import EvalPlan
from orchestrator.data.stream import PAD, Batch
from orchestrator.train.evaluate import SHOWN_SAMPLES, Evaluation, evaluate
from orchestrator.train.outcome import confused_pairs, evaluation_record

CLASSES, COUNT = 9, 101


def labels_and_logits(flat: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A set in which the logits are the images; `flat`: many logits and losses are equal."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    pixels = torch.randint(0, 3 if flat else 256, (COUNT, CLASSES), generator=generator)
    return labels, pixels


class Readout(nn.Module):
    """Its logits are the first pixels of the first channel, each times `scale`; a rank's own `shift` spoils them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 16))
        self.shift: torch.Tensor
        self.register_buffer("shift", (dist.get_rank() if dist.is_initialized() else 0) * torch.arange(float(CLASSES)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return images[:, 0].flatten(1)[:, :CLASSES] * self.scale + self.shift


class AsFloat(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


def make_batches(plan: EvalPlan, rank: int, flat: bool) -> Iterator[Batch]:
    labels, pixels = labels_and_logits(flat)
    for step in range(plan.steps):
        ids, rows = plan.batch(step, rank), plan.per_rank_batch_size
        images = torch.full((rows, 3, 3, 3), 255, dtype=torch.uint8)
        images[: len(ids), 0] = pixels[ids].view(-1, 3, 3).to(torch.uint8)
        shown = torch.zeros(rows, dtype=torch.int64)
        shown[: len(ids)] = labels[ids]
        numbers = np.concatenate([ids, np.full(rows - len(ids), PAD)])
        yield Batch(images, shown, torch.from_numpy(numbers), len(ids), skipped=int(step == 0))


def run(batch_size: int, rank: int = 0, world_size: int = 1, flat: bool = False) -> Evaluation:
    plan = EvalPlan(COUNT, batch_size, world_size)
    return evaluate(Readout(), AsFloat(), make_batches(plan, rank, flat), CLASSES)


def rows_of(evaluation: Evaluation) -> list[tuple[int, int, int, float, float]]:
    return [(o.id, o.label, o.predicted, o.probability, o.loss) for o in (*evaluation.worst, *evaluation.best)]


def naive(flat: bool) -> dict[str, object]:
    """Sample by sample, in plain Python."""
    labels, pixels = labels_and_logits(flat)
    losses, hits1, hits5, confusion = [], 0, 0, [[0] * CLASSES for _ in range(CLASSES)]
    for label, row in zip(labels.tolist(), (pixels / 16).tolist(), strict=True):
        ranked = sorted(range(CLASSES), key=lambda c: (-row[c], c))
        hits1 += ranked[0] == label
        hits5 += label in ranked[:5]
        confusion[label][ranked[0]] += 1
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[label])
    return {"hits1": hits1, "hits5": hits5, "losses": losses, "confusion": confusion}


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50, 100, 101, 102, 1000])
@pytest.mark.parametrize("flat", [False, True], ids=["distinct", "many-equal-logits"])
def test_counts_are_those_of_a_naive_loop_for_any_batch_size(batch_size: int, flat: bool) -> None:
    found, expected = run(batch_size, flat=flat), naive(flat)
    assert (found.count, found.hits1, found.hits5) == (COUNT, expected["hits1"], expected["hits5"])
    assert found.confusion.tolist() == expected["confusion"]
    assert found.loss == pytest.approx(sum(expected["losses"]) / COUNT, rel=1e-6)  # pyright: ignore
    assert found.metrics()["val/acc1"] == {
        "hits": expected["hits1"], "count": COUNT, "value": expected["hits1"] / COUNT  # pyright: ignore
    }  # fmt: skip
    assert found.skipped == 1


def test_rows_of_the_confusion_matrix_sum_to_the_class_counts_and_its_diagonal_to_the_hits() -> None:
    found, labels = run(7), labels_and_logits(False)[0]
    assert found.confusion.sum(dim=1).tolist() == torch.bincount(labels, minlength=CLASSES).tolist()
    assert int(found.confusion.diag().sum()) == found.hits1


def test_worst_and_best_are_the_extremes_of_the_loss_in_order() -> None:
    found, losses = run(7), naive(False)["losses"]
    order = sorted(range(COUNT), key=lambda id: (losses[id], id))  # pyright: ignore
    assert [outcome.id for outcome in found.best] == order[:SHOWN_SAMPLES]
    assert [outcome.id for outcome in found.worst] == order[::-1][:SHOWN_SAMPLES]
    assert [o.loss for o in found.worst] == sorted((o.loss for o in found.worst), reverse=True)
    labels = labels_and_logits(False)[0]
    assert all(outcome.label == labels[outcome.id] for outcome in (*found.worst, *found.best))


def test_evaluating_leaves_the_networks_mode_and_tracks_no_gradient() -> None:
    net = Readout().train()
    evaluate(net, AsFloat(), make_batches(EvalPlan(COUNT, 50, 1), 0, False), CLASSES)
    assert net.training
    assert net.scale.grad is None


def _one_of(rank: int, world_size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    found = {flat: run(8, rank, world_size, flat) for flat in (False, True)}
    torch.save({flat: (e.hits1, e.hits5, e.count, e.loss, e.confusion, rows_of(e)) for flat, e in found.items()},
               f"{folder}/rank_{rank}")  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_real_processes_give_what_one_gives_and_each_has_the_whole_result(world_size: int, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_one_of, (world_size, folder), nprocs=world_size, start_method="fork")
        answers = [torch.load(f"{folder}/rank_{rank}", weights_only=False) for rank in range(world_size)]
    for flat in (False, True):
        alone = run(8, flat=flat)
        for answer in answers:
            hits1, hits5, count, loss, confusion, rows = answer[flat]
            assert (hits1, hits5, count) == (alone.hits1, alone.hits5, alone.count)
            assert loss == pytest.approx(alone.loss, rel=1e-12)
            assert torch.equal(confusion, alone.confusion)
            assert rows == rows_of(alone)


def test_the_command_counts_the_same_fraction_with_one_two_and_three_processes(session_cli: Cli, trained: Run) -> None:
    results = {}
    for processes in (1, 2, 3):
        answer = session_cli(
            "evaluate", f"checkpoint={trained.folder.name}:last", f"compute.num_processes={processes}",
            "eval_batch_size=5", "--json",
        )  # fmt: skip
        assert answer.code == 0, answer.err
        results[processes] = answer.json()
        assert answer.json()["world_size"] == processes
    metrics = [results[processes]["metrics"] for processes in (1, 2, 3)]
    expected = trained.result["metrics"]
    for found in metrics:
        assert found["val/acc1"] == expected["val/acc1"]
        assert found["val/acc5"] == expected["val/acc5"]
        assert found["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-6)
    assert metrics[0]["val/acc1"]["count"] == 36


def test_the_record_names_classes_mistakes_and_counts() -> None:
    found, names = run(50), [f"class {number}" for number in range(CLASSES)]
    record = evaluation_record(found, 3, "val", names)
    assert [row["count"] for row in record["per_class"]] == found.confusion.sum(dim=1).tolist()
    assert sum(row["hits"] for row in record["per_class"]) == found.hits1 == record["hits1"]
    pairs = confused_pairs(found, names, limit=1000)
    assert sum(pair["count"] for pair in pairs) == COUNT - found.hits1
    assert [pair["count"] for pair in pairs] == sorted((pair["count"] for pair in pairs), reverse=True)
    first = pairs[0]
    assert found.confusion[names.index(first["true"]), names.index(first["predicted"])] == first["count"]
