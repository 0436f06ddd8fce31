"""Residual networks of He et al.: depths 18 to 152 as torchvision has them (v1.5), and 20 to 110 for CIFAR.

Names of parameters equal torchvision's, so its state dicts load as they are.
Source: https://arxiv.org/abs/1512.03385; v1.5 strides in the 3x3: Goyal et al., https://arxiv.org/abs/1706.02677.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import pad

from orchestrator.options import Shortcut, Stem

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetOptions:
    """What may vary at a given depth."""

    stem: Stem = Stem.imagenet
    shortcut: Shortcut = Shortcut.B
    zero_init_last: bool = False
    dropout: float = 0.0


class ZeroPadShortcut(nn.Module):
    """Option A: the input, thinned out by the stride, with channels of zeros on both sides; no parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(kind: Shortcut, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """None where input and output have the same shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    if kind is Shortcut.A:
        return ZeroPadShortcut(in_channels, out_channels, stride)
    return nn.Sequential(conv1x1(in_channels, out_channels, stride=stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(shortcut, in_channels, width, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 to four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(shortcut, in_channels, out_channels, stride)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """Stem, stages of residual blocks, average over the image, linear head `fc`.

    `blocks` and `widths` give each stage's number of blocks and its width before the block's expansion.
    """

    def __init__(
        self, block: Block, blocks: Sequence[int], widths: Sequence[int], num_classes: int, options: ResNetOptions
    ):
        super().__init__()
        small = options.stem is Stem.small
        self.conv1 = (
            conv3x3(3, widths[0]) if small else nn.Conv2d(3, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = widths[0]
        self.stages: list[str] = []
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
            self.stages.append(f"layer{number}")
            stride = 1 if number == 1 else 2
            self.add_module(self.stages[-1], _stage(block, channels, width, count, stride, options.shortcut))
            channels = width * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(options.dropout)
        self.fc = nn.Linear(channels, num_classes)
        _initialise(self, options.zero_init_last)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = getattr(self, stage)(x)
        return self.fc(self.dropout(self.avgpool(x).flatten(1)))


def _stage(block: Block, in_channels: int, width: int, count: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    first = block(in_channels, width, stride, shortcut)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1, shortcut) for _ in range(count - 1)))


def _initialise(model: nn.Module, zero_init_last: bool) -> None:
    """He et al., fan out: https://arxiv.org/abs/1502.01852; zeros on a branch's last norm: Goyal et al., 5.1."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_last and isinstance(module, BasicBlock | Bottleneck):
            nn.init.zeros_(module.last_norm.weight)


IMAGENET_DEPTHS: dict[int, tuple[Block, tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
CIFAR_DEPTHS = (20, 32, 44, 56, 110)


def resnet(depth: int, num_classes: int, options: ResNetOptions) -> ResNet:
    """Table 1 of the paper."""
    block, blocks = IMAGENET_DEPTHS[depth]
    return ResNet(block, blocks, (64, 128, 256, 512), num_classes, options)


def cifar_resnet(depth: int, num_classes: int, options: ResNetOptions) -> ResNet:
    """Section 4.2 of the paper: 6n + 2 layers in three stages."""
    return ResNet(BasicBlock, ((depth - 2) // 6,) * 3, (16, 32, 64), num_classes, options)
