"""The shallow student of the ILS paper's distillation."""

from torch import nn

from models.initialization import he_initialize


def shallownet(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """The "5 layer" convolutional network: (N, C, H, W) float to (N, num_classes) logits.

    Height and width must be at least 8. Three 3x3 convolutions of 32, 64 and 128 channels, each
    with batch norm, 2x2 max pooling and ReLU; 128 hidden units with batch norm, ReLU and dropout
    0.5; the classes.

    Source: ILS paper and README, the student of the distillation experiments.
    """
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for out_channels in (32, 64, 128):
        layers += [
            nn.Conv2d(channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.MaxPool2d(2),
            nn.ReLU(inplace=True),
        ]
        channels = out_channels
    return he_initialize(
        nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(channels * (height // 8) * (width // 8), 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(128, num_classes),
        )
    )
