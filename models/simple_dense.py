"""The dense network of the LR paper."""

from math import prod

from torch import nn


def simple_dense(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Two hidden layers of 1024 ReLU units: (N, C, H, W) float to (N, num_classes) logits.

    Source: LR paper, the network for MNIST and Fashion-MNIST. PyTorch's default initialisation.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(prod(input_shape), 1024),
        nn.ReLU(inplace=True),
        nn.Linear(1024, 1024),
        nn.ReLU(inplace=True),
        nn.Linear(1024, num_classes),
    )
