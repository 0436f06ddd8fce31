"""What a careful user of Lightning and webdataset writes: seeds, checkpoints every few steps, `last` taken up again.

torchrun --nproc-per-node 2 --max-restarts 3 train.py SHARDS FOLDER   (the fault, if any, comes by FOLDER/strike.json)
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import webdataset as wds
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2.functional import to_dtype, to_image

STEPS_PER_EPOCH, EPOCHS, PER_RANK = 30, 2, 4
Batch = tuple[list[str], torch.Tensor, torch.Tensor]


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        stem = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16))
        blocks = [BasicBlock(16, 16) for _ in range(4)]
        head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(0.2))
        self.net = torch.nn.Sequential(stem, *blocks, head, torch.nn.Linear(16, 4))

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[1]), batch[2])

    def validation_step(self, batch: Batch, _: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[1]), batch[2]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS_PER_EPOCH * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Observer(Callback):
    """Writes the samples of each step and the state at the end; strikes when it is told to."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        path = folder / "strike.json"
        self.order = json.loads(path.read_text()) if path.exists() else {}

    def reach(self, phase: str, step: int) -> None:
        here = {"rank": self.rank, "phase": phase, "step": step}
        if any(self.order.get(key) != value for key, value in here.items()):
            return
        try:
            (self.folder / "struck.json").open("x").close()
        except FileExistsError:
            return
        if self.order["fault"] == "torn checkpoint":
            path = self.folder / "checkpoints" / "last.ckpt"
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        from injection import FAULTS

        FAULTS[self.order["fault"]](self)  # pyright: ignore[reportArgumentType]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.reach("step", trainer.global_step)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        with open(self.folder / f"samples_{self.rank}.jsonl", "a") as file:
            file.write(json.dumps({"pid": os.getpid(), "step": trainer.global_step, "keys": batch[0]}) + "\n")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.reach("validation", trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.reach("save", trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.rank == 0:
            digest = hashlib.sha256()
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
            (self.folder / "end.json").write_text(
                json.dumps({"sha256": digest.hexdigest(), "steps": trainer.global_step})
            )


def samples(shards: Path, observer: Observer | None) -> wds.WebDataset:
    def decode(sample: dict[str, Any]) -> tuple[str, torch.Tensor, int]:
        if observer is not None:
            observer.reach("loader", decode.count)
            decode.count += 1
        return sample["__key__"], to_dtype(to_image(sample["png"]), torch.float32, scale=True), int(sample["cls"])

    decode.count = 0
    urls = sorted(map(str, shards.glob("*.tar")))
    data = wds.WebDataset(urls, nodesplitter=wds.split_by_node, shardshuffle=100 if observer else False, seed=0)
    return data.shuffle(1000 if observer else 0, seed=0).decode("pil").map(decode).batched(PER_RANK)


def main(shards: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pl.seed_everything(0, workers=True)
    observer = Observer(folder, int(os.environ["RANK"]))
    observer.reach("start", 0)
    train = wds.WebLoader(samples(shards / "train", observer).repeat(2), batch_size=None, num_workers=1)
    val = wds.WebLoader(samples(shards / "val", None).repeat(2), batch_size=None, num_workers=1)
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=7, save_last=True, save_top_k=3,
                             monitor="step", mode="max")  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=STEPS_PER_EPOCH * EPOCHS, logger=False,
        callbacks=[saving, observer],
        deterministic=True, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    last = folder / "checkpoints" / "last.ckpt"
    loaders = train.with_epoch(STEPS_PER_EPOCH), val.with_epoch(7)
    trainer.fit(Module(), *loaders, ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
