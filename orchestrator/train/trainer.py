"""Lightning's trainer for one rank of a run: DDP, precision, accumulation and clipping, and nothing that a run owns."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.plugins.environments import ClusterEnvironment  # pyright: ignore[reportPrivateImportUsage]
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from orchestrator.model.module import Classifier
from orchestrator.options import Precision
from orchestrator.train.process import Rank
from orchestrator.train.slices import Slices
from orchestrator.world import World

PRECISIONS = {Precision.fp32: "32-true", Precision.bf16: "bf16-mixed", Precision.fp16: "16-mixed"}


class GivenWorld(ClusterEnvironment):
    """Tells Lightning which process this is, so that it looks at no environment variable of any scheduler."""

    def __init__(self, world: World):
        super().__init__()
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return self._world.master_addr

    @property
    def main_port(self) -> int:
        return self._world.master_port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._world.world_size

    def global_rank(self) -> int:
        return self._world.rank

    def local_rank(self) -> int:
        return self._world.local_rank

    def node_rank(self) -> int:
        return self._world.rank // self._world.local_world_size

    def set_world_size(self, size: int) -> None: ...

    def set_global_rank(self, rank: int) -> None: ...


def build_trainer(module: Classifier, rank: Rank, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning for one long epoch; saving, logging, validation and progress happen at the step's border."""
    config = module.config
    if module.span.virtual_ranks:
        callbacks = [*callbacks, Slices(module)]
    return pl.Trainer(
        accelerator="gpu" if rank.device.type == "cuda" else "cpu",
        strategy=_strategy(rank),
        devices=rank.world.local_world_size,
        num_nodes=rank.world.world_size // rank.world.local_world_size,
        precision=PRECISIONS[config.compute.precision],  # pyright: ignore[reportArgumentType]
        max_epochs=1,
        accumulate_grad_batches=module.units,
        gradient_clip_val=config.recipe.clip_norm or None,
        callbacks=callbacks,
        use_distributed_sampler=False,
        barebones=True,
    )


def _strategy(rank: Rank) -> Strategy:
    if rank.world.world_size == 1:
        return SingleDeviceStrategy(rank.device)
    return DDPStrategy(cluster_environment=GivenWorld(rank.world), gradient_as_bucket_view=True)
