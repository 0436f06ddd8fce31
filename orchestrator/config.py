"""The schema of a run: every key's name, type, unit and rule. Values stand in ``conf/``; nothing here has a default.

One module on purpose, longer than the others: the page that answers what a run can be told; where it runs stands in
`cluster_config.py`. Composition lives in
`compose.py`, plain values in `plain.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from orchestrator.cluster_config import ClusterConfig
from orchestrator.errors import nearest
from orchestrator.options import (
    Augment,
    Crop,
    Decode,
    Device,
    Interpolation,
    Loss,
    OnBad,
    OnDamage,
    OnNan,
    OptimizerKind,
    Precision,
    Schedule,
    Shortcut,
    Stem,
    TrackingMode,
)
from orchestrator.rules import INF, require, require_range

RUN_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,29}[a-z0-9])?")


METRICS = ("val/loss", "val/acc1", "val/acc5")
"""What every evaluation gives."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which shards are read and how an image becomes a tensor."""

    name: str
    """Short name for run ids and charts."""
    train: str
    """Shard set to train on: a folder with shards.json, that file, or a brace pattern of local paths or URLs."""
    val: str
    """Shard set to evaluate on, same forms."""
    num_workers: int
    """Loader processes per rank; 0 decodes in the rank itself."""
    prefetch_batches: int
    """Batches that each loader process keeps ready."""
    image_size: int
    """Side of the square that the network sees, in pixels."""
    crop: Crop
    crop_scale: list[float]
    """random_resized: least and greatest share of the image's area."""
    crop_ratio: list[float]
    """random_resized: least and greatest width / height."""
    padding: int
    """pad: pixels added on each side before a random crop."""
    flip: float
    """Probability of a horizontal flip in training."""
    eval_resize: int
    """Short side before the centre crop in evaluation, in pixels; 0 squeezes the whole image into the square."""
    interpolation: Interpolation
    mean: list[float]
    """Per channel, of pixels in 0..1."""
    std: list[float]
    on_bad: OnBad
    max_pixels: int
    """An image that claims more pixels is refused before it is decoded."""
    shuffle_shards: int
    """Samples are shuffled across blocks of about this many shards (0 = all)."""
    lanes: int
    """Equal parts of an epoch's order that every batch draws from evenly; 0 takes what serves any number of ranks."""
    repeats: int
    """Repeated augmentation: so many differently augmented copies of an image in its epoch (1 = none)."""
    decode: Decode
    augment: Augment
    augment_magnitude: float
    """randaugment: strength, 0 to 30."""
    augment_layers: int
    """randaugment: operations per image."""
    color_jitter: list[float]
    """Greatest change of brightness, contrast, saturation (shares) and hue (turns, at most 0.5); 0 = none."""
    ramp_from: int
    """Progressive resizing: side of the square at the start of the ramp, in pixels; 0 = image_size from the start."""
    ramp_epochs: list[int]
    """First and last epoch of the ramp from `ramp_from` to `image_size`, in multiples of 32 pixels."""
    eval_size: int
    """Side of the square in evaluation, in pixels; 0 = image_size."""
    on_damage: OnDamage
    bad_budget: float
    """Greatest share of the set's samples that on_bad=skip and on_damage=quarantine together may lose in an epoch."""
    cache_gib: float
    """Most that downloaded shards may take on this machine; 0 = three quarters of what is free on that disk."""

    def __post_init__(self) -> None:
        require_range(
            self,
            "data",
            num_workers=(0, 256),
            prefetch_batches=(1, 64),
            image_size=(1, 4096),
            padding=(0, 4096),
            flip=(0, 1),
            eval_resize=(0, 8192),
            max_pixels=(1, INF),
            shuffle_shards=(0, INF),
            lanes=(0, 1 << 20),
            repeats=(1, 64),
            augment_magnitude=(0, 30),
            augment_layers=(1, 16),
            eval_size=(0, 4096),
            bad_budget=(0, 1),
            cache_gib=(0, INF),
        )
        for field in ("crop_scale", "crop_ratio"):
            pair = getattr(self, field)
            require(
                len(pair) == 2 and 0 < pair[0] <= pair[1],
                f"data.{field}",
                pair,
                "must be [low, high] with 0 < low <= high",
                f"e.g. data.{field}=[0.5,1.0]",
            )
        require(
            self.crop_scale[1] <= 1,
            "data.crop_scale",
            self.crop_scale,
            "must end at 1 or below: a crop is a share of the image's area",
            f"data.crop_scale=[{min(1, self.crop_scale[0]):g},1.0]",
        )
        for field in ("mean", "std"):
            require(
                len(getattr(self, field)) == 3,
                f"data.{field}",
                getattr(self, field),
                "must have one number for each of the 3 channels",
                f"e.g. data.{field}=[0.5,0.5,0.5]",
            )
        require(min(self.std) > 0, "data.std", self.std, "must be above 0", "e.g. data.std=[0.5,0.5,0.5]")
        side = self.eval_size or self.image_size
        require(
            self.eval_resize == 0 or self.eval_resize >= side,
            "data.eval_resize",
            self.eval_resize,
            f"must be 0 or at least {'data.eval_size' if self.eval_size else 'data.image_size'} = {side}",
            f"data.eval_resize={side}",
        )
        jitter = self.color_jitter
        require(
            len(jitter) == 4 and all(0 <= change <= 1 for change in jitter) and jitter[3] <= 0.5,
            "data.color_jitter",
            jitter,
            "must be [brightness, contrast, saturation, hue] with shares in 0..1 and hue in 0..0.5",
            "e.g. data.color_jitter=[0.4,0.4,0.4,0.0]",
        )
        self._require_ramp()

    def _require_ramp(self) -> None:
        require(
            self.ramp_from == 0 or 1 <= self.ramp_from <= self.image_size,
            "data.ramp_from",
            self.ramp_from,
            f"must be 0 or between 1 and data.image_size = {self.image_size}",
            f"data.ramp_from={min(128, self.image_size)}",
        )
        first_last = self.ramp_epochs
        require(
            len(first_last) == 2 and 0 <= first_last[0] <= first_last[1],
            "data.ramp_epochs",
            first_last,
            "must be [first, last] with 0 <= first <= last",
            "e.g. data.ramp_epochs=[0,30]",
        )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The network: one of our ResNets, a package's entry point `orchestrator.models`, or any timm model.

    `timm/NAME` takes timm's where ours has the same name.
    """

    name: str
    num_classes: int | None
    """Size of the head; null takes the number of classes that the training shards hold."""
    stem: Stem
    """Ours only."""
    shortcut: Shortcut
    """Ours only."""
    zero_init_last: bool
    """Last BatchNorm of each residual branch starts at zero, so that a block starts as the identity."""
    drop_path: float
    """Stochastic depth of the last block, rising linearly from 0 (timm)."""
    dropout: float
    """Before the head."""
    weights: str | None
    """File to start from (.safetensors, .pt, .pth, .th): tensors by name, or in order where all shapes agree."""

    def __post_init__(self) -> None:
        require(
            self.num_classes is None or self.num_classes >= 2,
            "model.num_classes",
            self.num_classes,
            "must be at least 2",
            "leave it out to take the number of classes from the shards",
        )
        require_range(self, "model", drop_path=(0, 0.99), dropout=(0, 0.99))


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """What turns gradients into weights."""

    kind: OptimizerKind
    lr: float
    """Peak learning rate, for `base_batch_size` images per step."""
    base_batch_size: int | None
    """The global batch that `lr` is meant for; it is scaled linearly to recipe.global_batch_size. null: no scaling."""
    momentum: float
    nesterov: bool
    betas: list[float]
    eps: float
    weight_decay: float
    decay_norm_and_bias: bool
    """false: no weight decay on vectors (norm weights and biases)."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "must be above 0", "e.g. optimizer.lr=0.1")
        require_range(self, "optimizer", momentum=(0, 0.9999), eps=(0, 1), weight_decay=(0, 1))
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optimizer.betas",
            self.betas,
            "must be two numbers in [0, 1)",
            "optimizer.betas=[0.9,0.999]",
        )
        require(
            self.base_batch_size is None or self.base_batch_size >= 1,
            "optimizer.base_batch_size",
            self.base_batch_size,
            "must be at least 1",
            "leave it out to use optimizer.lr as it is",
        )


@dataclass(kw_only=True, slots=True)
class RecipeConfig:
    """How long and with what regularisation; a published recipe also says where it comes from."""

    epochs: int
    global_batch_size: int
    """Images per optimizer step over all processes."""
    accumulate: int
    """Parts into which a process cuts its share of a step to save memory; the step stays the same."""
    schedule: Schedule
    warmup_epochs: float
    warmup_factor: float
    """Share of the peak at which the warm-up starts."""
    final_factor: float
    """Share of the peak at which cosine and linear end."""
    step_epochs: list[int]
    """step: epochs at which the rate is multiplied by `step_factor`."""
    step_factor: float
    loss: Loss
    label_smoothing: float
    ema_decay: float
    """Exponential moving average of the weights, evaluated instead of them; 0 = none."""
    ema_every_steps: int
    mixup: float
    """Beta distribution's alpha of mixup; 0 = none."""
    cutmix: float
    """The same of cutmix; where both are given, each step draws one of them."""
    mix_probability: float
    """Share of the steps that are mixed."""
    erase: float
    """Probability that a random rectangle of a training image is erased."""
    clip_norm: float
    """Greatest L2 norm of a step's gradient; 0 = no clipping."""
    on_nan: OnNan
    """What a step does whose loss or gradient is not finite."""
    source: str | None
    """Where the recipe was published."""
    published_top1: float | None
    """Per cent, as published; never a claim of this project."""
    reproduced_top1: float | None
    """Per cent, measured with this project, or null."""

    def __post_init__(self) -> None:
        require_range(
            self,
            "recipe",
            epochs=(1, INF),
            global_batch_size=(1, INF),
            accumulate=(1, INF),
            warmup_epochs=(0, INF),
            warmup_factor=(0, 1),
            final_factor=(0, 1),
            step_factor=(0, 1),
            label_smoothing=(0, 0.99),
            ema_decay=(0, 0.999999),
            ema_every_steps=(1, INF),
            mixup=(0, 100),
            cutmix=(0, 100),
            mix_probability=(0, 1),
            erase=(0, 1),
            clip_norm=(0, INF),
        )
        require(
            self.warmup_epochs <= self.epochs,
            "recipe.warmup_epochs",
            self.warmup_epochs,
            f"must not exceed recipe.epochs = {self.epochs}",
            "shorten the warm-up or train longer",
        )
        require(
            self.step_epochs == sorted({epoch for epoch in self.step_epochs if epoch >= 1}),
            "recipe.step_epochs",
            self.step_epochs,
            "must be rising epochs from 1 up",
            "e.g. recipe.step_epochs=[30,60]",
        )


@dataclass(kw_only=True, slots=True)
class ComputeConfig:
    """Processes and arithmetic; nothing here changes which samples a step sees."""

    num_processes: str
    """World size: a number, `min:max` (as many as there are places), or `auto` (this machine's GPUs, else 1)."""
    num_nodes: int
    """Machines that the processes are spread over evenly."""
    virtual_ranks: str
    """Slices of a step whose gradients meet in a fixed tree, so that the bits do not depend on the number of processes:
    a power of two, `auto` (the processes of the first attempt) or `off` (plain all-reduce)."""
    device: Device
    precision: Precision
    channels_last: bool
    compile: bool
    deterministic: bool
    """Only algorithms that give the same bits every time."""
    threads_per_process: int
    """Compute threads of a process on the CPU."""
    master_port: int
    """Port on which the processes of this machine meet; 0 takes a free one."""
    max_time_s: float
    """Seconds from the start of the command after which the run saves and stops with 45; 0 = none."""
    check_ranks_every_steps: int
    """Steps between comparisons of the parameters across ranks; 0 = never."""

    def __post_init__(self) -> None:
        number, virtual = self.num_processes, self.virtual_ranks
        require(
            number == "auto" or process_range(number) is not None,
            "compute.num_processes",
            number,
            "must be a number from 1 up, min:max, or auto",
            "compute.num_processes=2, or 2:8",
        )
        require(
            virtual in ("auto", "off") or (virtual.isdecimal() and int(virtual).bit_count() == 1),
            "compute.virtual_ranks",
            virtual,
            "must be a power of two, auto or off",
            "compute.virtual_ranks=8",
        )
        require_range(
            self,
            "compute",
            num_nodes=(1, 4096),
            threads_per_process=(1, 1024),
            master_port=(0, 65535),
            max_time_s=(0, INF),
            check_ranks_every_steps=(0, INF),
        )


def process_range(text: str) -> tuple[int, int] | None:
    """Least and most processes of ``n`` or ``min:max``; None where it is neither."""
    low, _, high = text.partition(":")
    high = high or low
    if not (low.isdecimal() and high.isdecimal()) or text.endswith(":"):
        return None
    return (int(low), int(high)) if 1 <= int(low) <= int(high) else None


@dataclass(kw_only=True, slots=True)
class CheckpointingConfig:
    """When the state is saved and what is kept. The end of the run and a request to stop always save."""

    every_epochs: int
    """0 = not by epochs."""
    every_steps: int
    """0 = not by steps."""
    every_s: float
    """Seconds between saves, at the next step's border; 0 = not by time."""
    keep_last: int
    """Newest checkpoints that stay."""
    keep_best: int
    """Best ones by `metric` that stay besides."""
    metric: str
    """Of the evaluation; greater is better, except for a loss."""
    asynchronous: bool
    """Write beside the next steps, from a copy of the state."""
    mirror: str | None
    """Object store that also gets every checkpoint, e.g. s3://bucket/runs; a machine without them starts from there."""

    def __post_init__(self) -> None:
        require_range(
            self,
            "checkpointing",
            every_epochs=(0, INF),
            every_steps=(0, INF),
            every_s=(0, INF),
            keep_last=(1, INF),
            keep_best=(0, INF),
        )
        require(
            self.metric in METRICS,
            "checkpointing.metric",
            self.metric,
            "is no figure of an evaluation",
            nearest(self.metric, METRICS),
        )
        stores = ("s3://", "gs://", "az://", "file:///")
        require(
            self.mirror is None or self.mirror.startswith(stores),
            "checkpointing.mirror",
            self.mirror,
            f"must begin with one of {', '.join(stores)}",
            "e.g. checkpointing.mirror=s3://bucket/runs",
        )


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Weights & Biases is a mirror: the events on disk are the record."""

    mode: TrackingMode
    entity: str | None
    project: str
    group: str | None
    tags: list[str]
    log_every_steps: int
    upload_checkpoint: bool
    """Attach the last and the best checkpoint to the W&B run as an artifact."""
    init_timeout_s: float
    """Seconds that an online run waits for the server before it goes on offline."""
    secret: str | None
    """Where the API key is: NAME/KEY of a Kubernetes secret, or the path of a file on the machine of the first rank."""

    def __post_init__(self) -> None:
        require_range(self, "tracking", log_every_steps=(1, INF), init_timeout_s=(1, INF))


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Everything that one run is."""

    name: str
    """First part of the run id: lower case, digits and hyphens."""
    seed: int
    runs_dir: str
    """Folder of runs; with cluster=kubernetes also an object store, e.g. s3://bucket/runs."""
    data_dir: str
    """Where the presets of `data/` look for shards."""
    init_from: str | None
    """Start from the weights of another run's checkpoint: a path, ID:best or ID:last."""
    max_steps: int | None
    """End after this many optimizer steps although epochs remain."""
    eval_batch_size: int
    """Images per process and step in evaluation."""
    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    recipe: RecipeConfig
    compute: ComputeConfig
    cluster: ClusterConfig
    checkpointing: CheckpointingConfig
    tracking: TrackingConfig

    def __post_init__(self) -> None:
        require(
            RUN_NAME.fullmatch(self.name) is not None,
            "name",
            self.name,
            "must be 1 to 31 characters of a-z, 0-9 and inner hyphens",
            "e.g. name=resnet50-baseline",
        )
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be between 0 and 2^63 - 1", "seed=0")
        require(
            self.max_steps is None or self.max_steps >= 1,
            "max_steps",
            self.max_steps,
            "must be at least 1",
            "leave it out to train recipe.epochs epochs",
        )
        require(
            self.eval_batch_size >= 1,
            "eval_batch_size",
            self.eval_batch_size,
            "must be at least 1",
            "e.g. eval_batch_size=64",
        )
        require(
            self.init_from is None or self.model.weights is None,
            "init_from",
            self.init_from,
            f"gives the first weights, and so does model.weights = {self.model.weights}",
            "leave one of them out",
        )
        self._require_batch_fits()

    def _require_batch_fits(self) -> None:
        batch = self.recipe.global_batch_size
        _, processes = process_range(self.compute.num_processes) or (1, 1)
        require(
            batch >= processes,
            "recipe.global_batch_size",
            batch,
            f"must be at least compute.num_processes = {processes}, or some process has no image in a step",
            f"recipe.global_batch_size={processes} or compute.num_processes={batch}",
        )
        require(
            batch >= processes * self.recipe.accumulate,
            "recipe.accumulate",
            self.recipe.accumulate,
            f"cuts {batch} images of {processes} processes into parts without an image",
            f"recipe.accumulate={max(1, batch // processes)}",
        )


GROUPS = ("data", "model", "optimizer", "recipe", "compute", "cluster", "checkpointing", "tracking")

MAY_CHANGE = (
    "cluster",
    "tracking",
    "checkpointing",
    "runs_dir",
    "data_dir",
    "eval_batch_size",
    "data.num_workers",
    "data.prefetch_batches",
    "data.cache_gib",
    "recipe.on_nan",
    "compute.num_processes",
    "compute.num_nodes",
    "compute.device",
    "compute.threads_per_process",
    "compute.master_port",
    "compute.max_time_s",
    "compute.check_ranks_every_steps",
)
"""Keys that may differ between the attempts of a run: they are left out of its id."""
