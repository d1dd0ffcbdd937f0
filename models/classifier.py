"""From the data set's images to logits: normalisation, enlargement, network."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """A network together with the normalisation of its images.

    Normalisation lives in here, not in the data loader, for two reasons. A checkpoint's state dict
    holds `mean` and `std`, so whoever loads it needs nothing else to use it. And a teacher that was
    trained with another normalisation can be shown the very same batch as its student.

    Attributes:
        name: the network's name in `models.MODELS`, or timm-NAME.
        input_shape: (channels, height, width) of the images that `forward` takes.
        num_classes: K.
        mean, std: buffers of shape (channels, 1, 1), of pixel values scaled to [0, 1].
        network_size: (height, width) at which images enter `network`: those of `input_shape`, or
            what they are enlarged to, bilinearly.
        network: the bare network, normalised float images to logits.

    Raises:
        ValueError: `mean` or `std` has not one value for each channel, or `std` has one that is
            not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        name: str,
        input_shape: tuple[int, int, int],
        num_classes: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        network_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.input_shape = tuple(input_shape)
        self.num_classes = num_classes
        self.network_size = self.input_shape[1:] if network_size is None else tuple(network_size)
        channels = self.input_shape[0]
        mean = [0.0] * channels if mean is None else [float(value) for value in mean]
        std = [1.0] * channels if std is None else [float(value) for value in std]
        for statistic, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"{statistic} has {len(values)} values; accepted: {channels}, one a channel"
                )
        if min(std) <= 0:
            raise ValueError(f"std is {std}; accepted: positive values")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images as the data set stores them.

        Args:
            images: (N, channels, height, width), uint8 or float, pixel values in 0..255 either way
                (float images in [0, 1] would pass for nearly black ones); or float features of
                any range, whose `mean` and `std` are divided by 255 too. Their memory format,
                contiguous or channels last, is that in which they enter the network.

        Returns:
            (N, num_classes) logits; float32, or what the network makes of it under autocast.

        Raises:
            ValueError: `images` are not of shape (N, *input_shape).
        """
        if images.dim() != 4 or images.shape[1:] != self.input_shape:
            expected = ", ".join(map(str, self.input_shape))
            raise ValueError(f"images have shape {tuple(images.shape)}; accepted: (N, {expected})")
        # (x / 255 - mean) / std in one pass over the images, as shift + x * scale.
        shift, scale = -self.mean / self.std, 1 / (255 * self.std)
        normalised = torch.addcmul(shift, images.float(), scale)
        if normalised.shape[2:] != self.network_size:
            normalised = F.interpolate(
                normalised, size=self.network_size, mode="bilinear", align_corners=False
            )
        return self.network(normalised)
