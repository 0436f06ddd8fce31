"""The same training as the quick start, written as one would with Lightning and webdataset alone.

Prints the time.time() of the end of the first optimizer step.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
import webdataset as wds
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import to_dtype, to_image


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = resnet18(num_classes=10)
        self.net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = torch.nn.Identity()

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def on_train_batch_end(self, *_):
        if self.global_rank == 0:
            print(f"first step {time.time()}", flush=True)


def pixels(image):
    return to_dtype(to_image(image), torch.float32, scale=True)


def own_part(urls):
    """Lightning's launcher sets no RANK, so that webdataset's own splitter would think itself alone."""
    return list(urls)


def main(shards: Path) -> None:
    torch.set_num_threads(1)
    dataset = (
        wds.WebDataset(sorted(map(str, shards.glob("*.tar"))), nodesplitter=own_part, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("png", "cls")
        .map_tuple(pixels, int)
        .batched(32)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=1)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), loader)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
