"""Densely connected networks: the ILS authors' DenseNet, and DenseNet-BC 100-12."""

import torch
import torchvision
from torch import Tensor, nn

from models.initialization import he_initialize
from models.stem import is_large


class DenseLayer(nn.Sequential):
    """x with `growth` new channels behind it: (N, C, H, W) to (N, C + growth, H, W)."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, growth, kernel_size=3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], dim=1)


def _transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """Fewer channels, half the height and width."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False),
        nn.AvgPool2d(2),
    )


def densenet(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The ILS authors' DenseNet: (N, C, H, W) float to (N, num_classes) logits.

    A 64-channel stem and four dense blocks of four 3x3 convolutions without bottleneck, growth 32;
    the transitions between them halve the channels. Images whose shorter side is at least 64 (the
    authors enlarged theirs to 96x96) enter by a 7x7 convolution and max pooling, both of stride 2;
    smaller ones by a 3x3 convolution of stride 1.

    Source: ILS paper; Huang et al., *Densely Connected Convolutional Networks*, CVPR 2017, arXiv
    1608.06993. The same network, but for its convolutions' biases, is in Zhang et al., *Dive into
    Deep Learning*, section 8.7.
    """
    channels, growth = 64, 32
    if is_large(input_shape):
        layers: list[nn.Module] = [
            nn.Conv2d(input_shape[0], channels, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        ]
    else:
        # The first dense layer begins with batch norm and ReLU: the stem needs none of its own.
        layers = [nn.Conv2d(input_shape[0], channels, kernel_size=3, padding=1, bias=False)]
    for block in range(4):
        if block > 0:
            layers.append(_transition(channels, channels // 2))
            channels //= 2
        for _ in range(4):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    return he_initialize(
        nn.Sequential(
            *layers,
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, num_classes),
        )
    )


def densenet100bc(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """DenseNet-BC of depth 100 and growth 12: (N, C, H, W) float to (N, num_classes) logits.

    Three blocks of 16 bottleneck layers, transitions that halve the channels, no dropout. It is
    torchvision's DenseNet and initialisation with the paper's CIFAR stem, a 3x3 convolution of
    twice the growth, which images of every size get.

    Source: Huang et al., *Densely Connected Convolutional Networks*, CVPR 2017, arXiv 1608.06993,
    section 3 and table 2.
    """
    growth = 12
    network = torchvision.models.DenseNet(
        growth_rate=growth,
        block_config=(16, 16, 16),
        num_init_features=2 * growth,
        num_classes=num_classes,
    )
    network.features.conv0 = he_initialize(
        nn.Conv2d(input_shape[0], 2 * growth, kernel_size=3, padding=1, bias=False)
    )
    for imagenet_only in ("norm0", "relu0", "pool0"):
        delattr(network.features, imagenet_only)
    return network
