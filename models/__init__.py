"""What a network is: a registry of names, and one file per family of networks."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from models import from_timm
from models.classifier import ImageClassifier
from models.densenet import densenet, densenet100bc
from models.feed_forward import feed_forward
from models.from_timm import normalisation as pretrained_normalisation
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
    "pretrained_normalisation",
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
    "feed_forward": Network(feed_forward, smallest_image=1),
    "shallownet": Network(shallownet),
}

# "densetnet" is how the ILS README spells it.
ALIASES = {"densetnet": "densenet"}


def model_names() -> list[str]:
    """Every name that `build_model` takes, aliases last; timm's, which are many, not among them."""
    return [*MODELS, *ALIASES]


def canonical_name(name: str) -> str:
    """The name under which `MODELS` has `name`, which may be an alias; timm-NAME for timm/NAME.

    Raises:
        ValueError: no such model; the message lists all names, those nearest to `name` first, or
            of timm's names the nearest.
        ModuleNotFoundError: the name is one of timm's, and timm is not installed.
    """
    if from_timm.is_timm(name):
        return from_timm.canonical_name(name)
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
    *,
    pretrained: bool = False,
    network_size: tuple[int, int] | None = None,
) -> ImageClassifier:
    """A freshly initialised network that takes the data set's images and gives logits.

    Args:
        name: one of `model_names()`, or timm/NAME.
        input_shape: (channels, height, width) of the images. A side shorter than the network's
            `smallest_image` is enlarged to it, bilinearly; the other side stays as it is. What
            timm's networks get is told at `from_timm.image_size`.
        num_classes: K, at least 2.
        mean, std: one value a channel, of pixel values scaled to [0, 1]; 0 and 1 when not given.
        pretrained: load timm's weights; `pretrained_normalisation` has the mean and std for them.
        network_size: (height, width) at which the images enter the network, as a checkpoint says;
            found out when not given.

    Raises:
        ValueError: the name is unknown, a number is out of its range, or there are no weights.
        ModuleNotFoundError: the name is one of timm's, and timm is not installed.
    """
    name = canonical_name(name)
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape is {input_shape}; accepted: positive (channels, height, width)"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; accepted: 2 or more")
    channels, height, width = input_shape
    if from_timm.is_timm(name):
        size = network_size or from_timm.image_size(name, input_shape, pretrained)
        if not from_timm.takes(name, channels, size):
            raise ValueError(f"{name} takes no images of {channels} channels and {size} pixels")
        network = from_timm.make(name, channels, size, num_classes, pretrained)
    else:
        constructor, smallest = MODELS[name]
        size = (max(height, smallest), max(width, smallest))
        if network_size not in (None, size):
            raise ValueError(f"network_size is {network_size}; accepted: {size}")
        if pretrained:
            raise ValueError(f"pretrained weights are timm's; accepted: timm/NAME, not {name}")
        network = constructor((channels, *size), num_classes)
    return ImageClassifier(network, name, input_shape, num_classes, mean, std, size)
