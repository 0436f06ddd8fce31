"""Exact evaluation: every sample counted once, the same fraction for any number of processes, workers and batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from orchestrator.data.stream import Batch
from orchestrator.model.module import count_hits

SHOWN_SAMPLES = 12


class EvaluationStopped(Exception):
    """All ranks agreed to stop between two batches of an evaluation."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a network makes of one sample."""

    id: int
    label: int
    predicted: int
    probability: float
    """Of the predicted class."""
    loss: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Sums over every sample of a set."""

    hits1: int
    hits5: int
    count: int
    skipped: int
    loss: float
    confusion: torch.Tensor  # (C, C) int64, rows are the true classes
    worst: list[Outcome]
    best: list[Outcome]

    def metrics(self) -> dict[str, Any]:
        return {
            "val/loss": self.loss,
            "val/acc1": fraction(self.hits1, self.count),
            "val/acc5": fraction(self.hits5, self.count),
        }


def fraction(hits: int, count: int) -> dict[str, Any]:
    """An accuracy as it is recorded: exact, and as a number to plot."""
    return {"hits": hits, "count": count, "value": hits / count if count else 0.0}


@torch.no_grad()
def evaluate(net: nn.Module, normalise: nn.Module, batches: Iterable[Batch], num_classes: int) -> Evaluation:
    """Run the network over this rank's batches and sum over all ranks; every rank gets the whole result."""
    device = next(net.parameters()).device
    was_training = net.training
    share_buffers(net)
    net.eval()
    rows, skipped = [torch.zeros((6, 0), dtype=torch.float64)], 0
    for batch in batches:
        rows.append(_judge(net, normalise, batch, device))
        skipped += batch.skipped
    net.train(was_training)
    return _sum_up(torch.cat(rows, dim=1), skipped, num_classes, device)


def share_buffers(net: nn.Module) -> None:
    """Give every rank the first one's BatchNorm statistics, as DDP does before a training step."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def _judge(net: nn.Module, normalise: nn.Module, batch: Batch, device: torch.device) -> torch.Tensor:
    """(6, B) float64: sample number, label, prediction, its probability, loss, label among the first five."""
    labels = batch.labels.to(device)
    logits = net(normalise(batch.images.to(device, non_blocking=True))).float()
    _, among = count_hits(logits, labels)
    predicted = logits.argmax(dim=1)
    probability = logits.softmax(dim=1).gather(1, predicted[:, None])[:, 0]
    losses = F.cross_entropy(logits, labels, reduction="none")
    keep = batch.ids >= 0
    columns = (batch.ids.to(device), labels, predicted, probability, losses, among)
    return torch.stack([column.to(torch.float64) for column in columns]).cpu()[:, keep]


def _sum_up(rows: torch.Tensor, skipped: int, num_classes: int, device: torch.device) -> Evaluation:
    ids, labels, predicted, _, losses, among = rows
    pairs = (labels * num_classes + predicted).to(torch.int64)
    confusion = torch.bincount(pairs, minlength=num_classes**2)
    first = (labels == predicted) & (among > 0)
    counts = torch.tensor([int(first.sum()), int(among.sum()), len(ids), skipped])
    counts = _reduce(torch.cat([counts, confusion]), device)
    loss = _reduce(losses.sum(), device)
    hits1, hits5, count, skipped = (int(value) for value in counts[:4])
    worst, best = (losses.argsort(stable=True, descending=descending)[:SHOWN_SAMPLES] for descending in (True, False))
    return Evaluation(
        hits1=hits1,
        hits5=hits5,
        count=count,
        skipped=skipped,
        loss=float(loss) / max(count, 1),
        confusion=counts[4:].view(num_classes, num_classes),
        worst=_extremes(rows[:, worst], device, descending=True),
        best=_extremes(rows[:, best], device, descending=False),
    )


def _reduce(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if not dist.is_initialized():
        return tensor
    moved = tensor.to(device)
    dist.all_reduce(moved)
    return moved.cpu()


def _extremes(rows: torch.Tensor, device: torch.device, descending: bool) -> list[Outcome]:
    """The samples with the greatest or least loss over all ranks, ties by sample number."""
    padded = torch.full((len(rows), SHOWN_SAMPLES), float("nan"), dtype=torch.float64)
    padded[:, : rows.shape[1]] = rows
    gathered = [padded]
    if dist.is_initialized():
        gathered = [torch.empty_like(padded, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, padded.to(device))
    columns = torch.cat(gathered, dim=1).cpu().T
    found = [Outcome(int(r[0]), int(r[1]), int(r[2]), float(r[3]), float(r[4])) for r in columns if not r[0].isnan()]
    sign = -1 if descending else 1
    return sorted(found, key=lambda outcome: (sign * outcome.loss, outcome.id))[:SHOWN_SAMPLES]
