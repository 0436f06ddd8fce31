"""Our ResNets are torchvision's and the paper's."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from orchestrator.model.resnet import (
    CIFAR_DEPTHS,
    IMAGENET_DEPTHS,
    BasicBlock,
    Bottleneck,
    ResNetOptions,
    ZeroPadShortcut,
    cifar_resnet,
    resnet,
)
from orchestrator.options import Shortcut, Stem


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shake_norms(model: nn.Module) -> None:
    """Give every BatchNorm a state that a mistake in order or momentum could not survive."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            channels = module.num_features
            module.running_mean = torch.randn(channels) * 0.1
            module.running_var = torch.rand(channels) + 0.5
            module.weight.data = torch.rand(channels) + 0.5
            module.bias.data = torch.randn(channels) * 0.1


@pytest.mark.parametrize("depth", IMAGENET_DEPTHS)
def test_names_shapes_and_logits_equal_torchvisions(depth):
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None, num_classes=11)
    shake_norms(theirs)
    with torch.device("meta"):
        ours = resnet(depth, 11, ResNetOptions())
    state = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert list(ours.state_dict()) == list(state)
    assert count(ours) == count(theirs)
    ours.load_state_dict(state, assign=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "parameters"), {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}.items()
)
def test_imagenet_parameter_counts_are_the_published_ones(depth, parameters):
    with torch.device("meta"):
        assert count(resnet(depth, 1000, ResNetOptions())) == parameters


@pytest.mark.parametrize(
    ("depth", "millions", "exact"),
    [(20, 0.27, 269_722), (32, 0.46, 464_154), (44, 0.66, 658_586), (56, 0.85, 853_018), (110, 1.7, 1_727_962)],
)
def test_cifar_parameter_counts_are_those_of_table_6(depth, millions, exact):
    with torch.device("meta"):
        counts = {
            kind: count(cifar_resnet(depth, 10, ResNetOptions(stem=Stem.small, shortcut=kind))) for kind in Shortcut
        }
    assert counts[Shortcut.A] == exact
    assert round(exact / 1e6, 1 if depth == 110 else 2) == millions
    # Two projections: 1x1 convolutions 16 -> 32 and 32 -> 64 with a norm each.
    assert counts[Shortcut.B] - exact == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


@pytest.mark.parametrize("depth", CIFAR_DEPTHS)
def test_a_cifar_network_has_as_many_weighted_layers_as_its_name_says(depth):
    with torch.device("meta"):
        model = cifar_resnet(depth, 10, ResNetOptions(stem=Stem.small, shortcut=Shortcut.A))
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


@pytest.mark.parametrize(("stem", "side"), [(Stem.imagenet, 8), (Stem.small, 32)])
def test_only_the_imagenet_stem_shrinks_the_image(stem, side):
    model = resnet(18, 10, ResNetOptions(stem=stem))
    images = torch.zeros(1, 3, 32, 32)
    assert model.maxpool(model.conv1(images)).shape == (1, 64, side, side)
    assert model.eval()(images).shape == (1, 10)


@pytest.mark.parametrize("side", [7, 8])
def test_option_a_keeps_every_second_pixel_and_pads_channels_with_zeros_on_both_sides(side):
    x = torch.randn(2, 4, side, side)
    out = ZeroPadShortcut(4, 10, stride=2)(x)
    assert out.shape == (2, 10, (side + 1) // 2, (side + 1) // 2)
    assert torch.equal(out[:, 3:7], x[:, :, ::2, ::2])
    assert out[:, :3].count_nonzero() == out[:, 7:].count_nonzero() == 0


@pytest.mark.parametrize("depth", [18, 50])
def test_option_a_works_in_every_network_and_has_no_parameters(depth):
    torch.manual_seed(0)
    model = resnet(depth, 10, ResNetOptions(shortcut=Shortcut.A))
    assert not [name for name, _ in model.named_parameters() if "downsample" in name]
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("depth", [18, 50])
def test_with_zero_init_every_block_without_projection_starts_as_the_identity(depth):
    model = resnet(depth, 10, ResNetOptions(zero_init_last=True)).eval()
    blocks = [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]
    plain = [block for block in blocks if block.downsample is None]
    assert len(blocks) == sum(IMAGENET_DEPTHS[depth][1])
    assert plain
    for block in plain:
        x = torch.rand(1, block.conv1.in_channels, 4, 4)
        assert torch.equal(block(x), x)
    without = resnet(depth, 10, ResNetOptions())
    assert all(m.weight.min() == 1 for m in without.modules() if isinstance(m, nn.BatchNorm2d))


def test_convolutions_start_with_he_deviation_over_the_fan_out():
    torch.manual_seed(0)
    model = resnet(18, 10, ResNetOptions(stem=Stem.small))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02), name
            assert abs(module.weight.mean().item()) < 0.1 * (2 / fan_out) ** 0.5, name


def test_dropout_acts_before_the_head_and_only_in_training():
    torch.manual_seed(0)
    model = cifar_resnet(20, 10, ResNetOptions(stem=Stem.small, dropout=0.9))
    seen: list[torch.Tensor] = []
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(8, 3, 32, 32)
    model.train()(images)
    model.eval()(images)
    assert 0.85 < (seen[0] == 0).float().mean() < 0.95
    assert (seen[1] == 0).float().mean() < 0.5


def test_a_step_of_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    model = cifar_resnet(20, 10, ResNetOptions(stem=Stem.small, shortcut=Shortcut.B))
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]


def test_the_model_room_imports_neither_timm_nor_torchvision_before_they_are_needed():
    program = (
        "import sys, orchestrator.model.zoo, orchestrator.model.optim, orchestrator.model.ema, "
        "orchestrator.model.weights; print(*sorted({'timm', 'torchvision', 'pytorch_lightning'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
