"""Where the truth is known: three classes in the plane, and their exact probabilities.

Each class is a sum of two circular Gaussians, a wide one with 80 % of its points and a narrow one
with 20 % (ILS paper, appendix). The centres and widths are this project's: the appendix shows
them in a figure only. Turned by a third of a full turn, each class becomes the next. Its wide
Gaussian lies 1.9 from the origin and its narrow one 2 from it on the other side, between the wide
ones of the other two classes. The best possible classifier is right 82.0 % of the time, and its
log loss is 0.446 (the appendix: 81.98 %, 0.4444).
"""

import math

import numpy as np
import torch
from torch import Tensor

CLASSES = ("A", "B", "C")
WEIGHTS = np.array([0.8, 0.2])  # of the wide and the narrow Gaussian
WIDTHS = np.array([1.0, 0.5])  # standard deviation in every direction
RADII = np.array([1.9, -2.0])  # signed distance of their centres from the origin
ANGLES = np.deg2rad([90, 210, 330])  # of the classes
# (3, 2, 2): class, Gaussian, coordinate
CENTRES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)[:, None, :] * RADII[:, None]

# Points of a data set: 50 for training and 50 for validation of each class, 5000 for testing.
TRAINING_POINTS, TEST_POINTS = 300, 15000


def sample(count: int, stream: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 (count, 2) and labels int64 (count,) of the numbered random stream.

    The labels are 0, 1, 2, 0, 1, 2, ..., so that any part of a multiple of three is balanced.
    """
    random = np.random.default_rng([0, stream])
    labels = np.arange(count) % len(CLASSES)
    narrow = (random.random(count) < WEIGHTS[1]).astype(int)
    noise = random.standard_normal((count, 2))
    points = CENTRES[labels, narrow] + WIDTHS[narrow, None] * noise
    return points.astype(np.float32), labels


def posterior(points: np.ndarray | Tensor) -> Tensor:
    """P(class | x), (..., 3) float64, of points (..., 2): Bayes' rule, classes alike."""
    x = torch.as_tensor(points, dtype=torch.float64)
    distance = (x[..., None, None, :] - torch.from_numpy(CENTRES)).square().sum(-1)
    weights, widths = torch.from_numpy(WEIGHTS), torch.from_numpy(WIDTHS)
    log_density = (weights / (2 * math.pi * widths**2)).log() - distance / (2 * widths**2)
    return log_density.logsumexp(-1).softmax(-1)
