"""How are the convolutions initialised?"""

from torch import nn


def he_initialize(network: nn.Module) -> nn.Module:
    """Draw every convolution of `network` anew from He's normal distribution; return `network`.

    The standard deviation is sqrt(2 / (kernel area * output channels)), "fan out", as in
    torchvision's ResNet; biases become 0. Other layers keep PyTorch's defaults.

    Source: He et al., *Delving Deep into Rectifiers*, 2015, arXiv 1502.01852, section 2.2.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
