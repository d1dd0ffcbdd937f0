"""LeNet-5."""

from torch import nn


def lenet(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling: (N, C, H, W) float to (N, num_classes) logits.

    Height and width must be at least 28, the size of the digits it was made for. As in the paper,
    28x28 images stand in a 32x32 field: those with a side below 32 are padded by 2.

    Source: LeCun et al., *Gradient-Based Learning Applied to Document Recognition*, 1998, section
    II.B, with ReLU for tanh, max pooling for the trainable averages, full connections between
    the first two layers, and a linear last layer.
    """
    channels, height, width = input_shape
    padding = 2 if min(height, width) < 32 else 0
    # Each 5x5 convolution takes 4 pixels off a side, each pooling half of it.
    rows, columns = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 6, kernel_size=5, padding=padding),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * rows * columns, 120),
        nn.ReLU(inplace=True),
        nn.Linear(120, 84),
        nn.ReLU(inplace=True),
        nn.Linear(84, num_classes),
    )
