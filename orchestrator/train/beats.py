"""Signs of life within a step: enough of them to tell the rank that hangs from those that wait for it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from orchestrator.train.heartbeat import Heartbeat


class Beats(pl.Callback):
    """Beats where a batch has come and where the loss is known: there no rank waits for another."""

    def __init__(self, heartbeat: Heartbeat):
        self._heartbeat = heartbeat

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._heartbeat.beat(self._heartbeat.step)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        self._heartbeat.beat(self._heartbeat.step)
