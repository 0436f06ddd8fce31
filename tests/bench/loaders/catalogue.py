"""Which loaders take part: the module that runs each, on what data, in which environment."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Loader:
    """One line of the table."""

    module: str
    title: str
    data: str
    """Folder of the set that it reads; made by `sets` where it is ours, else by the module's `convert`."""
    options: dict[str, str] = field(default_factory=dict)
    """Keyword arguments of the module's `batches`."""
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.module == "ours"


def _ours(title: str, data: str, decode: str = "fast", kernel: str = "on", note: str = "") -> Loader:
    return Loader(
        module="ours",
        title=title,
        data=data,
        options={"decode": decode},
        environment={"ORCHESTRATOR_KERNEL": kernel},
        note=note,
    )


REFERENCE = "ours"
LIMIT = "limit"

LOADERS = {
    "ours": _ours("orchestrator", "crop_ready", note="shards as `shards make` writes them: the same pixels"),
    "ours_plain": _ours("orchestrator, other people's shards", "plain", note="JPEGs as they come"),
    "ours_half": _ours("orchestrator, half-size shards", "half", note="short side 352, quality 90: other pixels"),
    "ours_wheels": _ours("orchestrator without its kernel", "crop_ready", kernel="off", note="kernel switched off"),
    "ours_wheels_plain": _ours("the same on other people's shards", "plain", kernel="off", note="kernel switched off"),
    "ours_exact": _ours("orchestrator, decode=exact", "plain", decode="exact", note="whole images, Pillow"),
    LIMIT: Loader(module="limit", title="practical limit, C without Python", data="plain", note="tests/bench/limit.c"),
    "torchvision": Loader(module="torchvision_folder", title="torchvision ImageFolder", data="folder", note="Pillow"),
    "webdataset": Loader(
        module="wds", title="webdataset as documented", data="plain", options={"decoder": "pil"}, note="Pillow"
    ),
    "webdataset_io": Loader(
        module="wds", title="webdataset + torchvision.io", data="plain", options={"decoder": "io"}, note="uint8 resize"
    ),
    "webdataset_nvimgcodec": Loader(
        module="wds",
        title="webdataset + nvimgcodec regions",
        data="plain",
        options={"decoder": "nvimgcodec"},
        note="CPU backend, uint8 resize by torch",
    ),
    "litdata": Loader(module="lit", title="litdata", data="litdata", note="torchvision.io"),
    "mosaic": Loader(module="mosaic", title="mosaicml-streaming", data="mds", note="Pillow, as documented"),
    "mosaic_io": Loader(
        module="mosaic",
        title="mosaicml-streaming + torchvision.io",
        data="mds_bytes",
        options={"decoder": "io"},
        note="column of bytes",
    ),
    "dali": Loader(module="dali", title="NVIDIA DALI on CPU", data="plain", note="antialiased"),
    "dali_fast": Loader(
        module="dali",
        title="NVIDIA DALI on CPU, fast settings",
        data="plain",
        options={"antialias": ""},
        note="not antialiased",
    ),
    "tfdata": Loader(
        module="tfdata",
        title="tf.data decode_and_crop_jpeg",
        data="tfrecord",
        note="not antialiased",
    ),
    "ffcv_rn50": Loader(
        module="ffcv_rn50", title="FFCV, rn50 format", data="ffcv_rn50", note="half of the images raw: other pixels"
    ),
    "ffcv": Loader(module="ffcv_beton", title="FFCV", data="ffcv", note="encoded anew at quality 95"),
}
