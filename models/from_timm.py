"""Networks of timm, https://github.com/huggingface/pytorch-image-models, where it is installed.

On the command line they are timm/NAME; everywhere else timm-NAME, which is a plain word: it names
a folder and stands in method names, tables and file names like any other network's name. NAME is
one of `timm.list_models()`, or one with a tag that says which weights --pretrained loads, such as
resnet18.a1_in1k.
"""

import logging
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache

import torch
from torch import nn

PREFIX = "timm-"

# ImageNet networks halve height and width five times.
SMALLEST_IMAGE = 32


def is_timm(name: str) -> bool:
    return name.startswith((PREFIX, "timm/"))


def canonical_name(name: str) -> str:
    """timm-NAME for timm/NAME, and for itself.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: timm has no such network; the message names the nearest.
    """
    name = name[len(PREFIX) :]
    # timm.create_model would also follow names such as hf-hub:..., so it gets none but these.
    names = {*_timm().list_models(), *_timm().list_models(include_tags=True)}
    if name not in names:
        near = [f"timm/{other}" for other in get_close_matches(name, names, cutoff=0.5)]
        hint = f", perhaps {' or '.join(near)}" if near else ""
        raise ValueError(
            f"{f'timm/{name}'!r} given, a name of timm.list_models() expected{hint} "
            f"(timm {_timm().__version__})"
        )
    return PREFIX + name


def normalisation(name: str, channels: int) -> dict[str, list[float]]:
    """Mean and standard deviation of the images that timm's weights were trained on.

    Images with another number of channels than those get the average over the channels in each.
    """
    config, statistics = _config(name), {}
    for statistic, values in (("mean", config.mean), ("std", config.std)):
        if len(values) != channels:
            values = [sum(values) / len(values)] * channels
        statistics[statistic] = [float(value) for value in values]
    return statistics


def image_size(
    name: str, input_shape: tuple[int, int, int], pretrained: bool = False
) -> tuple[int, ...]:
    """Height and width at which images of this (channels, height, width) are to enter the network.

    The size that they have, if the network takes that and it is not below 32 pixels; else the
    next larger one found that it takes. Pretrained networks see images no smaller than those that
    the weights were trained on.

    Raises:
        ValueError: it takes neither that size nor any up to the one it was made for.
    """
    *_, height, width = _config(name).input_size
    least = (height, width) if pretrained else (SMALLEST_IMAGE, SMALLEST_IMAGE)
    for size in _sizes(input_shape[1:], least, (height, width), _patch(name)):
        if takes(name, input_shape[0], size):
            return size
    raise ValueError(
        f"timm/{name[len(PREFIX) :]} takes no images of {input_shape[0]} channels and "
        f"{input_shape[1]}x{input_shape[2]} pixels; it was made for {height}x{width}, which "
        f"--image_size {height} would make of them"
    )


def _sizes(
    image: tuple[int, ...], least: tuple[int, int], own: tuple[int, int], patch: int
) -> Iterator[tuple[int, ...]]:
    """Sizes to try, each no smaller than the image."""

    def within(size) -> bool:
        return size[0] <= own[0] and size[1] <= own[1]

    size = tuple(map(max, image, least))
    if not any(side % patch for side in size):  # less than a whole patch would be cut off
        yield size
    step = SMALLEST_IMAGE if SMALLEST_IMAGE % patch == 0 else patch
    size = tuple(-(-side // step) * step for side in size)
    yield size
    while within(size := tuple(side + step for side in size)):
        yield size
    if within(image):
        yield own


@lru_cache
def takes(name: str, channels: int, size: tuple[int, ...]) -> bool:
    """Whether the network can be shown images of this size, found out without memory for it."""
    try:
        with torch.device("meta"), torch.no_grad():
            images = torch.empty(2, channels, *size).contiguous(memory_format=torch.channels_last)
            network = make(name, channels, size, 2).to(memory_format=torch.channels_last)
            return network(images).shape == (2, 2)
    except Exception:  # each network has its own way to say that its layers do not fit
        return False


def make(
    name: str, channels: int, size: tuple[int, ...], num_classes: int, pretrained: bool = False
) -> nn.Module:
    """The network for normalised float images (N, channels, *size), with logits (N, num_classes).

    Raises:
        ValueError: pretrained, and there are no weights or they cannot be had.
    """
    sized = {"img_size": size} if _config(name).fixed_input_size else {}
    arguments = {"in_chans": channels, "num_classes": num_classes, **sized}
    if not pretrained:
        return _timm().create_model(name[len(PREFIX) :], **arguments)
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # a line for each attempt to reach the server
    try:
        return _timm().create_model(name[len(PREFIX) :], pretrained=True, **arguments)
    except Exception as error:  # of the network, the server, the file or the file's tensors
        raise ValueError(
            f"--pretrained has no usable weights for timm/{name[len(PREFIX) :]} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); a network or a copy "
            "in the cache is needed, or leave the flag out"
        ) from None
    finally:
        hub.setLevel(level)


def _timm():
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(
            f"timm/NAME needs timm, which is not installed ({error}): pip install timm"
        ) from None
    return timm


@lru_cache
def _config(name: str):
    """timm's record of the network: the size and normalisation of its images, its weights."""
    from timm.models import PretrainedCfg  # what timm itself takes for networks without a record

    return _timm().get_pretrained_cfg(name[len(PREFIX) :]) or PretrainedCfg()


@lru_cache
def _patch(name: str) -> int:
    """The side of the patches that the network cuts images into; 1 if it does not."""
    channels, *size = _config(name).input_size
    with torch.device("meta"):
        network = make(name, channels, tuple(size), num_classes=2)
    side = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return max(side) if isinstance(side, tuple) else side
