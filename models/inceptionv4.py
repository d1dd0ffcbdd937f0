"""Inception-v4."""

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from models.initialization import he_initialize
from models.stem import is_large

# Convolution without bias, batch norm (Inception's epsilon) and ReLU. Padding keeps height and
# width, or with stride 2 halves them, rounding up. Arguments: in, out channels, kernel, stride.
_conv = partial(Conv2dNormActivation, norm_layer=partial(nn.BatchNorm2d, eps=0.001))
_halve = partial(nn.MaxPool2d, kernel_size=3, stride=2, padding=1)
_average = partial(nn.AvgPool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)


class Branches(nn.ModuleList):
    """Several modules that see the same x; their outputs one behind the other in channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


def _stem(in_channels: int, first_stride: int) -> nn.Sequential:
    """Figure 3: `in_channels` to 384 channels."""
    return nn.Sequential(
        _conv(in_channels, 32, 3, first_stride),
        _conv(32, 32, 3),
        _conv(32, 64, 3),
        Branches([_halve(), _conv(64, 96, 3, 2)]),
        Branches(
            [
                nn.Sequential(_conv(160, 64, 1), _conv(64, 96, 3)),
                nn.Sequential(
                    _conv(160, 64, 1),
                    _conv(64, 64, (7, 1)),
                    _conv(64, 64, (1, 7)),
                    _conv(64, 96, 3),
                ),
            ]
        ),
        Branches([_conv(192, 192, 3, 2), _halve()]),
    )


def _inception_a() -> Branches:
    """Figure 4: 384 to 384 channels."""
    return Branches(
        [
            nn.Sequential(_average(), _conv(384, 96, 1)),
            _conv(384, 96, 1),
            nn.Sequential(_conv(384, 64, 1), _conv(64, 96, 3)),
            nn.Sequential(_conv(384, 64, 1), _conv(64, 96, 3), _conv(96, 96, 3)),
        ]
    )


def _reduction_a() -> Branches:
    """Figure 7 with table 1's widths: 384 to 1024 channels, half the height and width."""
    return Branches(
        [
            _halve(),
            _conv(384, 384, 3, 2),
            nn.Sequential(_conv(384, 192, 1), _conv(192, 224, 3), _conv(224, 256, 3, 2)),
        ]
    )


def _inception_b() -> Branches:
    """Figure 5: 1024 to 1024 channels."""
    return Branches(
        [
            nn.Sequential(_average(), _conv(1024, 128, 1)),
            _conv(1024, 384, 1),
            nn.Sequential(_conv(1024, 192, 1), _conv(192, 224, (1, 7)), _conv(224, 256, (7, 1))),
            nn.Sequential(
                _conv(1024, 192, 1),
                _conv(192, 192, (1, 7)),
                _conv(192, 224, (7, 1)),
                _conv(224, 224, (1, 7)),
                _conv(224, 256, (7, 1)),
            ),
        ]
    )


def _reduction_b() -> Branches:
    """Figure 8: 1024 to 1536 channels, half the height and width."""
    return Branches(
        [
            _halve(),
            nn.Sequential(_conv(1024, 192, 1), _conv(192, 192, 3, 2)),
            nn.Sequential(
                _conv(1024, 256, 1),
                _conv(256, 256, (1, 7)),
                _conv(256, 320, (7, 1)),
                _conv(320, 320, 3, 2),
            ),
        ]
    )


def _inception_c() -> Branches:
    """Figure 6: 1536 to 1536 channels."""
    return Branches(
        [
            nn.Sequential(_average(), _conv(1536, 256, 1)),
            _conv(1536, 256, 1),
            nn.Sequential(
                _conv(1536, 384, 1), Branches([_conv(384, 256, (1, 3)), _conv(384, 256, (3, 1))])
            ),
            nn.Sequential(
                _conv(1536, 384, 1),
                _conv(384, 448, (1, 3)),
                _conv(448, 512, (3, 1)),
                Branches([_conv(512, 256, (1, 3)), _conv(512, 256, (3, 1))]),
            ),
        ]
    )


def inceptionv4(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Inception-v4: (N, C, H, W) float to (N, num_classes) logits.

    The paper's blocks and widths: stem, 4 x A, reduction A, 7 x B, reduction B, 3 x C, average
    pooling, dropout 0.2. Two things differ, so that small images can pass. Every convolution and
    pooling is padded (the paper's stem and reductions are not, at 299x299). And the stem's first
    convolution has the paper's stride 2 only for images whose shorter side is at least 64, below
    that stride 1: 32x32 as well as 64x64 images reach the first A block at 8x8.

    Source: Szegedy et al., *Inception-v4, Inception-ResNet and the Impact of Residual Connections
    on Learning*, 2016, arXiv 1602.07261, figures 3-9. Initialised as He et al., not as the paper.
    """
    return he_initialize(
        nn.Sequential(
            _stem(input_shape[0], first_stride=2 if is_large(input_shape) else 1),
            *[_inception_a() for _ in range(4)],
            _reduction_a(),
            *[_inception_b() for _ in range(7)],
            _reduction_b(),
            *[_inception_c() for _ in range(3)],
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(1536, num_classes),
        )
    )
