"""What a network is: a registry of names, and one file per family of networks."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from models.classifier import ImageClassifier
from models.densenet import densenet, densenet100bc
from models.inceptionv4 import inceptionv4
from models.lenet import lenet
from models.resnet import resnet18, resnet34, resnet50, resnet56, resnet101, resnet152
from models.shallownet import shallownet
from models.simple_dense import simple_dense
from models.vgg import vgg16

__all__ = [
    "ALIASES",
    "MODELS",
    "ImageClassifier",
    "Network",
    "build_model",
    "canonical_name",
    "model_names",
]


class Network(NamedTuple):
    """What the registry knows of a network.

    `constructor(input_shape, num_classes)` makes it for normalised float images of shape
    (channels, height, width); `smallest_image` is the smallest height and width it takes.
    """

    constructor: Callable[[tuple[int, int, int], int], nn.Module]
    smallest_image: int = 8


MODELS: dict[str, Network] = {
    "resnet18": Network(resnet18),
    "resnet34": Network(resnet34),
    "resnet50": Network(resnet50),
    "resnet101": Network(resnet101),
    "resnet152": Network(resnet152),
    "resnet56": Network(resnet56),
    "densenet": Network(densenet),
    "densenet100bc": Network(densenet100bc),
    "inceptionv4": Network(inceptionv4),
    "vgg16": Network(vgg16, smallest_image=32),
    "lenet": Network(lenet, smallest_image=28),
    "simple_dense": Network(simple_dense, smallest_image=1),
    "shallownet": Network(shallownet),
}

# "densetnet" is how the ILS README spells it.
ALIASES = {"densetnet": "densenet"}


def model_names() -> list[str]:
    """Every name that `build_model` takes, aliases last; for argparse's `choices`."""
    return [*MODELS, *ALIASES]


def canonical_name(name: str) -> str:
    """The name under which `MODELS` has `name`, which may be an alias.

    Raises:
        ValueError: no such model; the message lists all names, those nearest to `name` first.
    """
    if name not in model_names():
        nearest = get_close_matches(name, model_names())
        others = [other for other in model_names() if other not in nearest]
        raise ValueError(f"unknown model {name!r}; accepted: {', '.join(nearest + others)}")
    return ALIASES.get(name, name)


def build_model(
    name: str,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    num_classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageClassifier:
    """A freshly initialised network that takes the data set's images and gives logits.

    Args:
        name: one of `model_names()`.
        input_shape: (channels, height, width) of the images. A side shorter than the network's
            `smallest_image` is enlarged to it, bilinearly; the other side stays as it is.
        num_classes: K, at least 2.
        mean, std: one value a channel, of pixel values scaled to [0, 1]; 0 and 1 when not given.

    Raises:
        ValueError: the name is unknown, or a number is out of its range.
    """
    name = canonical_name(name)
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape is {input_shape}; accepted: positive (channels, height, width)"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; accepted: 2 or more")
    constructor, smallest = MODELS[name]
    channels, height, width = input_shape
    network_size = (max(height, smallest), max(width, smallest))
    network = constructor((channels, *network_size), num_classes)
    return ImageClassifier(network, name, input_shape, num_classes, mean, std, network_size)
