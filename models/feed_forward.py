"""The feed-forward network of the ILS paper's appendix, for points of the plane."""

from itertools import pairwise
from math import prod

from torch import nn


def feed_forward(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Five hidden layers of 64 ReLU units: (N, C, H, W) float to (N, num_classes) logits.

    Weights are drawn from Glorot's uniform distribution and biases are 0. The appendix does not
    say how it starts; on its kind of data this comes nearer to its results than PyTorch's default.

    Source: ILS paper, appendix; Glorot and Bengio, *Understanding the difficulty of training deep
    feedforward neural networks*, 2010.
    """
    sizes = [prod(input_shape), 64, 64, 64, 64, 64, num_classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])
