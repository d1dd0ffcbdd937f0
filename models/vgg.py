"""VGG-16 for CIFAR."""

from torch import nn

from models.initialization import he_initialize

# Output channels of the 3x3 convolutions between one 2x2 max pooling and the next.
_STAGES = [(64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)]


def vgg16(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """VGG-16 with batch norm and dropout, of the LR paper: (N, C, H, W) to (N, num_classes) logits.

    Height and width must be at least 32, the least that five poolings leave anything of. Behind
    each convolution come ReLU and batch norm, in this order, and dropout unless pooling follows:
    0.3 in the first stage, 0.4 in the others, 0.5 around the 512 hidden units. What is left of
    images beyond 32x32 is averaged.

    Source: Liu and Deng, *Very Deep Convolutional Neural Network Based Image Classification Using
    Small Training Sample Size*, ACPR 2015; the LR paper's repository has the same layers.
    """
    channels = input_shape[0]
    layers: list[nn.Module] = []
    for stage, widths in enumerate(_STAGES):
        dropout = 0.3 if stage == 0 else 0.4
        for position, out_channels in enumerate(widths, start=1):
            # The bias stays: ReLU stands between it and the batch norm.
            layers += [
                nn.Conv2d(channels, out_channels, kernel_size=3, padding=1),
                nn.ReLU(inplace=True),
                nn.BatchNorm2d(out_channels),
            ]
            if position < len(widths):
                layers.append(nn.Dropout(dropout))
            channels = out_channels
        layers.append(nn.MaxPool2d(2))
    return he_initialize(
        nn.Sequential(
            *layers,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(channels, 512),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(512),
            nn.Dropout(0.5),
            nn.Linear(512, num_classes),
        )
    )
