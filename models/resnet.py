"""Residual networks: torchvision's ResNet-18 to ResNet-152, and the pre-activation ResNet-56."""

from collections.abc import Callable

import torchvision
from torch import Tensor, nn

from models.initialization import he_initialize
from models.stem import is_large


def _torchvision_resnet(
    constructor: Callable[..., nn.Module], input_shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    """torchvision's network and initialisation; only the stem depends on the images.

    Images whose shorter side is at least 64 get torchvision's stem (7x7 convolution of stride 2,
    then max pooling of stride 2), smaller ones a 3x3 convolution of stride 1 and no pooling.
    """
    channels = input_shape[0]
    network = constructor(num_classes=num_classes)
    if is_large(input_shape):
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    else:
        network.conv1 = nn.Conv2d(channels, 64, kernel_size=3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    he_initialize(network.conv1)
    return network


def resnet18(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """ResNet-18: (N, C, H, W) float to (N, num_classes) logits.

    Source: He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, table 1.
    """
    return _torchvision_resnet(torchvision.models.resnet18, input_shape, num_classes)


def resnet34(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """ResNet-34; shapes and source as `resnet18`."""
    return _torchvision_resnet(torchvision.models.resnet34, input_shape, num_classes)


def resnet50(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """ResNet-50; shapes and source as `resnet18`.

    torchvision strides in the 3x3 convolution of a bottleneck, the paper in the first 1x1.
    """
    return _torchvision_resnet(torchvision.models.resnet50, input_shape, num_classes)


def resnet101(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """ResNet-101; as `resnet50`."""
    return _torchvision_resnet(torchvision.models.resnet101, input_shape, num_classes)


def resnet152(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """ResNet-152; as `resnet50`."""
    return _torchvision_resnet(torchvision.models.resnet152, input_shape, num_classes)


class PreActivationBottleneck(nn.Module):
    """x + f(x), where f is 1x1, 3x3 and 1x1 convolutions, each behind batch norm and ReLU.

    (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride). With `project` the
    shortcut is a 1x1 convolution of x, otherwise x itself. `activated` says that x already comes
    out of a batch norm and ReLU, so that f need not begin with them (the unit after the stem).
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        stride: int = 1,
        project: bool = False,
        activated: bool = False,
    ) -> None:
        super().__init__()
        first = [] if activated else [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)]
        # No biases: a constant that a convolution adds is taken away by the batch norms behind it.
        self.residual = nn.Sequential(
            *first,
            nn.Conv2d(in_channels, mid_channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, mid_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(mid_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(mid_channels, out_channels, kernel_size=1, bias=False),
        )
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            if project
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.residual(x)


def resnet56(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """ResNet-56 v2, the CIFAR network of the LR paper: (N, C, H, W) to (N, num_classes) logits.

    Depth 9 * 6 + 2: a 16-channel stem, then three stages of six pre-activation bottlenecks that
    put out 64, 128 and 256 channels; the second and the third stage halve height and width. As in
    Keras' `cifar10_resnet.py`, version 2, with its inner widths of 16, 64 and 128, but without
    its redundant convolution biases and with PyTorch's batch norm constants.

    Source: He et al., *Identity Mappings in Deep Residual Networks*, ECCV 2016, arXiv 1603.05027.
    """
    channels = 16
    layers: list[nn.Module] = [
        nn.Conv2d(input_shape[0], channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]
    for stage, (mid_channels, out_channels) in enumerate([(16, 64), (64, 128), (128, 256)]):
        for unit in range(6):
            layers.append(
                PreActivationBottleneck(
                    channels,
                    mid_channels,
                    out_channels,
                    stride=2 if stage > 0 and unit == 0 else 1,
                    project=unit == 0,
                    activated=stage == 0 and unit == 0,
                )
            )
            channels = out_channels
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
