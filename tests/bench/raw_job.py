"""The quick start's training as one would write it by hand: plain DDP and webdataset, for torchrun or Ray Train.

Alone on purpose: it is also put into a ConfigMap. Prints the time.time() of the end of the first optimizer step.
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import webdataset as wds
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import to_dtype, to_image


def pixels(image):
    return to_dtype(to_image(image), torch.float32, scale=True)


def whole(urls):
    """The digits are fewer shards than ranks."""
    return list(urls)


def loader_of(shards: Path):
    urls = sorted(map(str, shards.glob("*.tar")))
    dataset = (
        wds.WebDataset(urls, nodesplitter=whole, shardshuffle=False)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("png", "cls")
        .map_tuple(pixels, int)
        .batched(32)
    )
    return wds.WebLoader(dataset, batch_size=None, num_workers=1)


def one_step(shards: str) -> float:
    torch.set_num_threads(1)
    net = resnet18(num_classes=10)
    net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    net = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images, labels = next(iter(loader_of(Path(shards))))
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()
    if dist.get_rank() == 0:
        print(f"first step {time.time()}", flush=True)
    return time.time()


def by_torchrun(shards: str) -> None:
    dist.init_process_group("gloo")
    one_step(shards)
    dist.destroy_process_group()


def by_ray(shards: str) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        lambda: one_step(shards) and None,
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(storage_path=sys.argv[3]),
    )
    trainer.fit()


if __name__ == "__main__":
    {"torchrun": by_torchrun, "ray": by_ray}[sys.argv[1]](sys.argv[2])
