"""When is an image large enough for the stem of an ImageNet network?"""

LARGE_IMAGE = 64


def is_large(input_shape: tuple[int, int, int]) -> bool:
    """Whether the shorter side of (channels, height, width) is at least 64 pixels.

    An ImageNet stem divides height and width by four before the first block sees them. That
    leaves too little of a 28x28 or 32x32 image, so the networks made for ImageNet get a stem that
    keeps the resolution of images below this limit, and their own stem from it on.
    """
    _, height, width = input_shape
    return min(height, width) >= LARGE_IMAGE
