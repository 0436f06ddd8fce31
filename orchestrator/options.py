"""The choices of the schema, named as users type them."""

from __future__ import annotations

from enum import Enum


class Crop(Enum):
    """How a training image becomes `data.image_size` pixels square."""

    random_resized = "random_resized"
    pad = "pad"
    none = "none"


class Interpolation(Enum):
    """The resampling filter, antialiased."""

    bilinear = "bilinear"
    bicubic = "bicubic"


class OnBad(Enum):
    """What an unreadable sample does: end the run, or be left out and counted."""

    fail = "fail"
    skip = "skip"


class OnNan(Enum):
    """What a step does whose loss or gradient is not finite: end the run, or leave the weights alone and be counted."""

    stop = "stop"
    skip = "skip"


class OnDamage(Enum):
    """What a shard does whose bytes are not those of the index: end the run, or be left out and counted."""

    fail = "fail"
    quarantine = "quarantine"


class Decode(Enum):
    """`fast` decodes only what the crop needs; `exact` decodes and resizes whole images with Pillow."""

    fast = "fast"
    exact = "exact"


class Augment(Enum):
    """Augmentation policies after the random crop, drawn per sample."""

    none = "none"
    randaugment = "randaugment"
    trivialaugment = "trivialaugment"
    three_augment = "three_augment"


class Stem(Enum):
    """The first layers of a ResNet: 7x7/2 + pooling, or 3x3/1 for images under about 64 pixels."""

    imagenet = "imagenet"
    small = "small"


class Shortcut(Enum):
    """He et al.: A = zero-padded identity without parameters, B = projection."""

    A = "A"
    B = "B"


class OptimizerKind(Enum):
    """Names as torch and timm have them."""

    sgd = "sgd"
    adamw = "adamw"
    rmsprop = "rmsprop"
    lamb = "lamb"
    lars = "lars"


class Loss(Enum):
    """`bce` asks of each class alone whether it is there; a mixed-in class is where its share exceeds a fifth."""

    cross_entropy = "cross_entropy"
    bce = "bce"


class Schedule(Enum):
    """The shape of the learning rate after the warm-up."""

    cosine = "cosine"
    step = "step"
    linear = "linear"
    constant = "constant"


class Precision(Enum):
    """Arithmetic of forward and backward; weights and optimizer stay in fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(Enum):
    """`auto` takes the GPUs of the machine, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Where(Enum):
    """The kind of cluster that a job goes to."""

    local = "local"
    ray = "ray"
    kubernetes = "kubernetes"


class JobKind(Enum):
    """The object that a run is on Kubernetes; `auto` takes the best one that the cluster serves."""

    auto = "auto"
    job = "job"
    jobset = "jobset"
    trainjob = "trainjob"
    rayjob = "rayjob"


class CodeSource(Enum):
    """The image holds the code, or an archive of this checkout is sent along."""

    image = "image"
    archive = "archive"


class Spread(Enum):
    """How the nodes of a run lie over `cluster.topology`: anywhere, one in each part, or all in one."""

    any = "any"
    spread = "spread"
    pack = "pack"


class Placement(Enum):
    """Ray's placement strategies."""

    PACK = "PACK"
    SPREAD = "SPREAD"
    STRICT_PACK = "STRICT_PACK"
    STRICT_SPREAD = "STRICT_SPREAD"


class TrackingMode(Enum):
    """Weights & Biases: a folder to sync later, a live run, or nothing."""

    offline = "offline"
    online = "online"
    disabled = "disabled"
