"""A name gives a network, or an error that gives the right name; an option is obeyed or refused, never ignored."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.config import ModelConfig
from orchestrator.errors import ConfigError
from orchestrator.model.resnet import ResNet
from orchestrator.model.zoo import OURS, build_model, imagenet_names, known_models
from orchestrator.options import Shortcut, Stem

PLUGIN = """
import torch

class Net(torch.nn.Linear):
    pass

def strict(num_classes, dropout=0.0):
    net = Net(3, num_classes)
    net.options = {"dropout": dropout}
    return net

def anything(num_classes, **options):
    net = Net(3, num_classes)
    net.options = options
    return net

def nothing(num_classes):
    return "no module"
"""

ENTRIES = """[orchestrator.models]
my_strict = my_models_for_a_test:strict
my_anything = my_models_for_a_test:anything
my_nothing = my_models_for_a_test:nothing
my_broken = no_such_module_for_a_test:build
resnet18 = my_models_for_a_test:strict
resnet26 = my_models_for_a_test:strict
"""


def config(name: str, **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "num_classes": None,
        "stem": Stem.imagenet,
        "shortcut": Shortcut.B,
        "zero_init_last": True,
        "drop_path": 0.0,
        "dropout": 0.0,
        "weights": None,
    }
    return ModelConfig(name=name, **values | changes)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A package, installed as pip would install it, that offers models by entry points."""
    (tmp_path / "my_models_for_a_test.py").write_text(PLUGIN)
    info = tmp_path / "my_models_for_a_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-models-for-a-test\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_models_for_a_test", None)


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("name", OURS)
def test_each_of_our_names_gives_our_network_with_the_head_asked_for(name):
    with torch.device("meta"):
        model = build_model(config(name, stem=Stem.small if "cifar" in name else Stem.imagenet), 7)
    assert isinstance(model, ResNet)
    assert model.fc.out_features == 7


def test_every_option_of_the_config_arrives_in_our_network():
    model = build_model(config("resnet18", stem=Stem.small, shortcut=Shortcut.A, dropout=0.25), 10)
    assert isinstance(model, ResNet)
    assert model.conv1.kernel_size == (3, 3)
    assert not [name for name, _ in model.named_parameters() if "downsample" in name]
    assert model.dropout.p == 0.25
    assert any(m.weight.count_nonzero() == 0 for m in batch_norms(model))
    assert all(m.weight.min() == 1 for m in batch_norms(build_model(config("resnet18", zero_init_last=False), 10)))


def test_a_bare_name_is_ours_first_and_the_prefix_forces_timm():
    with torch.device("meta"):
        assert isinstance(build_model(config("resnet18"), 10), ResNet)
        assert build_model(config("timm/resnet18"), 10).__module__ == "timm.models.resnet"
        assert build_model(config("mobilenetv3_small_050"), 10).__module__ == "timm.models.mobilenetv3"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet81", "resnet18"),
        ("cifar_resnt20", "cifar_resnet20"),
        ("timm/resnt50", "timm/resnet50"),
        ("efficentnet_b0", "efficientnet_b0"),
        ("my_strickt", "my_strict"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one(plugin, name, hint):
    with pytest.raises(ConfigError, match=f"did you mean '{hint}'") as caught:
        build_model(config(name), 10)
    assert (caught.value.key, caught.value.value, caught.value.exit_code) == ("model.name", name, 42)


def test_a_name_near_to_none_gets_the_list_of_ours_and_the_way_to_timms():
    with pytest.raises(ConfigError, match=r"one of: cifar_resnet110, .*resnet50 \(timm/NAME takes any of timm's\)"):
        build_model(config("qqqq"), 10)


@pytest.mark.parametrize("name", ["timm/resnet18.a1_in1k", "resnet26d.bt_in1k"])
def test_a_tag_of_pretrained_weights_is_refused_because_nothing_is_downloaded(name):
    with pytest.raises(ConfigError, match=r"never downloaded.*model\.weights=FILE"):
        build_model(config(name), 10)


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("resnet18", {"drop_path": 0.1}, "model.drop_path"),
        ("cifar_resnet20", {"stem": Stem.imagenet}, "model.stem"),
        ("timm/resnet18", {"stem": Stem.small}, "model.stem"),
        ("timm/resnet18", {"shortcut": Shortcut.A}, "model.shortcut"),
        ("vgg11", {"drop_path": 0.1}, "model.drop_path"),
        ("hrnet_w18_small", {"drop_path": 0.1}, "model.drop_path"),
        ("my_strict", {"stem": Stem.small}, "model.stem"),
        ("my_strict", {"drop_path": 0.1}, "model.drop_path"),
    ],
)
def test_an_option_that_the_network_does_not_have_is_refused_by_key(plugin, name, changes, key):
    with torch.device("meta"), pytest.raises(ConfigError, match="Way out: model") as caught:
        build_model(config(name, **changes), 10)
    assert caught.value.key == key


@pytest.mark.parametrize("name", ["vgg11", "caformer_s18", "hrnet_w18_small", "eca_vovnet39b", "tf_efficientnet_lite0"])
def test_timm_networks_without_our_options_build_with_neutral_ones(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(config(name), 10).parameters()) > 0


def test_timms_own_stochastic_depth_and_dropout_give_way_to_the_config():
    def rates(model: nn.Module) -> set[float]:
        found = {getattr(m, "drop_prob", 0.0) for m in model.modules()}
        return {round(rate, 3) for rate in found if rate}

    with torch.device("meta"):
        assert rates(build_model(config("nest_tiny"), 10)) == set()
        deep = rates(build_model(config("timm/resnet18", drop_path=0.2), 10))
        assert max(deep) == 0.2
        assert build_model(config("timm/resnet18", dropout=0.3), 10).drop_rate == 0.3


def test_zero_init_reaches_timms_residual_networks():
    zero = build_model(config("timm/resnet18"), 10)
    one = build_model(config("timm/resnet18", zero_init_last=False), 10)
    assert sum(int(m.weight.count_nonzero() == 0) for m in batch_norms(zero)) == 8
    assert sum(int(m.weight.count_nonzero() == 0) for m in batch_norms(one)) == 0


def test_an_entry_point_gets_the_options_that_its_signature_names(plugin):
    assert build_model(config("my_strict", dropout=0.5), 4).options == {"dropout": 0.5}
    model = build_model(config("my_anything", stem=Stem.small, drop_path=0.1), 4)
    assert model.out_features == 4
    assert model.options == {
        "stem": "small",
        "shortcut": "B",
        "zero_init_last": True,
        "drop_path": 0.1,
        "dropout": 0.0,
    }


def test_entry_points_stand_behind_ours_and_before_timms(plugin):
    with torch.device("meta"):
        assert isinstance(build_model(config("resnet18"), 10), ResNet)
        assert type(build_model(config("resnet26"), 10)).__name__ == "Net"
        assert build_model(config("timm/resnet26"), 10).__module__ == "timm.models.resnet"


@pytest.mark.parametrize(("name", "says"), [("my_broken", "cannot be imported"), ("my_nothing", "returned str")])
def test_a_broken_entry_point_is_the_users_error_with_its_place(plugin, name, says):
    with pytest.raises(ConfigError, match=says) as caught:
        build_model(config(name), 10)
    assert "_for_a_test:" in str(caught.value)


def test_known_models_are_ours_the_packages_and_timms(plugin):
    names = known_models()
    assert names == sorted(set(names))
    assert {*OURS, "my_strict", "efficientnet_b0"} <= set(names)
    assert len(names) > 1000


def test_imagenet_names_are_a_thousand_distinct_short_ones_in_order():
    names = imagenet_names()
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[281], names[967], names[999]) == ("tench", "tabby", "espresso", "toilet tissue")
    assert (names[134], names[517]) == ("crane (bird)", "crane (machine)")
    assert not [name for name in names if "," in name or not name]


def test_building_never_touches_the_network(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked for")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    build_model(config("mobilenetv3_small_050"), 10)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
